// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/core/row_addresses.hpp"
#include "kvlean/score/preconditions.hpp"
#include "kvlean/simd/merge_kernels.hpp"

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
      const u32 width = cache.keys.width;
      detail::for_each_row_tile(
          cache.keys, s, length, [&](u32 first, simd::RowPointers rows, DType dtype) noexcept {
            simd::merge_kernels().squared_norms(rows, dtype, width, rank + first);
            for (u32 i = 0; i < rows.count; ++i) rank[first + i] = -std::sqrt(rank[first + i]);
          });
    });
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }
};
static_assert(Scorer<KeyNormScorer>);

KVLEAN_NAMESPACE_END
