// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/launch.cuh"

// Blocks that run together and read each other's shared memory (compute capability 9.0). Code for
// older devices compiles and is never launched.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

/// Whether this translation unit has code for clusters that the current device can run: built for
/// an architecture from 9.0 up to the device's, of the same major version.
[[nodiscard]] inline bool runs_clusters() noexcept {
#if defined(__CUDA_ARCH_LIST__)
  constexpr int built_for[] = {__CUDA_ARCH_LIST__};
#else
  constexpr int built_for[] = {900};
#endif
  const int device = compute_capability() * 10;
  for (const int arch : built_for) {
    if (arch >= 900 && arch <= device && arch / 100 == device / 100) return true;
  }
  return false;
}

#if defined(KVLEAN_CUDA_EMULATION)
// A host that runs kernels for tests brings its own.
using ::emu::cluster_rank;
using ::emu::cluster_sync;
using ::emu::dynamic_shared;
using ::emu::of_rank;
#else
[[nodiscard]] KVLEAN_DEVICE u32 cluster_rank() noexcept {
  u32 rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
/// A barrier over all threads of the cluster; what they wrote to shared memory can then be read.
KVLEAN_DEVICE void cluster_sync() noexcept {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// Where `place`, in this block's shared memory, is in that of the cluster's block `rank`.
template <class T>
[[nodiscard]] KVLEAN_DEVICE const T* of_rank(const T* place, u32 rank) noexcept {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  u64 mapped = 0;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(place), "r"(rank));
  return reinterpret_cast<const T*>(mapped);
#else
  static_cast<void>(rank);
  return place;
#endif
}
/// The block's dynamic shared memory.
template <class T>
[[nodiscard]] KVLEAN_DEVICE T* dynamic_shared() noexcept {
  extern __shared__ uint4 kvlean_dynamic_shared[];
  return reinterpret_cast<T*>(kvlean_dynamic_shared);
}
#endif

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
