// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/config.cuh"

// Threads that work on one thing together: a warp, or a whole block. Both have the same face, so
// that integer work over the heads of a layer is written once.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

template <class T>
[[nodiscard]] KVLEAN_DEVICE T warp_sum(T value) noexcept {
#pragma unroll
  for (u32 step = warp_threads / 2; step != 0; step /= 2) {
    value += __shfl_xor_sync(full_warp, value, step);
  }
  return value;
}
template <class T>
[[nodiscard]] KVLEAN_DEVICE T warp_min(T value) noexcept {
#pragma unroll
  for (u32 step = warp_threads / 2; step != 0; step /= 2) {
    value = smaller(value, __shfl_xor_sync(full_warp, value, step));
  }
  return value;
}
/// Inclusive prefix sum over a warp.
template <class T>
[[nodiscard]] KVLEAN_DEVICE T warp_scan(T value) noexcept {
  const u32 lane = threadIdx.x % warp_threads;
#pragma unroll
  for (u32 step = 1; step < warp_threads; step *= 2) {
    const T other = __shfl_up_sync(full_warp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

/// The threads of one warp. All of them must make every call.
struct WarpTeam {
  [[nodiscard]] KVLEAN_DEVICE u32 rank() const noexcept { return threadIdx.x % warp_threads; }
  [[nodiscard]] KVLEAN_DEVICE u32 size() const noexcept { return warp_threads; }
  /// Also makes the team's writes to memory visible within the team.
  KVLEAN_DEVICE void sync() const noexcept { __syncwarp(); }
  template <class T>
  [[nodiscard]] KVLEAN_DEVICE T sum(T value) const noexcept {
    return warp_sum(value);
  }
  template <class T>
  [[nodiscard]] KVLEAN_DEVICE T min(T value) const noexcept {
    return warp_min(value);
  }
};

/// A block of at most 1024 threads; `scratch` is shared memory for 33 values.
struct BlockTeam {
  u64* scratch;

  [[nodiscard]] KVLEAN_DEVICE u32 rank() const noexcept { return threadIdx.x; }
  [[nodiscard]] KVLEAN_DEVICE u32 size() const noexcept { return blockDim.x; }
  KVLEAN_DEVICE void sync() const noexcept { __syncthreads(); }
  template <class T>
  [[nodiscard]] KVLEAN_DEVICE T sum(T value) const noexcept {
    return fold(value, T{0}, [](T a, T b) { return a + b; });
  }
  template <class T>
  [[nodiscard]] KVLEAN_DEVICE T min(T value) const noexcept {
    return fold(value, static_cast<T>(~T{0}), [](T a, T b) { return smaller(a, b); });
  }

 private:
  template <class T, class Operation>
  [[nodiscard]] KVLEAN_DEVICE T fold(T value, T neutral, Operation combine) const noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 warp = threadIdx.x / warp_threads;
#pragma unroll
    for (u32 step = warp_threads / 2; step != 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(full_warp, value, step));
    }
    __syncthreads();  // the scratch of an earlier call has been read
    if (lane == 0) scratch[warp] = static_cast<u64>(value);
    __syncthreads();
    if (warp == 0) {
      T part = lane < blockDim.x / warp_threads ? static_cast<T>(scratch[lane]) : neutral;
#pragma unroll
      for (u32 step = warp_threads / 2; step != 0; step /= 2) {
        part = combine(part, __shfl_xor_sync(full_warp, part, step));
      }
      if (lane == 0) scratch[warp_threads] = static_cast<u64>(part);
    }
    __syncthreads();
    return static_cast<T>(scratch[warp_threads]);
  }
};

/// Exclusive prefix sum over a block of `Threads`; `scratch` is shared memory for 33 values.
/// Returns the sum of all threads before this one; `total` is everybody's.
template <u32 Threads, class T>
[[nodiscard]] KVLEAN_DEVICE T block_scan(T value, T* scratch, T& total) noexcept {
  constexpr u32 warps = Threads / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 warp = threadIdx.x / warp_threads;
  const T inclusive = warp_scan(value);
  __syncthreads();  // the scratch of an earlier call has been read
  if (lane == warp_threads - 1) scratch[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const T part = lane < warps ? scratch[lane] : T{0};
    const T scanned = warp_scan(part);
    if (lane < warps) scratch[lane] = scanned - part;
    if (lane == warps - 1) scratch[warp_threads] = scanned;
  }
  __syncthreads();
  total = scratch[warp_threads];
  return scratch[warp] + inclusive - value;
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
