// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Maps a score to an unsigned key with the same order; NaN maps to 0, below everything, and -0
/// equals +0. Infinities keep their place.
[[nodiscard]] constexpr u32 score_key(float score) noexcept {
  const u32 bits = std::bit_cast<u32>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// One key for the total order within a segment: larger is better. Score descending, then token
/// ascending; among NaN scores the newest token first, so that a segment without any usable score
/// keeps its newest tokens.
[[nodiscard]] constexpr u64 token_key(float score, u32 token) noexcept {
  const u32 key = score_key(score);
  return static_cast<u64>(key) << 32 | (key == 0 ? token : ~token);
}

/// The token of a token_key.
[[nodiscard]] constexpr u32 token_of_key(u64 key) noexcept {
  const u32 low = static_cast<u32>(key);
  return (key >> 32) == 0 ? low : ~low;
}

KVLEAN_NAMESPACE_END
