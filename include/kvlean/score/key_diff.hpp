// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/core/row_addresses.hpp"
#include "kvlean/score/preconditions.hpp"
#include "kvlean/simd/merge_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN

/// KeyDiff (Park et al., arXiv 2504.15364): keys that differ from the others are the ones that get
/// attention, so the score is minus the cosine between a key and the mean direction of the
/// segment's keys. Needs no queries.
struct KeyDiffScorer {
  /// rank = -cos(k, mean of k / |k|), in float, the mean in double over blocks of 64 tokens; no
  /// mass. Norms are at least 1e-12 in the mean and 1e-8 in the cosine, as in kvpress. A key that
  /// is not finite gets NaN and is left out of the mean. Needs no observation.
  /// Errors: those of check_cache, shape_mismatch, null_pointer. O(tokens * width).
  [[nodiscard]] Status score(const CacheView& cache, const Observation&, Context& context,
                             Scores& scores) const noexcept {
    KVLEAN_RETURN_IF_ERROR(detail::check_scores(cache, scores, false));
    parallel_for(context.options.executor, cache.segments,
                 [&](u32, u32 s) noexcept { score_segment(cache, s, scores.rank.segment(s)); });
    scores.has_mass = false;
    scores.has_observers = false;
    return StatusCode::ok;
  }

 private:
  static constexpr u32 block_tokens = 64;  // a tile of for_each_row_tile is no longer

  /// `rank` first holds the norms.
  static void score_segment(const CacheView& cache, u32 s, float* rank) noexcept {
    const u32 length = cache.length(s);
    const u32 width = cache.keys.width;
    const simd::MergeKernels& kernels = simd::merge_kernels();
    float block[max_row_width] = {};
    double sum[max_row_width] = {};
    u32 finite_keys = 0;
    const auto add_block = [&]() noexcept {
      for (u32 i = 0; i < width; ++i) sum[i] += static_cast<double>(block[i]);
      std::fill_n(block, width, 0.0f);
    };
    detail::for_each_row_tile(cache.keys, s, length,
                              [&](u32 first, simd::RowPointers rows, DType dtype) noexcept {
                                if (first != 0 && first % block_tokens == 0) add_block();
                                const std::byte* finite[block_tokens];
                                float weight[block_tokens];
                                u32 n = 0;
                                kernels.squared_norms(rows, dtype, width, rank + first);
                                for (u32 i = 0; i < rows.count; ++i) {
                                  float& norm = rank[first + i];
                                  norm = std::sqrt(norm);
                                  if (!std::isfinite(norm)) continue;
                                  finite[n] = rows.row[i];
                                  weight[n++] = 1.0f / std::max(norm, 1e-12f);
                                }
                                kernels.add_weighed({finite, n}, weight, dtype, width, block);
                                finite_keys += n;
                              });
    add_block();
    const double count = std::max(1.0, static_cast<double>(finite_keys));
    for (u32 i = 0; i < width; ++i) block[i] = static_cast<float>(sum[i] / count);
    float squared_mean = 0.0f;
    const std::byte* mean = reinterpret_cast<const std::byte*>(block);
    kernels.squared_norms({&mean, 1}, DType::f32, width, &squared_mean);
    const float mean_norm = std::max(std::sqrt(squared_mean), 1e-8f);
    detail::for_each_row_tile(
        cache.keys, s, length, [&](u32 first, simd::RowPointers rows, DType dtype) noexcept {
          float product[block_tokens];
          kernels.products(block, rows, dtype, width, product);
          for (u32 i = 0; i < rows.count; ++i) {
            const float norm = rank[first + i];
            rank[first + i] =
                -product[i] / (std::max(norm, 1e-8f) * mean_norm) +
                (std::isfinite(norm) ? 0.0f : std::numeric_limits<float>::quiet_NaN());
          }
        });
  }
};
static_assert(Scorer<KeyDiffScorer>);

KVLEAN_NAMESPACE_END
