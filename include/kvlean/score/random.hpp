// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/random.hpp"
#include "kvlean/score/preconditions.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Uniform noise in [0, 1): the floor that every other scorer has to beat. The draw depends on the
/// options' seed and step, the layer (origin.layer + its place in the
/// schedule), the KV head and the token's position, nothing else: a token
/// keeps its draw when the cache around it shrinks.
struct RandomScorer {
  /// rank = draw(seed, layer, head, position, step); no mass. Needs no observation.
  /// Errors: those of check_cache, shape_mismatch, null_pointer. O(tokens).
  [[nodiscard]] Status score(const CacheView& cache, const Observation&, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, false));
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 length = cache.length(s);
      float* rank = scores.rank.segment(s);
      for (u32 t = 0; t < length; ++t) {
        rank[t] = draw(context.options.seed, cache.origin.layer + context.layer,
                       cache.origin.head + s, cache.position(s, t), context.options.step);
      }
    }
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }
};
static_assert(Scorer<RandomScorer>);

KVLEAN_NAMESPACE_END
