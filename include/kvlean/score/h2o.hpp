// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/score/observed_mass.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Heavy hitters (H2O, arXiv 2306.14048, section 4): a token's score is the attention it received
/// from all queries so far, summed and not normalised by their number. It reads seen.mass if the
/// engine has it, already per KV head, else sums over seen.reference.
struct H2OScorer {
  GroupReduction group = GroupReduction::mean;  ///< over a group's query heads; not for seen.mass

  /// rank = mass = attention received. A NaN key gives its token NaN. Errors: those of check_cache,
  /// shape_mismatch, null_pointer, missing_observation, invalid_group, workspace_too_small,
  /// out_of_memory. O(query heads * queries * tokens * width), or O(tokens) with seen.mass.
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, true));
    KVLEAN_RETURN_IF_ERROR(detail::observe_mass_into(cache, seen, group, context, scores));
    for (u32 s = 0; s < cache.segments; ++s) {
      std::copy_n(scores.mass.segment(s), cache.length(s), scores.rank.segment(s));
    }
    return StatusCode::ok;
  }
};
static_assert(Scorer<H2OScorer>);

KVLEAN_NAMESPACE_END
