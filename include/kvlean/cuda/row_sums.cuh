// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/mass_tiles.cuh"

// First pass: the log-sum-exp of every query row over the keys that it sees. Row r of a segment is
// query r / group of head r % group, so that neighbouring rows see nearly the same keys.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// What the passes leave for each other, per segment and row; or the log-sum-exps of the engine.
struct RowTotals {
  float* minus_log2 = nullptr;  ///< [segments][row_stride] 0: the row sees nothing; NaN: see share
  float* share = nullptr;       ///< [segments][row_stride] what an infinite logit gets; 0: none is
  u64 row_stride = 0;
  const float* lse = nullptr;  ///< natural log, [segments][group][lse_stride]: no first pass
  u32 lse_stride = 0;

  /// Minus the log2 of a row's softmax sum; NaN where infinite logits share the mass.
  [[nodiscard]] KVLEAN_DEVICE float shift(const CacheView& cache, u32 s, const SegmentQueries& own,
                                          u32 query, u32 head) const noexcept {
    if (lse == nullptr) return minus_log2[s * row_stride + query * cache.group_size + head];
    const u64 at = (static_cast<u64>(s) * cache.group_size + head) * lse_stride;
    const float given = lse[at + own.skipped + query];
    return given == -INFINITY ? 0.0f : given * -log2_e;
  }
  [[nodiscard]] KVLEAN_DEVICE float share_of(const CacheView& cache, u32 s, u32 query,
                                             u32 head) const noexcept {
    return lse != nullptr ? 0.0f : share[s * row_stride + query * cache.group_size + head];
  }
  /// The probability of a logit in base 2. `minus` is the row's shift.
  [[nodiscard]] KVLEAN_DEVICE float probability(float x, float minus, const CacheView& cache, u32 s,
                                                u32 query, u32 head) const noexcept {
    if (minus != minus) {
      const float part = share_of(cache, s, query, head);
      if (part != 0.0f) return x != x ? x : x == INFINITY ? part : 0.0f;
    }
    return exp2_approximate(x + minus);
  }
};

struct RowSumShape {
  u32 splits = 1;           ///< parts of the keys, each by blocks of its own
  u32 row_warps = 8;        ///< warps of a block with rows of their own, 2, 4 or 8
  u32 count = 1;            ///< sums of a row, splits * 8 / row_warps
  RowSum* parts = nullptr;  ///< [segments][count][row_stride], null: one
};

/// Tokens [begin, end) that some of these queries see, and [plain_begin, plain_end) that all see.
struct SeenRange {
  u32 begin = 0;
  u32 end = 0;
  u32 plain_begin = 0;
  u32 plain_end = 0;

  [[nodiscard]] static KVLEAN_DEVICE SeenRange of(const Segment& segment, u32 length,
                                                  const SegmentQueries& own, u32 first_query,
                                                  u32 last_query) noexcept {
    const auto up_to = [&](i32 position) noexcept {
      return position == 0x7fffffff ? length : tokens_before(segment, length, position + 1);
    };
    SeenRange range;
    range.end = up_to(own.last_seen(last_query));
    range.begin = smaller(tokens_before(segment, length, own.first_seen(first_query)), range.end);
    range.plain_begin = tokens_before(segment, length, own.first_seen(last_query));
    range.plain_end = up_to(own.last_seen(first_query));
    return range;
  }
};

KVLEAN_DEVICE void write_row_sum(const RowSum& sum, const CacheView& cache,
                                 const Attention& attention, u32 s, u32 row,
                                 const RowTotals& totals) noexcept {
  RowSum all = sum;
  if (attention.sink_logits != nullptr) {
    const u32 head = cache.head_of(s) * cache.group_size + row % cache.group_size;
    const u32 query_heads = cache.kv_heads * cache.group_size;
    const float sink = attention.sink_logits[cache.layer_of(s) * query_heads + head] * log2_e;
    if (sink == sink) all.add(RowSum{sink, 1.0f});
  }
  const u64 at = s * totals.row_stride + row;
  totals.minus_log2[at] = all.largest == INFINITY    ? NAN
                          : all.largest == -INFINITY ? 0.0f
                                                     : -all.log2_sum();
  totals.share[at] = all.largest == INFINITY ? 1.0f / all.sum : 0.0f;
}

/// Blocks (segment, row tile * splits + split), the rows that see most first. Warps of a block with
/// the same rows take every other 16 keys of a tile.
///
/// A lane keeps the sum of its own keys relative to a logit that it met, and adds up without
/// looking for a larger one. Only where that overflows, or keys are masked, it looks.
template <class E, u32 Width, u32 Tiles, bool Plain>
__global__ void __launch_bounds__(sum_threads, 2)
    row_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                    const LogitSpec logits, const RowTotals totals, const RowSumShape shape) {
  using Tile = PaddedTile<Width>;
  using Rows = StationaryRows<Width, Tiles>;
  constexpr u32 stages = Tile::stages;
  extern __shared__ __align__(128) char shared[];
  alignas(16) __shared__ float bias[Plain ? 1 : stages][tile_rows];

  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x;
  const u32 length = cache.lengths[s];
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 group = cache.group_size;
  const u32 rows = own.count * group;
  const u32 block_rows = shape.row_warps * Rows::rows;
  const u32 row_tiles = ceil_div(rows, block_rows);
  const u32 row_tile = blockIdx.y / shape.splits;
  const u32 split = blockIdx.y % shape.splits;
  if (row_tile >= row_tiles) return;
  const u32 first_row = (row_tiles - 1 - row_tile) * block_rows;
  const SeenRange seen = SeenRange::of(segment, length, own, first_row / group,
                                       (smaller(first_row + block_rows, rows) - 1) / group);
  const u32 tiles = ceil_div(seen.end - seen.begin, tile_rows);
  const u32 each = ceil_div(tiles, shape.splits);
  const u32 first_tile = smaller(split * each, tiles);
  const u32 own_tiles = smaller(first_tile + each, tiles) - first_tile;
  const u32 begin = seen.begin + first_tile * tile_rows;

  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 part = warp / shape.row_warps;
  const u32 parts = sum_warps / shape.row_warps;
  const u32 warp_row = first_row + warp % shape.row_warps * Rows::rows;
  const u32 base = shared_address(shared);
  Rows mine;
  Rows::stage(base + warp * Rows::staged_bytes, [&](u32 r) noexcept {
    const u32 row = smaller(warp_row + r, rows - 1);
    return own.row(row % group, row / group);
  });
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  mine.load(base + warp * Rows::staged_bytes);
  __syncthreads();  // the tiles come to the same place

  const auto fetch = [&](u32 i) noexcept {
    if (i < own_tiles) {
      const u32 t = smaller(begin + i * tile_rows + threadIdx.x / 4, seen.end - 1);
      copy_tile_row<Width>(base + i % stages * Tile::bytes, segment.key_row(t));
    }
    commit_copies();
  };
  const auto bias_of = [&](u32 i) noexcept {
    const u32 t = begin + i * tile_rows + threadIdx.x;
    return i < own_tiles && threadIdx.x < tile_rows && t < seen.end ? segment.mass_bias(t) * log2_e
                                                                    : 0.0f;
  };
  const auto keep_bias = [&](u32 i, float x) noexcept {
    if (!Plain && threadIdx.x < tile_rows) bias[i % stages][threadIdx.x] = x;
  };
  // Set one by one: nvcc 13.0 zeroes all but the first row of a two-dimensional array of a class
  // with initialisers of its own.
  RowSum sum[Tiles][2];
#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) sum[m][0] = sum[m][1] = RowSum{-INFINITY, 0.0f};
  for (u32 i = 0; i + 1 < stages; ++i) fetch(i);
  float coming = 0.0f;
  if constexpr (!Plain) {
    keep_bias(0, bias_of(0));
    coming = bias_of(1);
  }
  for (u32 i = 0; i < own_tiles; ++i) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    fetch(i + stages - 1);
    if constexpr (!Plain) {
      keep_bias(i + 1, coming);
      coming = bias_of(i + 2);
    }
    const u32 tile = base + i % stages * Tile::bytes;
    const u32 token = begin + i * tile_rows;
    bool exact = token < seen.plain_begin || token + tile_rows > seen.plain_end;
    if (!exact) {
      float more[Tiles][2] = {};
#pragma unroll 1
      for (u32 pair = part; pair < tile_rows / 16; pair += parts) {
        float product[Tiles][2][4];
        mine.template multiply<E>(tile + pair * 16 * Tile::stride, product);
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
          float2 b = make_float2(0.0f, 0.0f);
          if constexpr (!Plain) {
            b = *reinterpret_cast<const float2*>(
                &bias[i % stages][pair * 16 + n * 8 + lane % 4 * 2]);
          }
#pragma unroll
          for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
              const float minus = -sum[m][half].largest;
              more[m][half] += logits.template power<Plain>(product[m][n][half * 2], b.x, minus);
              more[m][half] +=
                  logits.template power<Plain>(product[m][n][half * 2 + 1], b.y, minus);
            }
          }
        }
      }
      float all = 0.0f;
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) all += more[m][0] + more[m][1];
      exact = __any_sync(full_warp, !(all < 0x1p60f));
      if (!exact) {
#pragma unroll
        for (u32 m = 0; m < Tiles; ++m) {
          sum[m][0].sum += more[m][0];
          sum[m][1].sum += more[m][1];
        }
      }
    }
    if (exact) {
#pragma unroll 1
      for (u32 pair = part; pair < tile_rows / 16; pair += parts) {
        float product[Tiles][2][4];
        mine.template multiply<E>(tile + pair * 16 * Tile::stride, product);
#pragma unroll
        for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            const u32 row = smaller(warp_row + m * 16 + half * 8 + lane / 4, rows - 1);
            const i32 first = own.first_seen(row / group);
            const i32 last = own.last_seen(row / group);
            float x[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
              const u32 column = pair * 16 + j / 2 * 8 + lane % 4 * 2 + j % 2;
              const float b = Plain ? 0.0f : bias[Plain ? 0 : i % stages][column];
              x[j] = -INFINITY;
              if (token + column >= seen.end) continue;
              const i32 at = segment.position(token + column);
              if (at > last || at < first) continue;
              x[j] = logits.template logit<Plain>(product[m][j / 2][half * 2 + j % 2], b);
            }
            sum[m][half].add(x);
          }
        }
      }
    }
  }

#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      RowSum& of_row = sum[m][half];
#pragma unroll
      for (u32 step = 1; step < 4; step *= 2) of_row.join_across(step, (lane & step) == 0);
      const u32 row = warp_row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 != 0 || row >= rows) continue;
      if (shape.parts != nullptr) {
        const u64 at = static_cast<u64>(s) * shape.count + split * parts + part;
        shape.parts[at * totals.row_stride + row] = of_row;
      } else {
        write_row_sum(of_row, cache, attention, s, row, totals);
      }
    }
  }
}

/// Joins the parts of split keys, a warp for each row. Blocks (rows / warps, segment).
template <int = 0>
__global__ void join_row_sums_kernel(const CacheView cache, const Queries queries,
                                     const Attention attention, const RowTotals totals,
                                     const RowSum* parts, u32 count) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, cache.lengths[s]);
  const u32 lane = threadIdx.x % warp_threads;
  const u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / warp_threads;
  if (row >= own.count * cache.group_size) return;
  RowSum all;
  for (u32 i = lane; i < count; i += warp_threads) {
    all.add(parts[(static_cast<u64>(s) * count + i) * totals.row_stride + row]);
  }
#pragma unroll
  for (u32 step = 1; step < warp_threads; step *= 2) all.join_across(step, (lane & step) == 0);
  if (lane == 0) write_row_sum(all, cache, attention, s, row, totals);
}

/// Log-sum-exps of the engine, as the second pass reads those of many queries. Blocks (rows /
/// threads, segment).
template <int = 0>
__global__ void given_row_sums_kernel(const CacheView cache, const Queries queries,
                                      const RowTotals totals) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const SegmentQueries own = SegmentQueries::of(cache, queries, {}, s, cache.lengths[s]);
  const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= own.count * cache.group_size) return;
  totals.minus_log2[s * totals.row_stride + row] =
      totals.shift(cache, s, own, row / cache.group_size, row % cache.group_size);
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
