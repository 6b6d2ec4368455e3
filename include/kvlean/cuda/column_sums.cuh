// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/row_sums.cuh"

// Second pass: what every key received from the queries that see it. A warp keeps its keys in
// registers while the queries of the group stream by, so a column of the attention matrix is summed
// by one lane in a fixed order and nothing of its size is ever stored.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

struct ColumnSumShape {
  float* totals = nullptr;  ///< [segments][heads_written][stride]
  u64 stride = 0;
  bool per_head = false;  ///< a total for each query head of the group, else one for all
  float factor = 1.0f;
  bool add = false;  ///< to what is there
  u32 stages = 2;    ///< query tiles in shared memory, 2 or 4
};

/// Blocks (key tiles or fewer, segment); a block takes every gridDim.x-th tile.
template <class E, u32 Width, u32 Tiles, bool Capped>
__global__ void __launch_bounds__(mass_threads, 3)
    column_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                       const LogitSpec logits, const RowTotals totals, const ColumnSumShape shape) {
  constexpr u32 block_keys = mass_warps * Tiles * 16;
  extern __shared__ __align__(128) char shared[];
  __shared__ const char* address[ring][tile_rows];
  __shared__ float shift[ring][tile_rows];  // minus the log2 of the row's sum
  __shared__ i32 first_seen[ring][tile_rows];
  __shared__ i32 last_seen[ring][tile_rows];

  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u64 totals_at = s * totals.row_stride;
  bool resident = false;

  for (u32 first_key = blockIdx.x * block_keys; first_key < length;
       first_key += gridDim.x * block_keys) {
    const u32 last_key = smaller(first_key + block_keys, length) - 1;
    // The queries that see any of these keys, in whole octets so that one belongs to one head.
    u32 first_query = 0;
    u32 last_query = own.count;
    if (shape.stages * tile_rows < own.count * cache.group_size) {
      if (own.causal) first_query = own.queries_before(segment.position(first_key));
      if (own.window != 0) {
        const i64 past = static_cast<i64>(segment.position(last_key)) + own.window;
        if (past < unseen_position) last_query = own.queries_before(static_cast<i32>(past));
      }
    }
    const u32 span = last_query > first_query ? ceil_div(last_query - first_query, 8u) * 8 : 0;
    const u32 rows = span * cache.group_size;
    const u32 tiles = ceil_div(rows, tile_rows);

    const u32 warp_key = first_key + warp * Tiles * 16;
    RowFragments<Width, Tiles> fragments;
    fragments.load(
        [&](u32 r) noexcept { return segment.key_row(smaller(warp_key + r, length - 1)); });
    i32 key_position[Tiles][2];
    float bias[Tiles][2];
    float total[Tiles][2] = {};
    i32 least_position = unseen_position;
    i32 most_position = -unseen_position;
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 key = smaller(warp_key + m * 16 + half * 8 + lane / 4, length - 1);
        key_position[m][half] = segment.position(key);
        bias[m][half] = segment.mass_bias(key) * log2_e;
        least_position = smaller(least_position, key_position[m][half]);
        most_position = larger(most_position, key_position[m][half]);
      }
    }
    least_position = -max_lanes<32>(-least_position);
    most_position = max_lanes<32>(most_position);

    // What a tile's rows are is looked up two tiles ahead by 64 threads, the copies start one
    // ahead.
    struct Row {
      const char* address;
      float shift;
      i32 first;
      i32 last;
    };
    const auto look_up = [&](u32 tile) noexcept {
      Row row{nullptr, -INFINITY, unseen_position, -unseen_position};
      if (threadIdx.x >= tile_rows || tile >= tiles) return row;
      const u32 at_row = tile * tile_rows + threadIdx.x;
      const u32 head = at_row / span;
      const u32 query = first_query + at_row % span;
      if (head >= cache.group_size || query >= last_query) return row;
      row.address = own.row(head, query);
      row.first = own.first_seen(query);
      row.last = own.last_seen(query);
      const u64 at = totals_at + head * own.count + query;
      const float log2_sum = totals.log2_sum[at];
      row.shift = log2_sum == -INFINITY ? 0.0f : -log2_sum;
      // Infinities share the mass: marked by NaN, which no finite row has.
      if (log2_sum == INFINITY && totals.share[at] != 0.0f) row.shift = NAN;
      return row;
    };
    const auto keep = [&](u32 tile, const Row& row) noexcept {
      if (threadIdx.x >= tile_rows) return;
      address[tile % ring][threadIdx.x] = row.address;
      shift[tile % ring][threadIdx.x] = row.shift;
      first_seen[tile % ring][threadIdx.x] = row.first;
      last_seen[tile % ring][threadIdx.x] = row.last;
    };
    const auto fetch = [&](u32 tile) noexcept {
      fill_tile<Width>(shared_address(shared) + tile % shape.stages * SharedTile<Width>::bytes,
                       address[tile % ring]);
      commit_copies();
    };
    const auto write = [&](u32 head) noexcept {
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          float sum = total[m][half];
          sum += __shfl_xor_sync(full_warp, sum, 1);
          sum += __shfl_xor_sync(full_warp, sum, 2);
          total[m][half] = 0.0f;
          const u32 key = warp_key + m * 16 + half * 8 + lane / 4;
          if (lane % 4 != 0 || key >= length) continue;
          const u32 heads = shape.per_head ? cache.group_size : 1;
          float* to = shape.totals + (static_cast<u64>(s) * heads + head) * shape.stride + key;
          *to = shape.add ? *to + sum * shape.factor : sum * shape.factor;
        }
      }
    };

    const bool fits = tiles <= shape.stages;
    if (!resident) {
      const u32 known = fits ? tiles : 2;
      for (u32 tile = 0; tile < known; ++tile) keep(tile, look_up(tile));
      __syncthreads();
      for (u32 tile = 0; tile < (fits ? tiles : 1); ++tile) fetch(tile);
      // Only queries that don't depend on the keys may stay for the next ones.
      resident = fits && shape.stages * tile_rows >= own.count * cache.group_size;
      if (fits) {
        wait_for_copies<0>();
        __syncthreads();
      }
    }
    u32 head = 0;
    for (u32 tile = 0; tile < tiles; ++tile) {
      const u32 stage = tile % ring;
      Row coming{};
      if (!fits) {
        if (tile + 1 < tiles) {
          fetch(tile + 1);
          wait_for_copies<1>();
        } else {
          wait_for_copies<0>();
        }
        __syncthreads();
        coming = look_up(tile + 2);
      }
      const char* from = shared + tile % shape.stages * SharedTile<Width>::bytes;
#pragma unroll 1
      for (u32 pair = 0; pair < tile_rows / 16; ++pair) {
        const u32 pair_row = tile * tile_rows + pair * 16;
        if (pair_row >= rows) break;
        float product[Tiles][2][4];
        multiply_pair<E>(fragments, from, pair, product);
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
          const u32 column = pair * 16 + n * 8 + lane % 4 * 2;
          const u32 octet = pair_row + n * 8;
          if (shape.per_head && octet < rows && octet / span != head) {
            write(head);
            head = octet / span;
          }
          const float2 minus = *reinterpret_cast<const float2*>(&shift[stage][column]);
          const int2 from_position = *reinterpret_cast<const int2*>(&first_seen[stage][column]);
          const int2 to_position = *reinterpret_cast<const int2*>(&last_seen[stage][column]);
          const bool all_seen = __all_sync(
              full_warp, smaller(to_position.x, to_position.y) >= most_position &&
                             larger(from_position.x, from_position.y) <= least_position &&
                             minus.x == minus.x && minus.y == minus.y);
#pragma unroll
          for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
              const float b = bias[m][half];
              float p0;
              float p1;
              if (all_seen) {
                p0 = exp2_approximate(
                    logits.template exponent<Capped>(product[m][n][half * 2], b + minus.x));
                p1 = exp2_approximate(
                    logits.template exponent<Capped>(product[m][n][half * 2 + 1], b + minus.y));
              } else {
                const float x0 = logits.template exponent<Capped>(product[m][n][half * 2], b);
                const float x1 = logits.template exponent<Capped>(product[m][n][half * 2 + 1], b);
                const auto received = [&](float x, float shifted, u32 j) noexcept {
                  if (shifted == shifted) return exp2_approximate(x + shifted);
                  const u32 row = tile * tile_rows + column + j;
                  const u64 at = totals_at + row / span * own.count + first_query + row % span;
                  return x != x ? x : x == INFINITY ? totals.share[at] : 0.0f;
                };
                const i32 key = key_position[m][half];
                p0 = key > to_position.x || key < from_position.x ? 0.0f : received(x0, minus.x, 0);
                p1 = key > to_position.y || key < from_position.y ? 0.0f : received(x1, minus.y, 1);
              }
              total[m][half] += p0 + p1;
            }
          }
        }
      }
      if (!fits) {
        keep(tile + 2, coming);
        __syncthreads();
      }
    }
    if (shape.per_head && tiles == 0) {
      for (u32 h = 0; h < cache.group_size; ++h) write(h);
    } else {
      write(head);
    }
    if (fits && !resident) __syncthreads();  // the next keys bring other queries
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
