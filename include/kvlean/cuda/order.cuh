// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/budget.hpp"
#include "kvlean/cuda/config.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

// The device's copies of short functions of core/: those are host functions unless the caller
// compiles with --expt-relaxed-constexpr, which is not asked of anybody. tests/cuda/test_select.cu
// holds them equal.

/// score_key() of core/order.hpp: the same order as the scores, NaN 0, -0 equals +0.
[[nodiscard]] KVLEAN_DEVICE u32 device_score_key(float score) noexcept {
  const u32 bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
/// token_key() of core/order.hpp.
[[nodiscard]] KVLEAN_DEVICE u64 device_token_key(float score, u32 token) noexcept {
  const u32 key = device_score_key(score);
  return static_cast<u64>(key) << 32 | (key == 0 ? token : ~token);
}

/// The protected tokens of a segment as two ranges: [0, front) and [back, length).
struct ProtectedRange {
  u32 front = 0;
  u32 back = 0;

  /// As Protection::covers() and count() have it: the two ends may meet.
  [[nodiscard]] static KVLEAN_HOST_DEVICE ProtectedRange of(const Protection& protection,
                                                            u32 length, u32 frozen) noexcept {
    ProtectedRange range;
    range.front = smaller(larger(protection.sinks, frozen), length);
    range.back = larger(range.front, length - smaller(protection.recent, length));
    return range;
  }
  [[nodiscard]] KVLEAN_HOST_DEVICE bool covers(u32 token) const noexcept {
    return token < front || token >= back;
  }
  /// Tokens that are not protected.
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 candidates() const noexcept { return back - front; }
  [[nodiscard]] KVLEAN_HOST_DEVICE u32 count(u32 length) const noexcept {
    return length - candidates();
  }
};

KVLEAN_CUDA_NAMESPACE_END
