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
  bool resident = false;  ///< all queries stay in shared memory, while keys change
  bool add = false;       ///< to what is there
  float factor = 1.0f;
  u32 tiles = 0;         ///< of 64 query rows in shared memory
  u32* clear = nullptr;  ///< [segments][2] zeroed for the kernel that follows, or null
};

/// The query rows [0, rows) that stream by: one query's heads after the other, or, where every head
/// has a total of its own, one head's queries after the other, filled up to whole sixteens.
struct StreamedRows {
  u32 first = 0;  ///< queries [first, end)
  u32 end = 0;
  u32 rows = 0;
  u32 span = 0;  ///< rows of a head, per_head only
  bool per_head = false;
  Divider by;
  u32 major_step = 0;  // 64 rows on
  u32 minor_step = 0;

  [[nodiscard]] static KVLEAN_DEVICE StreamedRows of(u32 first, u32 end, u32 group,
                                                     bool per_head) noexcept {
    StreamedRows stream;
    stream.first = smaller(first, end);
    stream.end = end;
    stream.per_head = per_head;
    const u32 count = end - stream.first;
    stream.span = per_head ? ceil_div(count, 16u) * 16 : count;
    stream.rows = stream.span * group;
    stream.by = Divider::of(per_head ? larger(stream.span, 1u) : group);
    stream.by.divide(tile_rows, stream.major_step, stream.minor_step);
    return stream;
  }
  KVLEAN_DEVICE void find(u32 row, u32& query, u32& head) const noexcept {
    if (per_head) {
      by.divide(row, head, query);
    } else {
      by.divide(row, query, head);
    }
    query += first;
  }
  /// Whether all queries of these rows lie in [plain_first, plain_end).
  [[nodiscard]] KVLEAN_DEVICE bool within(u32 row, u32 row_end, u32 plain_first,
                                          u32 plain_end) const noexcept {
    u32 low = 0;
    u32 low_head = 0;
    u32 high = 0;
    u32 high_head = 0;
    find(row, low, low_head);
    find(row_end - 1, high, high_head);
    if (per_head && low_head != high_head) {
      low = first;
      high = end - 1;
    }
    return low >= plain_first && smaller(high, end - 1) < plain_end;
  }
};

/// Rows 64 apart, one after the other.
struct RowCursor {
  u32 major = 0;
  u32 minor = 0;

  [[nodiscard]] static KVLEAN_DEVICE RowCursor of(const StreamedRows& stream, u32 row) noexcept {
    RowCursor cursor;
    stream.by.divide(row, cursor.major, cursor.minor);
    return cursor;
  }
  KVLEAN_DEVICE void advance(const StreamedRows& stream) noexcept {
    major += stream.major_step;
    minor += stream.minor_step;
    if (minor >= stream.by.divisor) {
      minor -= stream.by.divisor;
      ++major;
    }
  }
};

/// Blocks (segment, block of keys). With resident queries a warp takes every so many of the keys,
/// else a block has 8 warps' keys and the queries pass through shared memory.
template <class E, u32 Width, u32 Tiles, bool Plain>
__global__ void __launch_bounds__(sum_threads, 2)
    column_sums_kernel(const CacheView cache, const Queries queries, const Attention attention,
                       const LogitSpec logits, const RowTotals totals, const ColumnSumShape shape) {
  using Tile = PaddedTile<Width>;
  using Rows = StationaryRows<Width, Tiles>;
  constexpr u32 stages = Tile::stages;
  extern __shared__ __align__(128) char shared[];
  alignas(16) __shared__ float shift[resident_tiles][tile_rows];

  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x;
  if (shape.clear != nullptr && blockIdx.y == 0 && threadIdx.x < 2)
    shape.clear[2 * s + threadIdx.x] = 0;
  const u32 length = cache.lengths[s];
  const u32 block_key = blockIdx.y * sum_warps * Rows::rows;
  if (block_key >= length) return;
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 base = shared_address(shared);

  u32 first_query = 0;
  u32 end_query = own.count;
  if (!shape.resident) {
    first_query = own.seen_from(segment.position(block_key));
    end_query =
        own.seen_until(segment.position(smaller(block_key + sum_warps * Rows::rows, length) - 1));
  }
  const StreamedRows stream =
      StreamedRows::of(first_query, end_query, cache.group_size, shape.per_head);
  const u32 tiles = ceil_div(stream.rows, tile_rows);
  const float* minus_log2 = totals.minus_log2 + s * totals.row_stride;

  // Four threads bring one row of a tile, the first of them what shifts its logits.
  RowCursor cursor = RowCursor::of(stream, threadIdx.x / 4);
  const auto fetch = [&](u32 tile, u32 stage) noexcept {
    if (tile < tiles) {
      const u32 query = stream.first + (stream.per_head ? cursor.minor : cursor.major);
      const u32 head = stream.per_head ? cursor.major : cursor.minor;
      const bool is_query = query < stream.end && head < cache.group_size;
      const u32 from_query = smaller(query, stream.end - 1);
      const u32 from_head = smaller(head, cache.group_size - 1);
      copy_tile_row<Width>(base + stage * Tile::bytes, own.row(from_head, from_query));
      if (threadIdx.x % 4 == 0) {
        float* to = &shift[tile % resident_tiles][threadIdx.x / 4];
        if (shape.resident) {
          *to = is_query ? totals.shift(cache, s, own, query, head) : -INFINITY;
        } else {
          copy_async_4(shared_address(to), minus_log2 + from_query * cache.group_size + from_head,
                       is_query);
        }
      }
      cursor.advance(stream);
    }
    commit_copies();
  };

  u32 warp_key = block_key + warp * Rows::rows;
  const u32 staged =
      base + (shape.resident ? shape.tiles * Tile::bytes : 0) + warp * Rows::staged_bytes;
  const auto stage_keys = [&]() noexcept {
    Rows::stage(staged,
                [&](u32 r) noexcept { return segment.key_row(smaller(warp_key + r, length - 1)); });
    commit_copies();
  };
  Rows mine;
  float bias[Tiles][2] = {};
  float total[Tiles][2] = {};
  u32 plain_first = 0;
  u32 plain_end = 0;
  const auto take_keys = [&]() noexcept {
    mine.load(staged);
    plain_first = own.seen_from(segment.position(smaller(warp_key + Rows::rows, length) - 1));
    plain_end = own.seen_until(segment.position(smaller(warp_key, length - 1)));
    if constexpr (!Plain) {
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          const u32 key = smaller(warp_key + m * 16 + half * 8 + lane / 4, length - 1);
          bias[m][half] = segment.mass_bias(key) * log2_e;
        }
      }
    }
  };
  const auto write = [&](u32 head) noexcept {
    const u32 heads = shape.per_head ? cache.group_size : 1;
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
        float* to = shape.totals + (static_cast<u64>(s) * heads + head) * shape.stride + key;
        *to = shape.add ? *to + sum * shape.factor : sum * shape.factor;
      }
    }
  };
  // One element with all that may be special about it.
  const auto received = [&](float product, u32 key, float b, u32 row, float minus) noexcept {
    if (row >= stream.rows) return 0.0f;
    u32 query = 0;
    u32 head = 0;
    stream.find(row, query, head);
    if (query >= stream.end) return 0.0f;
    const i32 at = segment.position(smaller(key, length - 1));
    if (at > own.last_seen(query) || at < own.first_seen(query)) return 0.0f;
    return totals.probability(logits.template logit<Plain>(product, b), minus, cache, s, query,
                              head);
  };
  /// The warp's keys with 16 rows of a tile.
  const auto add_pair = [&](u32 row, u32 at, const float* minus, bool exact,
                            float(&sums)[Tiles][2]) noexcept {
    float product[Tiles][2][4];
    mine.template multiply<E>(at, product);
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
      const u32 column = n * 8 + lane % 4 * 2;
      const float2 shifts = *reinterpret_cast<const float2*>(minus + column);
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          const float x0 = product[m][n][half * 2];
          const float x1 = product[m][n][half * 2 + 1];
          const float b = bias[m][half];
          if (!exact) {
            sums[m][half] += logits.template power<Plain>(x0, b, shifts.x);
            sums[m][half] += logits.template power<Plain>(x1, b, shifts.y);
          } else {
            const u32 key = warp_key + m * 16 + half * 8 + lane / 4;
            sums[m][half] += received(x0, key, b, row + column, shifts.x);
            sums[m][half] += received(x1, key, b, row + column + 1, shifts.y);
          }
        }
      }
    }
  };
  u32 head = 0;
  u32 head_end = 0;
  const auto add_tile = [&](u32 tile, u32 stage) noexcept {
    const u32 from = tile * tile_rows;
    const u32 to = smaller(from + tile_rows, stream.rows);
    const u32 at = base + stage * Tile::bytes;
    const float* minus = shift[tile % resident_tiles];
    // Rows behind the last query have nothing that makes them 0 where they stream by.
    const bool masked = !stream.within(from, to, plain_first, plain_end) ||
                        (!shape.resident && !stream.per_head && to - from < tile_rows);
    // Each head's rows by themselves where each has a total. NaN is looked into element by element.
    const u32 step = shape.per_head ? 16 : tile_rows;
    for (u32 row = from; row < to; row += step) {
      if (shape.per_head && row == head_end) {
        write(head);
        ++head;
        head_end += stream.span;
      }
      const bool padded =
          stream.per_head && row + step == head_end && stream.end - stream.first < stream.span;
      bool exact = masked || padded;
      float sums[Tiles][2] = {};
      if (!exact) {
#pragma unroll 1
        for (u32 r = row; r < smaller(row + step, to); r += 16) {
          add_pair(r, at + (r - from) * Tile::stride, minus + (r - from), false, sums);
        }
        float all = 0.0f;
#pragma unroll
        for (u32 m = 0; m < Tiles; ++m) all += sums[m][0] + sums[m][1];
        exact = __any_sync(full_warp, all != all);
      }
      if (exact) {
#pragma unroll
        for (u32 m = 0; m < Tiles; ++m) sums[m][0] = sums[m][1] = 0.0f;
#pragma unroll 1
        for (u32 r = row; r < smaller(row + step, to); r += 16) {
          add_pair(r, at + (r - from) * Tile::stride, minus + (r - from), true, sums);
        }
      }
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
        total[m][0] += sums[m][0];
        total[m][1] += sums[m][1];
      }
    }
  };
  const auto write_rest = [&]() noexcept {
    const u32 heads = shape.per_head && tiles == 0 ? cache.group_size : head + 1;
    for (; head < heads; ++head) write(head);
    head = 0;
    head_end = stream.span;
  };
  head_end = stream.span;

  stage_keys();
  if (shape.resident) {
    for (u32 tile = 0; tile < tiles; ++tile) fetch(tile, tile);
    wait_for_copies<0>();
    __syncthreads();
    while (warp_key < length) {
      take_keys();
      __syncwarp();
      const u32 key = warp_key;
      warp_key += gridDim.y * sum_warps * Rows::rows;
      if (warp_key < length) stage_keys();  // behind the products
      const u32 next = warp_key;
      warp_key = key;
      for (u32 tile = 0; tile < tiles; ++tile) add_tile(tile, tile);
      write_rest();
      warp_key = next;
      wait_for_copies<0>();
      __syncwarp();
    }
    return;
  }
  wait_for_copies<0>();
  __syncwarp();
  take_keys();
  __syncthreads();  // the queries come to the same place
  for (u32 tile = 0; tile + 1 < stages; ++tile) fetch(tile, tile);
  for (u32 tile = 0; tile < tiles; ++tile) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    fetch(tile + stages - 1, (tile + stages - 1) % stages);
    add_tile(tile, tile % stages);
  }
  write_rest();
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
