// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <limits>

#include "kvlean/simd/attention_kernels.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The largest value that is not NaN; -inf if there is none.
[[nodiscard]] inline float max_logit(const float* x, u32 count) noexcept {
  constexpr u32 lanes = 8;
  float lane[lanes];
  for (u32 j = 0; j < lanes; ++j) lane[j] = -std::numeric_limits<float>::infinity();
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    for (u32 j = 0; j < lanes; ++j) lane[j] = x[t + j] > lane[j] ? x[t + j] : lane[j];
  }
  for (u32 j = 0; t < count; ++t, ++j) lane[j] = x[t] > lane[j] ? x[t] : lane[j];
  float largest = lane[0];
  for (u32 j = 1; j < lanes; ++j) largest = lane[j] > largest ? lane[j] : largest;
  return largest;
}

/// The softmax of one row whose logits come in pieces: what was exponentiated so far, relative to
/// the largest logit of its time, and the shift of every piece in memory of the caller.
struct SoftmaxRow {
  float largest = -std::numeric_limits<float>::infinity();
  double sum = 0.0;  ///< of exp(logit - largest), NaN left out

  /// Exponentiates `count` logits whose largest number is `maximum`, and tells what was subtracted.
  /// Infinite: nothing, the logits stay as they are.
  [[nodiscard]] float add(const simd::AttentionKernels& kernels, float* x, u32 count,
                          float maximum) noexcept {
    constexpr float inf = std::numeric_limits<float>::infinity();
    if (maximum > largest) {
      sum *= maximum == inf ? 0.0 : std::exp(static_cast<double>(largest) - maximum);
      largest = maximum;
    }
    if (largest != inf && largest != -inf) sum += kernels.exponentials(x, count, largest);
    return largest;
  }

  /// Lets the sink (or null) join the denominator. Returns the log of it, -inf when it is empty.
  float close(const float* sink) noexcept {
    constexpr float inf = std::numeric_limits<float>::infinity();
    if (sink != nullptr && *sink > largest) {
      sum *= *sink == inf ? 0.0 : std::exp(static_cast<double>(largest) - *sink);
      largest = *sink;
    }
    if (largest == inf || largest == -inf) return largest;
    if (sink != nullptr) sum += std::exp(static_cast<double>(*sink) - largest);
    return static_cast<float>(largest + std::log(sum));
  }

  /// What a piece that was shifted by `shift` is multiplied with; after close(), largest finite.
  [[nodiscard]] float factor(float shift) const noexcept {
    return static_cast<float>(std::exp(static_cast<double>(shift) - largest) / sum);
  }
};

/// Probabilities of a piece that was left as logits: zero, or `share` of each +inf. NaN stays.
inline void share_infinite(float* x, u32 count, float share) noexcept {
  for (u32 t = 0; t < count; ++t) {
    if (x[t] == x[t]) x[t] = x[t] == std::numeric_limits<float>::infinity() ? share : 0.0f;
  }
}

/// Softmax in place over a whole row of logits; `sink` (or null) joins the denominator. NaN stays
/// NaN and is left out of the sum; +inf logits share the whole mass. O(count).
inline void softmax(const simd::AttentionKernels& kernels, float* x, u32 count,
                    const float* sink) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  SoftmaxRow row;
  const float shift = row.add(kernels, x, count, kernels.maximum(x, count));
  row.close(sink);
  if (shift == -inf || row.largest == inf) {
    u32 infinite = sink != nullptr && *sink == inf ? 1 : 0;
    for (u32 t = 0; t < count; ++t) infinite += x[t] == inf ? 1 : 0;
    share_infinite(x, count, infinite != 0 ? 1.0f / static_cast<float>(infinite) : 0.0f);
    return;
  }
  kernels.scale(x, count, row.factor(shift));
}

/// p = exp(logit - lse) in place, with the log-sum-exp that the engine computed. An lse of -inf
/// means that nothing was seen: zeros.
inline void exponentiate(const simd::AttentionKernels& kernels, float* x, u32 count,
                         float lse) noexcept {
  if (lse == -std::numeric_limits<float>::infinity()) {
    for (u32 t = 0; t < count; ++t) x[t] = x[t] == x[t] ? 0.0f : x[t];
    return;
  }
  static_cast<void>(kernels.exponentials(x, count, lse));
}

}  // namespace detail
KVLEAN_NAMESPACE_END
