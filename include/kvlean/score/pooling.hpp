// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/select_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN

/// How neighbouring scores are pooled (stride 1, padding kernel / 2).
enum class Pooling : u8 {
  average,  ///< the padding counts as zeros: edges are divided by the kernel too
  max,      ///< the padding counts as -inf
};

/// The pooled score of token t: over scores[t - kernel/2 .. t + kernel/2] within [0, count);
/// `kernel` odd. A NaN stays with its own token: it is NaN there and padding for its neighbours.
/// O(min(kernel, count)).
[[nodiscard]] inline float pooled_score(const float* scores, u32 count, u32 t, u32 kernel,
                                        Pooling pooling) noexcept {
  if (scores[t] != scores[t]) return scores[t];
  const u32 half = kernel / 2;
  const u32 begin = t > half ? t - half : 0;
  const u32 end = count - t > half ? t + half + 1 : count;
  float sum = 0.0f;
  float largest = scores[t];
  for (u32 i = begin; i < end; ++i) {
    sum += scores[i] == scores[i] ? scores[i] : 0.0f;
    largest = scores[i] > largest ? scores[i] : largest;
  }
  return pooling == Pooling::max ? largest : sum / static_cast<float>(kernel);
}

/// out[t] = pooled_score(t) of all `count` tokens; `out` may not overlap `scores`. The mean of more
/// than 256 tokens may differ by rounding. O(min(kernel, 256) * count / lanes) for the mean,
/// O(log(kernel) * count / lanes) for the maximum.
inline void pool_scores(const float* scores, u32 count, u32 kernel, Pooling pooling,
                        float* out) noexcept {
  const simd::SelectKernels& kernels = simd::select_kernels();
  if (pooling == Pooling::max) {
    kernels.pool_maximum(scores, count, kernel, out);
  } else {
    kernels.pool_average(scores, count, kernel, out);
  }
}

KVLEAN_NAMESPACE_END
