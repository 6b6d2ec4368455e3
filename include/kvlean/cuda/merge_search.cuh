// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"
#include "kvlean/cuda/merge_nearest.cuh"

// search_nearest() by tensor cores, for 16-bit keys 64, 96, 128 or 256 wide: dropped keys stay in
// registers, slots' keys stream through shared memory. Tensor cores add in an order of their own,
// so they only propose: each lane keeps its two best slots and the third best product, and those
// within twice the error of the best are computed as the CPU does. A token whose third best product
// of a lane is as near is left to search_nearest().

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

template <u32 Width>
inline constexpr u32 tile_search_tiles = Width <= 128 ? 2 : 1;
template <u32 Width>
inline constexpr u32 tile_search_rows = mass_warps * 16 * tile_search_tiles<Width>;

/// What a product of a row with a unit row and the CPU's product of unit rows may be apart, twice,
/// over the row's length. Tensor cores: at most 18 truncations at 2^-23 of the largest a step of
/// 16; the CPU: width / 16 + 9 roundings.
template <u32 Width>
inline constexpr float tile_search_margin = static_cast<float>(5 * Width + 32) * 0x1p-24f;

/// The largest products of a row among a lane's slots.
struct LaneBest {
  float value[2];
  u32 slot[2];
  float third;

  KVLEAN_DEVICE void clear() noexcept {
    value[0] = value[1] = third = -INFINITY;
    slot[0] = slot[1] = no_slot;
  }
  KVLEAN_DEVICE void add(float x, u32 at) noexcept {
    if (!(x > third)) return;  // NaN neither
    if (!(x > value[1])) {
      third = x;
      return;
    }
    third = value[1];
    const bool leads = x > value[0];
    value[1] = leads ? value[0] : x;
    slot[1] = leads ? slot[0] : at;
    value[0] = leads ? x : value[0];
    slot[0] = leads ? at : slot[0];
  }
};

/// The CPU's product of the unit keys of two tokens, by four neighbouring lanes. The whole warp
/// calls, each four for their own.
template <DType D, u32 Width>
[[nodiscard]] KVLEAN_DEVICE float unit_product(const Segment& segment, u32 token, float factor,
                                               u32 other, float other_factor) noexcept {
  using E = Storage<D>;
  const u32 lane = threadIdx.x % 4;
  const char* a = segment.key_row(token) + lane * 8;
  const char* b = segment.key_row(other) + lane * 8;
  float sum[4] = {};
#pragma unroll 4
  for (u32 at = 0; at < Width * sizeof(E); at += 32) {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(a + at));
    const uint2 y = __ldg(reinterpret_cast<const uint2*>(b + at));
    float left[8];
    float right[8];
    unpack<D>(uint4{x.x, x.y, 0, 0}, left);
    unpack<D>(uint4{y.x, y.y, 0, 0}, right);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      sum[i] = __fadd_rn(sum[i],
                         __fmul_rn(__fmul_rn(left[i], factor), __fmul_rn(right[i], other_factor)));
    }
  }
  const float product = fold_lanes<4>(sum);
  return factor != 0.0f && other_factor != 0.0f ? product : 0.0f;
}

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
  if (work.has_extreme[s] != 0) {
    const u32 here = smaller(count - first, tile_search_rows<Width>);
    __shared__ u32 begin;
    if (threadIdx.x == 0) begin = atomicAdd(work.num_unsettled + s, here);
    __syncthreads();
    for (u32 i = threadIdx.x; i < here; i += mass_threads) work.unsettled(s)[begin + i] = first + i;
    return;
  }
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
  // One index only: nvcc 13.0 zeroes all but the first row of a two-dimensional array of a class
  // with initialisers of its own.
  LaneBest best[Tiles * 2];
#pragma unroll
  for (u32 i = 0; i < Tiles * 2; ++i) best[i].clear();
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
            LaneBest& top = best[m * 2 + half];
            if (!(fmaxf(left, right) > top.third)) continue;
            top.add(left, first_slot + column);
            top.add(right, first_slot + column + 1);
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
      const LaneBest& top = best[m * 2 + half];
      const u32 i = first_of_warp + m * 16 + half * 8 + lane / 4;
      const u32 token = dropped[smaller(i, count - 1)];
      const float factor = inverse_norm[token];
      const float largest = max_lanes<4>(top.value[0]);
      const float least = largest - tile_search_margin<Width> / factor;  // -inf: factor is 0
      const u32 first_lane = lane / 4 * 4;
      const auto of_row = [&](bool flag) noexcept {
        return __ballot_sync(full_warp, flag) >> first_lane & 15;
      };
      // A zero or broken key needs no comparison: store_nearest() knows.
      const bool compares = i < count && factor != 0.0f;
      const bool crowded = of_row(compares && top.third >= least) != 0;
      u32 pending = of_row(compares && !crowded && top.value[0] >= least) |
                    of_row(compares && !crowded && top.value[1] >= least) << 4;
      if (tiles == 0) pending = 0;
      Best found;
      while (__any_sync(full_warp, pending != 0)) {
        const u32 bit = pending != 0 ? static_cast<u32>(__ffs(pending)) - 1 : 0;
        const u32 slot_a = __shfl_sync(full_warp, top.slot[0], first_lane + bit % 4);
        const u32 slot_b = __shfl_sync(full_warp, top.slot[1], first_lane + bit % 4);
        const u32 slot = bit < 4 ? slot_a : slot_b;
        const u32 other = pending != 0 ? anchor[slot] : token;
        const float product =
            unit_product<D, Width>(segment, token, factor, other, inverse_norm[other]);
        if (pending != 0) found.add(Best{product, slot});
        pending &= pending - 1;
      }
      if (lane % 4 != 0 || i >= count) continue;
      if (crowded) {
        work.unsettled(s)[atomicAdd(work.num_unsettled + s, 1u)] = i;
      } else {
        store_nearest(work, s, i, token, found, receivers);
      }
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
