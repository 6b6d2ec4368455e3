// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"
#include "kvlean/cuda/merge_nearest.cuh"

// search_nearest() by tensor cores, for 16-bit keys 64, 96, 128 or 256 wide: dropped keys stay in
// registers, slots' keys stream through shared memory.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

template <u32 Width>
inline constexpr u32 tile_search_tiles = Width <= 128 ? 2 : 1;
template <u32 Width>
inline constexpr u32 tile_search_rows = mass_warps * 16 * tile_search_tiles<Width>;

template <DType D, u32 Width>
__global__ void __launch_bounds__(mass_threads)
    search_nearest_tiles(const NearestWork work, u32 blocks) {
  using E = Storage<D>;
  constexpr u32 Tiles = tile_search_tiles<Width>;
  extern __shared__ uint4 merge_search_tiles[];
  __shared__ const char* rows[ring][tile_rows];
  alignas(16) __shared__ float inverse[ring][tile_rows];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 first = blockIdx.x % blocks * tile_search_rows<Width>;
  const u32 count = work.num_dropped[s];
  if (first >= count) return;
  const Segment segment = work.cache.segments[s];
  const u32* dropped = work.dropped + s * work.stride;
  const u32* anchor = work.plan.anchor + work.plan.slot(s, 0);
  const float* inverse_norm = work.inverse_norm + s * work.stride;
  const NearestWork::Receivers receivers = work.receivers(s);
  const u32 lane = threadIdx.x % warp_threads;
  const u32 first_of_warp = first + threadIdx.x / warp_threads * 16 * Tiles;
  RowFragments<Width, Tiles> mine;
  mine.load([&](u32 r) {
    return static_cast<const char*>(
        segment.key_row(dropped[smaller(first_of_warp + r, count - 1)]));
  });
  // Rows beyond the last slot are zero and their factor NaN, so that they never win.
  const auto describe_tile = [&](u32 n) {
    if (threadIdx.x >= tile_rows) return;
    const u32 slot = receivers.first + n * tile_rows + threadIdx.x;
    const char* row = nullptr;
    float factor = __int_as_float(0x7fc00000);
    if (slot < receivers.end) {
      const u32 token = anchor[slot];
      factor = inverse_norm[token];
      if (factor != 0.0f) row = segment.key_row(token);
    }
    rows[n % ring][threadIdx.x] = row;
    inverse[n % ring][threadIdx.x] = factor;
  };
  const u32 shared = shared_address(merge_search_tiles);
  const u32 tiles = ceil_div(receivers.end - receivers.first, tile_rows);
  Best best[Tiles][2];
  describe_tile(0);
  describe_tile(1);
  __syncthreads();
  if (tiles != 0) fill_tile<Width>(shared, rows[0]);
  commit_copies();
  for (u32 n = 0; n < tiles; ++n) {
    if (n + 1 < tiles) {
      fill_tile<Width>(shared + (n + 1) % 2 * SharedTile<Width>::bytes, rows[(n + 1) % ring]);
    }
    commit_copies();
    wait_for_copies<1>();
    describe_tile(n + 2);
    __syncthreads();
    const char* tile =
        reinterpret_cast<const char*>(merge_search_tiles) + n % 2 * SharedTile<Width>::bytes;
    const u32 first_slot = receivers.first + n * tile_rows;
#pragma unroll
    for (u32 pair = 0; pair < tile_rows / 16; ++pair) {
      float sums[Tiles][2][4];
      multiply_pair<E, Width, Tiles>(mine, tile, pair, sums);
#pragma unroll
      for (u32 k = 0; k < 2; ++k) {
        const u32 column = pair * 16 + k * 8 + lane % 4 * 2;
        const float2 factor = *reinterpret_cast<const float2*>(&inverse[n % ring][column]);
#pragma unroll
        for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            const float left = sums[m][k][2 * half] * factor.x;
            const float right = sums[m][k][2 * half + 1] * factor.y;
            Best& top = best[m][half];
            if (left > top.value) top = Best{left, first_slot + column};
            if (right > top.value) top = Best{right, first_slot + column + 1};
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      Best top = best[m][half];
#pragma unroll
      for (u32 step = 1; step < 4; step *= 2) {
        top.add(Best{__shfl_xor_sync(full_warp, top.value, step),
                     __shfl_xor_sync(full_warp, top.slot, step)});
      }
      const u32 i = first_of_warp + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && i < count) store_nearest(work, s, i, dropped[i], top, receivers);
    }
  }
}

/// Launches it. Only for widths that has_tile_search() takes.
[[nodiscard]] constexpr bool has_tile_search(DType dtype, u32 width) noexcept {
  return dtype != DType::f32 && (width == 64 || width == 96 || width == 128 || width == 256);
}
template <DType D, u32 Width>
[[nodiscard]] Status run_tile_search(KernelChain& chain, const NearestWork& work) noexcept {
  const u32 blocks = ceil_div(larger(work.cache.max_tokens, 1u), tile_search_rows<Width>);
  const std::size_t bytes = 2 * SharedTile<Width>::bytes;
  KVLEAN_RETURN_IF_ERROR(raise_shared_bytes(search_nearest_tiles<D, Width>, bytes));
  return chain.run_shared(u64{work.cache.num_segments()} * blocks, mass_threads, bytes,
                          search_nearest_tiles<D, Width>, work, blocks);
}
template <DType D>
[[nodiscard]] Status run_tile_search(KernelChain& chain, const NearestWork& work) noexcept {
  switch (work.cache.key_width) {
    case 64:
      return run_tile_search<D, 64>(chain, work);
    case 96:
      return run_tile_search<D, 96>(chain, work);
    case 128:
      return run_tile_search<D, 128>(chain, work);
    default:
      return run_tile_search<D, 256>(chain, work);
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
