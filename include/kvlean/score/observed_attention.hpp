// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/score/observed_mass.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Mean received attention (ObservedAttentionPress of NVIDIA/kvpress): H2O's sum divided by the
/// number of queries that could see the token, sum over i >= j of p_ij / (n - j). Old tokens lose
/// the advantage of having been seen more often.
struct ObservedAttentionScorer {
  GroupReduction group = GroupReduction::mean;  ///< over a group's query heads; not for seen.mass

  /// rank = mass / observers of the token (0 where none); mass = the sum itself. With seen.mass the
  /// observers are the positions from the token to the end of the cache, at most seen.observers if
  /// that is known. Errors and cost: see H2OScorer.
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, true));
    const WorkspaceScope scope(context.workspace);
    // change[t]: queries that begin to see at token t, less those that ended.
    i64* change = context.workspace.take<i64>(std::size_t{cache.max_length()} + 1);
    if (change == nullptr) return context.workspace.exhausted();
    KVLEAN_RETURN_IF_ERROR(detail::observe_mass_into(cache, seen, group, context, scores));
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 length = cache.length(s);
      const float* mass = scores.mass.segment(s);
      float* rank = scores.rank.segment(s);
      if (!seen.mass) count_observers(cache, s, seen, change);
      i64 observers = 0;
      for (u32 t = 0; t < length; ++t) {
        if (seen.mass) {
          observers = cache.positions ? static_cast<i64>(cache.next_position) - cache.position(s, t)
                                      : static_cast<i64>(length) - t;
          if (seen.observers != 0) observers = std::min<i64>(observers, seen.observers);
        } else {
          observers += change[t];
        }
        rank[t] = observers > 0 ? mass[t] / static_cast<float>(observers) : mass[t];
      }
    }
    return StatusCode::ok;
  }

 private:
  static void count_observers(const CacheView& cache, u32 segment, const Observation& seen,
                              i64* change) noexcept {
    std::fill_n(change, std::size_t{cache.length(segment)} + 1, i64{0});
    for (u32 i = 0; i < seen.reference.count; ++i) {
      const TokenRange range = visible_tokens(cache, segment, seen.reference, seen.attention, i);
      ++change[range.begin];
      --change[range.end];
    }
  }
};
static_assert(Scorer<ObservedAttentionScorer>);

KVLEAN_NAMESPACE_END
