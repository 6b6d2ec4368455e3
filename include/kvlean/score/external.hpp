// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Scores computed elsewhere: a learned gate, an engine's own statistics, a test.
struct ExternalScorer {
  bool is_mass = false;  ///< the scores are attention received: merging may weigh by them

  /// rank = seen.external (and mass, when is_mass). Errors: missing_observation, those of
  /// check_cache, shape_mismatch, null_pointer. O(tokens).
  [[nodiscard]] Status score(const CacheView& cache, const Observation& seen, Context&,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, is_mass));
    if (!seen.external) return StatusCode::missing_observation;
    for (u32 s = 0; s < cache.segments; ++s) {
      const float* from = seen.external.segment(s);
      std::copy_n(from, cache.length(s), scores.rank.segment(s));
      if (is_mass) std::copy_n(from, cache.length(s), scores.mass.segment(s));
    }
    scores.has_mass = is_mass;
    scores.has_observers = false;
    return StatusCode::ok;
  }
};
static_assert(Scorer<ExternalScorer>);

KVLEAN_NAMESPACE_END
