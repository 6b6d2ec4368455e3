// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_split.cuh"

// The pieces of a row become its output, in the order of blocks: the same bits on every run.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Joins the pieces of a row. Blocks (row of the group, segment). Begins while the pieces are made;
/// what it reads before it waits is older than they.
template <int = 0>
__global__ void __launch_bounds__(attend_threads)
    join_pieces_kernel(const CacheView cache, const Queries queries, const Attention attention,
                       const AttendPieces pieces, float* values, float* lse) {
  constexpr u32 ahead = 9;  // pieces of a warp whose values are under way
  __shared__ AttendSplitScratch scratch;
  __shared__ float factor[most_attend_blocks];
  __shared__ float warp_part[2][attend_warps];
  __shared__ float4 columns[attend_warps][warp_threads];
  const u32 s = blockIdx.y;
  const u32 row = blockIdx.x;
  const u32 length = cache.lengths[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  if (row >= own.count * cache.group_size) return;
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const AttendSplit split = AttendSplit::of(cache, queries, pieces, scratch);
  const u32 unit = s * pieces.row_tiles + row / attend_rows;
  split.find_unit(cache, queries, pieces.row_tiles, unit, scratch);
  const u32 first = scratch.before / split.each;
  const u32 tiles = ceil_div(length, attend_tile);
  const u32 count = tiles == 0 ? 0 : (scratch.before + tiles - 1) / split.each - first + 1;
  const u64 base = pieces.row(first, unit, row % attend_rows);

  const u32 query_heads = cache.kv_heads * cache.group_size;
  const u32 head = cache.head_of(s) * cache.group_size + row / own.count;
  const float* sinks = attention.sink_logits != nullptr
                           ? attention.sink_logits + cache.layer_of(s) * query_heads
                           : nullptr;
  const float sink = sinks != nullptr ? sinks[head] * log2_e : -INFINITY;
  const u32 width = cache.value_width;
  const u64 at =
      ((static_cast<u64>(cache.layer_of(s)) * cache.num_sequences + cache.sequence_of(s)) *
           query_heads +
       head) *
          queries.count +
      own.skipped + row % own.count;
  wait_for_previous();
  const auto part_of = [&](u32 i, u32 d) noexcept {
    return __ldcg(
        reinterpret_cast<const float4*>(pieces.values + (base + u64{i} * pieces.rows) * width + d));
  };
  float4 early[ahead];
#pragma unroll
  for (u32 k = 0; k < ahead; ++k) {
    const u32 i = warp + k * attend_warps;
    if (i < count && lane * 4 < width) early[k] = part_of(i, lane * 4);
  }
  float top = sink;
  for (u32 i = threadIdx.x; i < count; i += attend_threads) {
    const float largest = pieces.sums[base + u64{i} * pieces.rows].largest;
    factor[i] = largest;
    top = fmaxf(top, largest);
  }
  top = max_lanes<warp_threads>(top);
  if (lane == 0) warp_part[0][warp] = top;
  __syncthreads();
  for (u32 w = 0; w < attend_warps; ++w) top = fmaxf(top, warp_part[0][w]);
  const float shift = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (u32 i = threadIdx.x; i < count; i += attend_threads) {
    const float largest = factor[i];
    factor[i] = largest == -INFINITY ? 1.0f : exp2f(largest - shift);  // of no numbers: NaN shows
    total += pieces.sums[base + u64{i} * pieces.rows].sum * factor[i];
  }
  total = sum_lanes<warp_threads>(total);
  if (lane == 0) warp_part[1][warp] = total;
  __syncthreads();
  total = sinks != nullptr ? exp2f(sink - shift) : 0.0f;
  for (u32 w = 0; w < attend_warps; ++w) total += warp_part[1][w];

  for (u32 column = 0; column < width; column += warp_threads * 4) {
    const u32 d = column + lane * 4;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto add = [&](const float4& part, u32 i) noexcept {
      sum.x = fmaf(part.x, factor[i], sum.x);
      sum.y = fmaf(part.y, factor[i], sum.y);
      sum.z = fmaf(part.z, factor[i], sum.z);
      sum.w = fmaf(part.w, factor[i], sum.w);
    };
    if (d < width) {
      u32 i = warp;
      if (column == 0) {
#pragma unroll
        for (u32 k = 0; k < ahead; ++k, i += attend_warps) {
          if (i < count) add(early[k], i);
        }
      }
#pragma unroll 4
      for (; i < count; i += attend_warps) add(part_of(i, d), i);
    }
    columns[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && d < width) {
      for (u32 w = 1; w < attend_warps; ++w) {
        const float4 part = columns[w][lane];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      float* to = values + at * width + d;  // the caller's: as aligned as a float
      to[0] = total != 0.0f ? sum.x / total : 0.0f;
      to[1] = total != 0.0f ? sum.y / total : 0.0f;
      to[2] = total != 0.0f ? sum.z / total : 0.0f;
      to[3] = total != 0.0f ? sum.w / total : 0.0f;
    }
    __syncthreads();
  }
  if (lse != nullptr && threadIdx.x == 0) {
    lse[at] = top == -INFINITY && total == 0.0f ? -INFINITY
                                                : (shift + log2f(total)) * 0.6931471805599453f;
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
