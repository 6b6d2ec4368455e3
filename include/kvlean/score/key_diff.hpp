// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/score/preconditions.hpp"
#include "kvlean/simd/row_math.hpp"

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
  static constexpr u32 block_tokens = 64;

  /// `rank` first holds the norms.
  static void score_segment(const CacheView& cache, u32 s, float* rank) noexcept {
    const u32 length = cache.length(s);
    const u32 width = cache.keys.width;
    float row[max_row_width];
    float block[max_row_width];
    double sum[max_row_width] = {};
    u32 finite_keys = 0;
    for (u32 first = 0; first < length; first += block_tokens) {
      std::fill_n(block, width, 0.0f);
      for (u32 t = first; t < std::min(length, first + block_tokens); ++t) {
        load_row(cache.keys, s, t, row);
        rank[t] = std::sqrt(row_math::squared_norm(row, width));
        if (!std::isfinite(rank[t])) continue;
        ++finite_keys;
        row_math::add_scaled(block, row, 1.0f / std::max(rank[t], 1e-12f), width);
      }
      for (u32 i = 0; i < width; ++i) sum[i] += static_cast<double>(block[i]);
    }
    const double count = std::max(1.0, static_cast<double>(finite_keys));
    for (u32 i = 0; i < width; ++i) block[i] = static_cast<float>(sum[i] / count);
    const float mean_norm = std::max(std::sqrt(row_math::squared_norm(block, width)), 1e-8f);
    for (u32 t = 0; t < length; ++t) {
      load_row(cache.keys, s, t, row);
      rank[t] = -row_math::dot(row, block, width) / (std::max(rank[t], 1e-8f) * mean_norm) +
                (std::isfinite(rank[t]) ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    }
  }
};
static_assert(Scorer<KeyDiffScorer>);

KVLEAN_NAMESPACE_END
