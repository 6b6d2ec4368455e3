// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Attention sinks and recency (StreamingLLM, arXiv 2309.17453): the first tokens, then the newest.
struct StreamingLLMScorer {
  u32 sinks = 4;  ///< leading tokens of each segment that come before all others

  /// rank = 1e30 for sinks, else minus the token's distance to the newest; no mass. Needs no
  /// observation. Errors: those of check_cache, shape_mismatch, null_pointer. O(tokens).
  [[nodiscard]] Status score(const CacheView& cache, const Observation&, Context&,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, false));
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 length = cache.length(s);
      float* rank = scores.rank.segment(s);
      // The distance is exact in float near the newest token, where it decides; the index is not.
      for (u32 t = 0; t < length; ++t) {
        rank[t] = t < sinks ? 1e30f : -static_cast<float>(length - 1 - t);
      }
    }
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }
};
static_assert(Scorer<StreamingLLMScorer>);

KVLEAN_NAMESPACE_END
