// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/column_sums.cuh"

// The two passes without tensor cores: binary32 caches, and widths that those have no shape for.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 float_threads = 256;
inline constexpr u32 float_tile = 64;   // rows and columns of a block
inline constexpr u32 float_depth = 16;  // elements of a row at a time

struct FloatTiles {
  float rows[float_depth][float_tile + 4];
  float columns[float_depth][float_tile + 4];
};

/// sums[i][j]: row 4 (thread / 16) + i times column thread % 16 + 16 j. An address may be null.
template <DType D, class Row, class Column>
KVLEAN_DEVICE void multiply_floats(FloatTiles& tiles, u32 width, Row&& row, Column&& column,
                                   float (&sums)[4][4]) noexcept {
  const u32 y = threadIdx.x / 16;
  const u32 x = threadIdx.x % 16;
  // Each thread brings 4 elements of one row and of one column.
  const u32 mine = threadIdx.x / 4;
  const u32 part = threadIdx.x % 4 * 4;
  const char* my_row = row(mine);
  const char* my_column = column(mine);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) sums[i][j] = 0.0f;
  }
  for (u32 d = 0; d < width; d += float_depth) {
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 at = d + part + i;
      const bool inside = at < width;
      tiles.rows[part + i][mine] = inside && my_row != nullptr ? load_float<D>(my_row, at) : 0.0f;
      tiles.columns[part + i][mine] =
          inside && my_column != nullptr ? load_float<D>(my_column, at) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (u32 k = 0; k < float_depth; ++k) {
      float a[4];
      float b[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) a[i] = tiles.rows[k][y * 4 + i];
#pragma unroll
      for (u32 j = 0; j < 4; ++j) b[j] = tiles.columns[k][x + 16 * j];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      }
    }
  }
}

/// As row_sums_kernel, 64 rows a block. Blocks (row tile * splits + split, segment).
template <DType D, bool Capped>
__global__ void __launch_bounds__(float_threads)
    float_row_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                          const LogitSpec logits, const RowTotals totals, const RowSumShape shape) {
  __shared__ FloatTiles tiles;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const Segment& segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 group = cache.group_size;
  const u32 rows = own.count * group;
  const u32 first_row = blockIdx.x / shape.splits * float_tile;
  const u32 split = blockIdx.x % shape.splits;
  if (first_row >= rows) return;
  const SeenRange seen = SeenRange::of(segment, length, own, first_row / group,
                                       (smaller(first_row + float_tile, rows) - 1) / group);
  const u32 key_tiles = ceil_div(seen.end - seen.begin, float_tile);
  const u32 each = ceil_div(key_tiles, shape.splits);
  const u32 begin = seen.begin + smaller(split * each, key_tiles) * float_tile;
  const u32 end =
      smaller(seen.begin + smaller((split + 1) * each, key_tiles) * float_tile, seen.end);

  const u32 y = threadIdx.x / 16;
  const u32 x = threadIdx.x % 16;
  RowSum sum[4];
  for (u32 token = begin; token < end; token += float_tile) {
    float product[4][4];
    multiply_floats<D>(
        tiles, cache.key_width,
        [&](u32 r) noexcept -> const char* {
          const u32 row = first_row + r;
          return row < rows ? own.row(row % group, row / group) : nullptr;
        },
        [&](u32 c) noexcept -> const char* {
          return token + c < end ? segment.key_row(token + c) : nullptr;
        },
        product);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 query = smaller(first_row + y * 4 + i, rows - 1) / group;
      const i32 first = own.first_seen(query);
      const i32 last = own.last_seen(query);
      float exponents[4];
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 t = token + x + 16 * j;
        exponents[j] = -INFINITY;
        if (t >= end) continue;
        const i32 at = segment.position(t);
        if (at > last || at < first) continue;
        exponents[j] =
            logits.template exponent<Capped>(product[i][j], segment.mass_bias(t) * log2_e);
      }
      sum[i].add(exponents);
    }
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    RowSum& mine = sum[i];
#pragma unroll
    for (u32 step = 1; step < 16; step *= 2) mine.join_across(step, (x & step) == 0);
    const u32 row = first_row + y * 4 + i;
    if (x != 0 || row >= rows) continue;
    if (shape.parts != nullptr) {
      shape.parts[(static_cast<u64>(s) * shape.splits + split) * totals.row_stride + row] = mine;
    } else {
      write_row_sum(mine, cache, attention, s, row, totals);
    }
  }
}

/// As column_sums_kernel, 64 keys a block. Blocks (key tile, segment).
template <DType D, bool Capped>
__global__ void __launch_bounds__(float_threads)
    float_column_sums_kernel(const CacheView cache, const Queries queries,
                             const Attention attention, const LogitSpec logits,
                             const RowTotals totals, const ColumnSumShape shape) {
  __shared__ FloatTiles tiles;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  if (shape.clear != nullptr && blockIdx.x == 0 && threadIdx.x < 2)
    shape.clear[2 * s + threadIdx.x] = 0;
  const u32 length = cache.lengths[s];
  const u32 first_key = blockIdx.x * float_tile;
  if (first_key >= length) return;
  const Segment& segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 last_key = smaller(first_key + float_tile, length) - 1;
  u32 first_query = 0;
  u32 last_query = own.count;
  if (own.causal) first_query = own.queries_before(segment.position(first_key));
  if (own.window != 0) {
    const i64 past = static_cast<i64>(segment.position(last_key)) + own.window;
    if (past < unseen_position) last_query = own.queries_before(static_cast<i32>(past));
  }
  const u32 y = threadIdx.x / 16;
  const u32 x = threadIdx.x % 16;
  i32 key_position[4];
  float bias[4];
  float total[4] = {};
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    const u32 key = smaller(first_key + y * 4 + i, length - 1);
    key_position[i] = segment.position(key);
    bias[i] = segment.mass_bias(key) * log2_e;
  }
  const auto write = [&](u32 head) noexcept {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const float sum = sum_lanes<16>(total[i]);
      total[i] = 0.0f;
      const u32 key = first_key + y * 4 + i;
      if (x != 0 || key >= length) continue;
      const u32 heads = shape.per_head ? cache.group_size : 1;
      float* to = shape.totals + (static_cast<u64>(s) * heads + head) * shape.stride + key;
      *to = shape.add ? *to + sum * shape.factor : sum * shape.factor;
    }
  };
  for (u32 head = 0; head < cache.group_size; ++head) {
    for (u32 query = first_query; query < last_query; query += float_tile) {
      float product[4][4];
      multiply_floats<D>(
          tiles, cache.key_width,
          [&](u32 r) noexcept -> const char* {
            return first_key + r < length ? segment.key_row(first_key + r) : nullptr;
          },
          [&](u32 c) noexcept -> const char* {
            return query + c < last_query ? own.row(head, query + c) : nullptr;
          },
          product);
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 q = query + x + 16 * j;
        if (q >= last_query) continue;
        const i32 first = own.first_seen(q);
        const i32 last = own.last_seen(q);
        const float minus = totals.shift(cache, s, own, q, head);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          if (key_position[i] > last || key_position[i] < first) continue;
          const float exponent = logits.template exponent<Capped>(product[i][j], bias[i]);
          total[i] += totals.probability(exponent, minus, cache, s, q, head);
        }
      }
    }
    if (shape.per_head) write(head);
  }
  if (!shape.per_head) write(0);
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
