// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/score/preconditions.hpp"
#include "kvlean/simd/row_math.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Key norm (Devoto et al., arXiv 2406.11430): keys of small L2 norm attract attention, so
/// the score is -||k||_2. The cheapest score that looks at data, and needs no queries.
struct KeyNormScorer {
  /// rank = -||k||_2 in float; no mass. NaN keys give NaN. Needs no observation.
  /// Errors: those of check_cache, shape_mismatch, null_pointer. O(tokens * width).
  [[nodiscard]] Status score(const CacheView& cache, const Observation&, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, false));
    parallel_for(context.options.executor, cache.segments, [&](u32, u32 s) noexcept {
      const u32 length = cache.length(s);
      float* rank = scores.rank.segment(s);
      float row[max_row_width];
      for (u32 t = 0; t < length; ++t) {
        load_row(cache.keys, s, t, row);
        rank[t] = -std::sqrt(row_math::squared_norm(row, cache.keys.width));
      }
    });
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }
};
static_assert(Scorer<KeyNormScorer>);

KVLEAN_NAMESPACE_END
