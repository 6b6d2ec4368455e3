// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/score/observed_mass.hpp"
#include "kvlean/simd/select_kernels.hpp"

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
      } else if (seen.mass_observers) {
        const float* counts = seen.mass_observers.segment(s);
        std::transform(counts, counts + length, seen_by, detail::whole_observers);
      } else {
        for (u32 t = 0; t < length; ++t) {
          seen_by[t] = detail::ready_made_observers(cache, s, t, seen.observers);
        }
      }
      simd::select_kernels().divide_by_counts(mass, seen_by, length, rank);
    }
    return StatusCode::ok;
  }
};
static_assert(Scorer<ObservedAttentionScorer>);

KVLEAN_NAMESPACE_END
