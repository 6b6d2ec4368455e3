// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/config.hpp"

// The row arithmetic that every stage is written in. Plain loops over a fixed number of lanes: the
// compiler vectorises them at any baseline without -ffast-math, and the order of additions, hence
// the bits of the result, does not depend on the machine.

KVLEAN_NAMESPACE_BEGIN
namespace row_math {

inline constexpr u32 lanes = 16;

/// Adds the lanes pairwise, always in the same order.
[[nodiscard]] inline float sum_lanes(const float (&lane)[lanes]) noexcept {
  float folded[lanes / 2];
  for (u32 i = 0; i < 8; ++i) folded[i] = lane[i] + lane[i + 8];
  for (u32 i = 0; i < 4; ++i) folded[i] += folded[i + 4];
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}

[[nodiscard]] inline float dot(const float* a, const float* b, u32 width) noexcept {
  float lane[lanes] = {};
  u32 i = 0;
  for (; i + lanes <= width; i += lanes) {
    for (u32 j = 0; j < lanes; ++j) lane[j] += a[i + j] * b[i + j];
  }
  for (u32 j = 0; i < width; ++i, ++j) lane[j] += a[i] * b[i];
  return sum_lanes(lane);
}

[[nodiscard]] inline float squared_norm(const float* a, u32 width) noexcept {
  return dot(a, a, width);
}

[[nodiscard]] inline float squared_distance(const float* a, const float* b, u32 width) noexcept {
  float lane[lanes] = {};
  u32 i = 0;
  for (; i + lanes <= width; i += lanes) {
    for (u32 j = 0; j < lanes; ++j) {
      const float difference = a[i + j] - b[i + j];
      lane[j] += difference * difference;
    }
  }
  for (u32 j = 0; i < width; ++i, ++j) {
    const float difference = a[i] - b[i];
    lane[j] += difference * difference;
  }
  return sum_lanes(lane);
}

/// y += factor * x
inline void add_scaled(float* y, const float* x, float factor, u32 width) noexcept {
  for (u32 i = 0; i < width; ++i) y[i] += factor * x[i];
}

/// y *= factor
inline void scale(float* y, float factor, u32 width) noexcept {
  for (u32 i = 0; i < width; ++i) y[i] *= factor;
}

}  // namespace row_math
KVLEAN_NAMESPACE_END
