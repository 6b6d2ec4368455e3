// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Counter-based uniform draw in [0, 1): a pure function of its arguments, so the same token gets
/// the same draw on any backend, thread count and order. SplitMix64 finaliser chained over the
/// counters.
[[nodiscard]] constexpr float draw(u64 seed, u32 layer, u32 head, i32 position,
                                   u32 step = 0) noexcept {
  const auto mix = [](u64 z) constexpr noexcept {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  u64 state = mix(seed);
  state = mix(state ^ (static_cast<u64>(layer) << 32 | head));
  state = mix(state ^ (static_cast<u64>(static_cast<u32>(position)) << 32 | step));
  return static_cast<float>(state >> 40) * 0x1p-24f;
}

KVLEAN_NAMESPACE_END
