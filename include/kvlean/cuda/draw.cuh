// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/config.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// draw() of core/random.hpp for the device; tests hold them equal.
[[nodiscard]] KVLEAN_DEVICE float device_draw(u64 seed, u32 layer, u32 head, i32 position,
                                              u32 step) noexcept {
  const auto mix = [](u64 z) noexcept {
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

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
