// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"
#include "kvlean/cuda/launch.cuh"

// First pass: the log-sum-exp of every query row over the keys that it sees.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// What the passes leave for each other, per segment and row (row = head in group * count + query).
struct RowTotals {
  float* log2_sum = nullptr;  ///< [segments][row_stride]
  float* share = nullptr;     ///< [segments][row_stride] what an infinite logit gets; 0: none is
  u64 row_stride = 0;
};

struct RowSumShape {
  u32 splits = 1;           ///< parts of the keys, each by blocks of its own
  RowSum* parts = nullptr;  ///< [segments][splits][row_stride], null: one split
};

/// Which keys a block's rows see: tokens [begin, end), and how tight that is.
struct SeenRange {
  u32 begin = 0;
  u32 end = 0;
  i32 least_last = 0;  ///< keys up to here are seen by every row ..
  i32 most_first = 0;  ///< .. from here on
};

/// Called by all threads, thread r with the limits of row r (or with an empty range).
[[nodiscard]] KVLEAN_DEVICE SeenRange seen_range(const Segment& segment, u32 length, bool has_row,
                                                 i32 first, i32 last) noexcept {
  __shared__ i32 limit[4];
  if (threadIdx.x == 0) {
    limit[0] = 0x7fffffff;   // least first
    limit[1] = -0x7fffffff;  // most last
    limit[2] = 0x7fffffff;   // least last
    limit[3] = -0x7fffffff;  // most first
  }
  __syncthreads();
  if (has_row) {
    atomicMin(&limit[0], first);
    atomicMax(&limit[1], last);
    atomicMin(&limit[2], last);
    atomicMax(&limit[3], first);
  }
  __syncthreads();
  SeenRange range;
  range.begin = tokens_before(segment, length, limit[0]);
  range.end = limit[1] == 0x7fffffff ? length : tokens_before(segment, length, limit[1] + 1);
  range.begin = smaller(range.begin, range.end);
  range.least_last = limit[2];
  range.most_first = limit[3];
  __syncthreads();
  return range;
}

KVLEAN_DEVICE void write_row_sum(const RowSum& sum, const float* sinks, u32 head, u64 at,
                                 const RowTotals& totals) noexcept {
  RowSum all = sum;
  if (sinks != nullptr) {
    const float sink = sinks[head] * log2_e;
    if (sink == sink) all.add(RowSum{sink, 1.0f});
  }
  totals.log2_sum[at] = all.log2_sum();
  totals.share[at] = all.largest == INFINITY ? 1.0f / all.sum : 0.0f;
}

/// Blocks (row tile * splits + split, segment). 16 * Tiles rows a warp.
template <class E, u32 Width, u32 Tiles, bool Capped>
__global__ void __launch_bounds__(mass_threads, 3)
    row_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                    const LogitSpec logits, const RowTotals totals, const RowSumShape shape) {
  constexpr u32 block_rows = mass_warps * Tiles * 16;
  extern __shared__ __align__(128) char shared[];
  __shared__ const char* address[ring][tile_rows];
  __shared__ float bias[ring][tile_rows];
  __shared__ i32 key_position[ring][tile_rows];

  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 rows = own.count * cache.group_size;
  const u32 first_row = blockIdx.x / shape.splits * block_rows;
  const u32 split = blockIdx.x % shape.splits;
  if (first_row >= rows) return;

  const u32 my_row = first_row + threadIdx.x;
  const bool has_row = threadIdx.x < block_rows && my_row < rows;
  const u32 my_query = has_row ? my_row % own.count : 0;
  const SeenRange seen =
      seen_range(segment, length, has_row, own.first_seen(my_query), own.last_seen(my_query));
  const u32 tiles = ceil_div(seen.end - seen.begin, tile_rows);
  const u32 each = ceil_div(tiles, shape.splits);
  const u32 begin = seen.begin + smaller(split * each, tiles) * tile_rows;
  const u32 end = smaller(seen.begin + smaller((split + 1) * each, tiles) * tile_rows, seen.end);

  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 warp_row = first_row + warp * Tiles * 16;
  RowFragments<Width, Tiles> fragments;
  fragments.load([&](u32 r) noexcept {
    const u32 row = smaller(warp_row + r, rows - 1);
    return own.row(row / own.count, row % own.count);
  });
  i32 first_seen[Tiles][2];
  i32 last_seen[Tiles][2];
  RowSum sum[Tiles][2];
#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 query = smaller(warp_row + m * 16 + half * 8 + lane / 4, rows - 1) % own.count;
      first_seen[m][half] = own.first_seen(query);
      last_seen[m][half] = own.last_seen(query);
    }
  }

  // What a tile's rows are is looked up two tiles ahead by 64 threads, the copies start one ahead.
  struct Row {
    const char* address;
    float bias;
    i32 position;
  };
  const auto look_up = [&](u32 tile) noexcept {
    const u32 t = begin + tile * tile_rows + threadIdx.x;
    Row row{nullptr, 0.0f, unseen_position};
    if (threadIdx.x < tile_rows && t < end) {
      row = Row{segment.key_row(t), segment.mass_bias(t) * log2_e, segment.position(t)};
    }
    return row;
  };
  const auto keep = [&](u32 tile, const Row& row) noexcept {
    if (threadIdx.x >= tile_rows) return;
    address[tile % ring][threadIdx.x] = row.address;
    bias[tile % ring][threadIdx.x] = row.bias;
    key_position[tile % ring][threadIdx.x] = row.position;
  };
  const auto fetch = [&](u32 tile) noexcept {
    fill_tile<Width>(shared_address(shared) + tile % 2 * SharedTile<Width>::bytes,
                     address[tile % ring]);
    commit_copies();
  };
  const u32 own_tiles = begin < end ? ceil_div(end - begin, tile_rows) : 0;
  keep(0, look_up(0));
  keep(1, look_up(1));
  __syncthreads();
  if (own_tiles != 0) fetch(0);
  for (u32 i = 0; i < own_tiles; ++i) {
    if (i + 1 < own_tiles) {
      fetch(i + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const Row coming = look_up(i + 2);
    const u32 stage = i % ring;
    const char* tile = shared + i % 2 * SharedTile<Width>::bytes;
    const bool whole = key_position[stage][tile_rows - 1] <= seen.least_last &&
                       key_position[stage][0] >= seen.most_first;
    // 32 keys at a time: their exponents stay in registers until the row's maximum is known.
#pragma unroll 1
    for (u32 part = 0; part < tile_rows / 32; ++part) {
      float x[Tiles][2][8];
#pragma unroll
      for (u32 pair = 0; pair < 2; ++pair) {
        float product[Tiles][2][4];
        multiply_pair<E>(fragments, tile, part * 2 + pair, product);
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
          const u32 column = part * 32 + pair * 16 + n * 8 + lane % 4 * 2;
          const float2 b = *reinterpret_cast<const float2*>(&bias[stage][column]);
          const int2 at = *reinterpret_cast<const int2*>(&key_position[stage][column]);
#pragma unroll
          for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
              float& x0 = x[m][half][pair * 4 + n * 2];
              float& x1 = x[m][half][pair * 4 + n * 2 + 1];
              x0 = logits.template exponent<Capped>(product[m][n][half * 2], b.x);
              x1 = logits.template exponent<Capped>(product[m][n][half * 2 + 1], b.y);
              if (!whole) {
                if (at.x > last_seen[m][half] || at.x < first_seen[m][half]) x0 = -INFINITY;
                if (at.y > last_seen[m][half] || at.y < first_seen[m][half]) x1 = -INFINITY;
              }
            }
          }
        }
      }
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) sum[m][half].add(x[m][half]);
      }
    }
    keep(i + 2, coming);
    __syncthreads();
  }

#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      RowSum& mine = sum[m][half];
#pragma unroll
      for (u32 step = 1; step < 4; step *= 2) {
        mine.join_across(step, (lane & step) == 0);
      }
      const u32 row = warp_row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 != 0 || row >= rows) continue;
      if (shape.parts != nullptr) {
        shape.parts[(static_cast<u64>(s) * shape.splits + split) * totals.row_stride + row] = mine;
      } else {
        const u32 query_heads = cache.kv_heads * cache.group_size;
        write_row_sum(mine,
                      attention.sink_logits != nullptr
                          ? attention.sink_logits + cache.layer_of(s) * query_heads
                          : nullptr,
                      cache.head_of(s) * cache.group_size + row / own.count,
                      s * totals.row_stride + row, totals);
      }
    }
  }
}

/// Joins the parts of split keys. Blocks (rows / threads, segment).
template <int = 0>
__global__ void join_row_sums_kernel(const CacheView cache, const Queries queries,
                                     const Attention attention, const RowTotals totals,
                                     const RowSumShape shape) {
  const u32 s = blockIdx.y;
  const u32 count = SegmentQueries::of(cache, queries, attention, s, cache.lengths[s]).count;
  const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= count * cache.group_size) return;
  RowSum all;
  for (u32 split = 0; split < shape.splits; ++split) {
    all.add(shape.parts[(static_cast<u64>(s) * shape.splits + split) * totals.row_stride + row]);
  }
  const u32 query_heads = cache.kv_heads * cache.group_size;
  write_row_sum(
      all,
      attention.sink_logits != nullptr ? attention.sink_logits + cache.layer_of(s) * query_heads
                                       : nullptr,
      cache.head_of(s) * cache.group_size + row / count, s * totals.row_stride + row, totals);
}

/// The same from log-sum-exps that the engine already has.
template <int = 0>
__global__ void given_row_sums_kernel(const CacheView cache, const Queries queries,
                                      const RowTotals totals) {
  const u32 s = blockIdx.y;
  const SegmentQueries own = SegmentQueries::of(cache, queries, {}, s, cache.lengths[s]);
  const u32 count = own.count;
  const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= count * cache.group_size) return;
  const u64 head = static_cast<u64>(s) * cache.group_size + row / count;
  totals.log2_sum[s * totals.row_stride + row] =
      queries.lse[head * queries.count + own.skipped + row % count] * log2_e;
  totals.share[s * totals.row_stride + row] = 0.0f;
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
