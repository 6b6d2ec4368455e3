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
    u32* seen_by = context.workspace.take<u32>(cache.max_length());
    if (seen_by == nullptr) return context.workspace.exhausted();
    KVLEAN_RETURN_IF_ERROR(detail::observe_mass_into(cache, seen, group, context, scores));
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 length = cache.length(s);
      const float* mass = scores.mass.segment(s);
      float* rank = scores.rank.segment(s);
      if (!seen.mass) {
        detail::count_observers(cache, s, seen.reference, seen.attention, 0, seen.reference.count,
                                seen_by);
      }
      for (u32 t = 0; t < length; ++t) {
        u32 observers = 0;
        if (!seen.mass) {
          observers = seen_by[t];
        } else if (seen.mass_observers) {
          observers = detail::whole_observers(seen.mass_observers(s, t));
        } else {
          observers = detail::ready_made_observers(cache, s, t, seen.observers);
        }
        rank[t] = observers != 0 ? mass[t] / static_cast<float>(observers) : mass[t];
      }
    }
    return StatusCode::ok;
  }
};
static_assert(Scorer<ObservedAttentionScorer>);

KVLEAN_NAMESPACE_END
