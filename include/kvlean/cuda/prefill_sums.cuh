// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/column_sums.cuh"
#include "kvlean/cuda/warpgroup.cuh"

// Both passes over many queries by warpgroup products. 16 warps hold 16 rows each, tiles of 64 rows
// stream through shared memory, and while one tile is multiplied the one before it becomes
// exponentials.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 prefill_threads = 512;
inline constexpr u32 prefill_rows = 256;  // that stay in registers

template <u32 Width>
inline constexpr u32 prefill_shared_bytes =
    larger(PermutedTile<Width>::stages* PermutedTile<Width>::bytes,
           prefill_threads / warp_threads * StationaryRows<Width, 1>::staged_bytes) +
    1024;

#if defined(KVLEAN_CUDA_WARPGROUP)

/// Which tiles are there, and which are done with. Warps wait for each other through these alone,
/// so that some may multiply while others take exponentials.
template <u32 stages>
struct TileBarriers {
  u64 full[stages];
  u64 empty[stages];

  /// By one thread, with a block barrier behind.
  KVLEAN_DEVICE void start() noexcept {
    for (u32 i = 0; i < stages; ++i) {
      start_barrier(full + i, prefill_threads / warp_threads);
      start_barrier(empty + i, prefill_threads / warp_threads);
    }
  }
};

/// The pipeline over an even number of tiles, of which those from `tiles` on are nothing.
/// fetch(tile, address), called in order, starts a thread's copies; reduce(tile, products) takes
/// the 32 products of a thread: element 4 j + 2 half + i belongs to row lane / 4 + 8 half of the
/// warp and row 8 j + lane % 4 * 2 + i of the tile.
template <class E, u32 Width, class Fetch, class Reduce>
KVLEAN_DEVICE void stream_tiles(const u32 (&a)[Width / 16][4], u32 base,
                                TileBarriers<PermutedTile<Width>::stages>& barriers, u32 tiles,
                                Fetch&& fetch, Reduce&& reduce) noexcept {
  using Tile = PermutedTile<Width>;
  constexpr u32 stages = Tile::stages;
  constexpr u32 ahead = 6;  // tiles from a copy's start to its use
  constexpr u32 ready_ahead = 3;
  static_assert(stages == ahead + 2);
  const bool speaks = threadIdx.x % warp_threads == 0;
  const auto address = [&](u32 tile) noexcept { return base + tile % stages * Tile::bytes; };
  const auto start_fetch = [&](u32 tile) noexcept {
    if (tile < tiles) fetch(tile, address(tile));
    commit_copies();
  };
  for (u32 tile = 0; tile < ahead; ++tile) start_fetch(tile);
  wait_for_copies<ahead - ready_ahead>();
  publish_copies();
  __syncwarp();
  if (speaks) {
    for (u32 tile = 0; tile < ready_ahead; ++tile) arrive(barriers.full + tile);
  }
  float even[32];
  float odd[32];
#pragma unroll
  for (u32 i = 0; i < 32; ++i) even[i] = odd[i] = 0.0f;
  wait_for(barriers.full, 0);
  start_tile<E, Width>(even, a, address(0));
  wait_for_products(even);
  // Products of tile + 1 run behind the exponentials of tile.
  const auto step = [&](u32 tile, float(&ready)[32], float(&coming)[32]) noexcept {
    wait_for(barriers.full + (tile + 1) % stages, (tile + 1) / stages);
    start_tile<E, Width>(coming, a, address(tile + 1));
    if (tile + ahead >= stages) {
      wait_for(barriers.empty + (tile + ahead) % stages, (tile + ahead) / stages - 1);
    }
    start_fetch(tile + ahead);
    wait_for_copies<ahead - ready_ahead>();
    publish_copies();
    __syncwarp();
    if (speaks) arrive(barriers.full + (tile + ready_ahead) % stages);
    reduce(tile, ready);
    __syncwarp();
    if (speaks) arrive(barriers.empty + tile % stages);
    wait_for_products(coming);
  };
#pragma unroll 1
  for (u32 tile = 0; tile < tiles; tile += 2) {
    step(tile, even, odd);
    step(tile + 1, odd, even);
  }
}

#endif

/// As row_sums_kernel without splits. Blocks (segment, row tile).
template <class E, u32 Width>
__global__ void __launch_bounds__(prefill_threads, 1)
    prefill_row_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                            const LogitSpec logits, const RowTotals totals) {
#if defined(KVLEAN_CUDA_WARPGROUP)
  using Rows = StationaryRows<Width, 1>;
  extern __shared__ __align__(128) char shared[];
  __shared__ TileBarriers<PermutedTile<Width>::stages> barriers;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x;
  const u32 length = cache.lengths[s];
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 group = cache.group_size;
  const u32 rows = own.count * group;
  const u32 row_tiles = ceil_div(rows, prefill_rows);
  if (blockIdx.y >= row_tiles) return;
  const u32 first_row = (row_tiles - 1 - blockIdx.y) * prefill_rows;
  const u32 last_row = smaller(first_row + prefill_rows, rows) - 1;
  const SeenRange seen = SeenRange::of(segment, length, own, first_row / group, last_row / group);
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 warp_row = first_row + warp * Rows::rows;
  const u32 base = (shared_address(shared) + 1023) / 1024 * 1024;
  Rows mine;
  Rows::stage(base + warp * Rows::staged_bytes, [&](u32 r) noexcept {
    const u32 row = smaller(warp_row + r, rows - 1);
    return own.row(row % group, row / group);
  });
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  mine.load(base + warp * Rows::staged_bytes);
  if (threadIdx.x == 0) barriers.start();
  __syncthreads();

  // Keys that the lane's two rows see, from seen.begin on.
  u32 from[2];
  u32 to[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 row = smaller(warp_row + half * 8 + lane / 4, rows - 1);
    const SeenRange of_row = SeenRange::of(segment, length, own, row / group, row / group);
    from[half] = larger(of_row.begin, seen.begin) - seen.begin;
    to[half] = of_row.end > seen.begin ? of_row.end - seen.begin : 0;
  }
  RowSum sum[2];
  stream_tiles<E, Width>(
      mine.a[0], base, barriers, ceil_div(seen.end - seen.begin, tile_rows),
      [&](u32 tile, u32 at) noexcept {
        const u32 t = smaller(seen.begin + tile * tile_rows + threadIdx.x / 8, seen.end - 1);
        PermutedTile<Width>::copy_row(at, segment.key_row(t));
      },
      [&](u32 tile, const float(&product)[32]) noexcept {
        const u32 first = tile * tile_rows;
        const bool plain =
            first >= larger(from[0], from[1]) && first + tile_rows <= smaller(to[0], to[1]);
        const float minus[2] = {-sum[0].largest, -sum[1].largest};
        float more[2] = {};
        if (__all_sync(full_warp, plain)) {
#pragma unroll
          for (u32 i = 0; i < 32; ++i) {
            const u32 half = i / 2 % 2;
            more[half] += exp2_approximate(fmaf(product[i], logits.factor, minus[half]));
          }
        } else {
#pragma unroll
          for (u32 i = 0; i < 32; ++i) {
            const u32 half = i / 2 % 2;
            const u32 t = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const bool sees = t >= from[half] && t < to[half];
            const float p = exp2_approximate(fmaf(product[i], logits.factor, minus[half]));
            more[half] += sees ? p : 0.0f;
          }
        }
        if (!__any_sync(full_warp, !(more[0] + more[1] < 0x1p60f))) {
          sum[0].sum += more[0];
          sum[1].sum += more[1];
          return;
        }
        float copy[32];  // in local memory: this is rare
#pragma unroll
        for (u32 i = 0; i < 32; ++i) copy[i] = product[i];
#pragma unroll 1
        for (u32 j = 0; j < 8; ++j) {
#pragma unroll 1
          for (u32 half = 0; half < 2; ++half) {
            float x[2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
              const u32 t = first + j * 8 + lane % 4 * 2 + i;
              const u32 begin = half == 0 ? from[0] : from[1];
              const u32 end = half == 0 ? to[0] : to[1];
              x[i] = t >= begin && t < end ? copy[j * 4 + half * 2 + i] * logits.factor : -INFINITY;
            }
            if (half == 0) {
              sum[0].add(x);
            } else {
              sum[1].add(x);
            }
          }
        }
      });
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
#pragma unroll
    for (u32 step = 1; step < 4; step *= 2) sum[half].join_across(step, (lane & step) == 0);
    const u32 row = warp_row + half * 8 + lane / 4;
    if (lane % 4 == 0 && row < rows) write_row_sum(sum[half], cache, attention, s, row, totals);
  }
#endif
}

/// As column_sums_kernel, one total for all heads of a group. Blocks (segment, 256 keys).
template <class E, u32 Width>
__global__ void __launch_bounds__(prefill_threads, 1)
    prefill_column_sums_kernel(const CacheView cache, const Queries queries,
                               const Attention attention, const LogitSpec logits,
                               const RowTotals totals, const ColumnSumShape shape) {
#if defined(KVLEAN_CUDA_WARPGROUP)
  using Rows = StationaryRows<Width, 1>;
  extern __shared__ __align__(128) char shared[];
  __shared__ TileBarriers<PermutedTile<Width>::stages> barriers;
  // What shifts the logits of a tile's rows, for each warp by itself.
  alignas(16) __shared__ float shift[PermutedTile<Width>::stages][prefill_threads / warp_threads]
                                    [tile_rows];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x;
  if (shape.clear != nullptr && blockIdx.y == 0 && threadIdx.x < 2)
    shape.clear[2 * s + threadIdx.x] = 0;
  const u32 length = cache.lengths[s];
  const u32 block_key = blockIdx.y * prefill_rows;
  if (block_key >= length) return;
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 group = cache.group_size;
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 first_query = own.seen_from(segment.position(block_key));
  const u32 end_query =
      own.seen_until(segment.position(smaller(block_key + prefill_rows, length) - 1));
  const StreamedRows stream = StreamedRows::of(first_query, end_query, group, false);
  const u32 warp_key = block_key + warp * Rows::rows;
  const u32 base = (shared_address(shared) + 1023) / 1024 * 1024;
  Rows mine;
  Rows::stage(base + warp * Rows::staged_bytes,
              [&](u32 r) noexcept { return segment.key_row(smaller(warp_key + r, length - 1)); });
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  mine.load(base + warp * Rows::staged_bytes);
  if (threadIdx.x == 0) barriers.start();
  __syncthreads();

  // Streamed rows that see the lane's two keys.
  u32 from[2];
  u32 to[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const i32 at = segment.position(smaller(warp_key + half * 8 + lane / 4, length - 1));
    from[half] = (larger(own.seen_from(at), stream.first) - stream.first) * group;
    to[half] =
        (smaller(larger(own.seen_until(at), stream.first), stream.end) - stream.first) * group;
  }
  // Rows are neighbours where the first pass left their sums.
  const float* minus_log2 = totals.minus_log2 + s * totals.row_stride + stream.first * group;
  const u32 shifts = shared_address(&shift[0][warp][0]);
  RowCursor cursor = RowCursor::of(stream, threadIdx.x / 8);
  const u32 last = stream.end - 1 - stream.first;
  const char* const first_row = own.row(0, stream.first);
  float total[2] = {};
  stream_tiles<E, Width>(
      mine.a[0], base, barriers, ceil_div(stream.rows, tile_rows),
      [&](u32 tile, u32 at) noexcept {
        PermutedTile<Width>::copy_row(at, first_row + cursor.minor * own.head_stride +
                                              smaller(cursor.major, last) * own.row_stride);
        const u32 to = shifts + tile % PermutedTile<Width>::stages * sizeof(shift[0]);
#pragma unroll
        for (u32 r = lane; r < tile_rows; r += warp_threads) {
          copy_async_4(to + r * 4, minus_log2 + smaller(tile * tile_rows + r, stream.rows - 1),
                       true);
        }
        cursor.advance(stream);
      },
      [&](u32 tile, const float(&product)[32]) noexcept {
        const float* minus = shift[tile % PermutedTile<Width>::stages][warp] + lane % 4 * 2;
        const u32 first = tile * tile_rows;
        const bool plain =
            first >= larger(from[0], from[1]) && first + tile_rows <= smaller(to[0], to[1]);
        float more[2] = {};
        if (__all_sync(full_warp, plain)) {
#pragma unroll
          for (u32 j = 0; j < 8; ++j) {
            const float2 m = *reinterpret_cast<const float2*>(minus + j * 8);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
              more[half] += exp2_approximate(fmaf(product[j * 4 + half * 2], logits.factor, m.x));
              more[half] +=
                  exp2_approximate(fmaf(product[j * 4 + half * 2 + 1], logits.factor, m.y));
            }
          }
        } else {
#pragma unroll
          for (u32 i = 0; i < 32; ++i) {
            const u32 half = i / 2 % 2;
            const u32 row = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const bool seen = row >= from[half] && row < to[half];
            const float p =
                exp2_approximate(fmaf(product[i], logits.factor, minus[i / 4 * 8 + i % 2]));
            more[half] += seen ? p : 0.0f;
          }
        }
        const float all = more[0] + more[1];
        if (__any_sync(full_warp, all != all)) {
          float copy[32];  // in local memory: this is rare
#pragma unroll
          for (u32 i = 0; i < 32; ++i) copy[i] = product[i];
          more[0] = more[1] = 0.0f;
#pragma unroll 1
          for (u32 i = 0; i < 32; ++i) {
            const u32 row = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const bool lower = i / 2 % 2 == 0;
            if (row < (lower ? from[0] : from[1]) || row >= (lower ? to[0] : to[1])) continue;
            u32 query = 0;
            u32 head = 0;
            stream.find(row, query, head);
            const float p = totals.probability(copy[i] * logits.factor, minus[i / 4 * 8 + i % 2],
                                               cache, s, query, head);
            more[0] += lower ? p : 0.0f;
            more[1] += lower ? 0.0f : p;
          }
        }
        total[0] += more[0];
        total[1] += more[1];
      });
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    float sum = total[half];
    sum += __shfl_xor_sync(full_warp, sum, 1);
    sum += __shfl_xor_sync(full_warp, sum, 2);
    const u32 key = warp_key + half * 8 + lane / 4;
    if (lane % 4 != 0 || key >= length) continue;
    float* to_key = shape.totals + s * shape.stride + key;
    *to_key = shape.add ? *to_key + sum * shape.factor : sum * shape.factor;
  }
#endif
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
