// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <limits>

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// From raw products q.k to logits: softcap(scale * x) + log_mass.
struct LogitTransform {
  float scale = 1.0f;
  float softcap = 0.0f;

  /// In place over `count` values; `log_mass` [count] or null.
  void apply(float* x, const float* log_mass, u32 count) const noexcept {
    for (u32 t = 0; t < count; ++t) x[t] *= scale;
    if (softcap > 0.0f) {
      for (u32 t = 0; t < count; ++t) x[t] = softcap * std::tanh(x[t] / softcap);
    }
    if (log_mass != nullptr) {
      for (u32 t = 0; t < count; ++t) x[t] += log_mass[t];
    }
  }
};

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

/// Softmax in place over `count` logits; `sink` (or null) joins the denominator. NaN stays NaN and
/// is left out of the sum; +inf logits share the whole mass. Returns the log of the denominator,
/// -inf when it is empty. O(count).
inline float softmax(float* x, u32 count, const float* sink) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  float largest = max_logit(x, count);
  if (sink != nullptr && *sink > largest) largest = *sink;
  if (largest == inf || largest == -inf) {
    u32 infinite = sink != nullptr && *sink == inf ? 1 : 0;
    for (u32 t = 0; t < count; ++t) infinite += x[t] == inf ? 1 : 0;
    const float share = infinite != 0 ? 1.0f / static_cast<float>(infinite) : 0.0f;
    for (u32 t = 0; t < count; ++t) {
      if (x[t] == x[t]) x[t] = x[t] == inf ? share : 0.0f;
    }
    return largest;
  }
  double sum = sink != nullptr ? std::exp(static_cast<double>(*sink) - largest) : 0.0;
  for (u32 t = 0; t < count; ++t) {
    x[t] = std::exp(x[t] - largest);
    sum += x[t] == x[t] ? static_cast<double>(x[t]) : 0.0;
  }
  const float factor = static_cast<float>(1.0 / sum);
  for (u32 t = 0; t < count; ++t) x[t] *= factor;
  return static_cast<float>(largest + std::log(sum));
}

/// p = exp(logit - lse) in place, with the log-sum-exp that the engine computed. An lse of -inf
/// means that nothing was seen: zeros.
inline void exponentiate(float* x, u32 count, float lse) noexcept {
  if (lse == -std::numeric_limits<float>::infinity()) {
    for (u32 t = 0; t < count; ++t) x[t] = x[t] == x[t] ? 0.0f : x[t];
    return;
  }
  for (u32 t = 0; t < count; ++t) x[t] = std::exp(x[t] - lse);
}

}  // namespace detail
KVLEAN_NAMESPACE_END
