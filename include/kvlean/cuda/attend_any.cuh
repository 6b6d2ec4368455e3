// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_split.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 attend_any_blocks = 4;  // of a multiprocessor

/// attend_kernel for every type and width, a warp a key: binary32 caches, and shapes without
/// tensor-core code.
template <DType K, DType V, bool Capped>
__global__ void __launch_bounds__(attend_threads, attend_any_blocks)
    attend_any_kernel(const CacheView cache, const Queries queries, const Attention attention,
                      const LogitSpec logits, const AttendPieces pieces) {
  // Queries [16][key width], then sums [16][value width].
  extern __shared__ float piece_floats[];
  __shared__ float weights[attend_rows][attend_threads];
  __shared__ float top_of[attend_rows];
  __shared__ float sum_of[attend_rows];
  __shared__ float shrink_of[attend_rows];
  __shared__ AttendSplitScratch scratch;
  allow_next();
  for_each_piece(cache, queries, pieces, scratch, [&](const AttendPiece& piece) {
    const u32 s = piece.unit / pieces.row_tiles;
    const u32 length = cache.lengths[s];
    const u32 first = piece.first;
    const u32 last = piece.last;
    const Segment segment = cache.segments[s];
    const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
    const u32 rows = own.count * cache.group_size;
    const u32 first_row = piece.unit % pieces.row_tiles * attend_rows;
    const u32 here_rows = smaller(attend_rows, rows - first_row);
    const u32 key_width = cache.key_width;
    const u32 value_width = cache.value_width;
    float* query = piece_floats;
    float* sum = piece_floats + attend_rows * key_width;
    for (u32 i = threadIdx.x; i < attend_rows * key_width; i += attend_threads) {
      const u32 row = first_row + smaller(i / key_width, here_rows - 1);
      query[i] = load_float<K>(own.row(row / own.count, row % own.count), i % key_width);
    }
    for (u32 i = threadIdx.x; i < attend_rows * value_width; i += attend_threads) sum[i] = 0.0f;
    if (threadIdx.x < attend_rows) {
      top_of[threadIdx.x] = -INFINITY;
      sum_of[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    const u32 warp = threadIdx.x / warp_threads;
    const u32 lane = threadIdx.x % warp_threads;
    for (u32 token = first; token < last; token += attend_threads) {
      const u32 count = smaller(attend_threads, last - token);
      for (u32 i = warp; i < count; i += attend_warps) {
        const char* row = segment.key_row(token + i);
        const float bias = segment.mass_bias(token + i) * log2_e;
        const i32 at = segment.position(token + i);
        for (u32 r = 0; r < here_rows; ++r) {
          float product = 0.0f;
          for (u32 d = lane; d < key_width; d += warp_threads) {
            product = fmaf(query[r * key_width + d], load_float<K>(row, d), product);
          }
          product = sum_lanes<32>(product);
          const u32 q = (first_row + r) % own.count;
          if (lane == 0) {
            weights[r][i] = at > own.last_seen(q) || at < own.first_seen(q)
                                ? -INFINITY
                                : logits.template exponent<Capped>(product, bias);
          }
        }
      }
      __syncthreads();
      for (u32 r = warp; r < here_rows; r += attend_warps) {
        float top = top_of[r];
        for (u32 i = lane; i < count; i += warp_threads) top = fmaxf(top, weights[r][i]);
        top = max_lanes<32>(top);
        const float shift = top == -INFINITY ? 0.0f : top;
        float part = 0.0f;
        for (u32 i = lane; i < count; i += warp_threads) {
          const float weight = exp2f(weights[r][i] - shift);
          weights[r][i] = weight;
          part += weight;
        }
        part = sum_lanes<32>(part);
        __syncwarp();  // every lane has read top_of
        if (lane == 0) {
          const float shrink = top == -INFINITY ? 1.0f : exp2f(top_of[r] - top);
          shrink_of[r] = shrink;
          sum_of[r] = sum_of[r] * shrink + part;
          top_of[r] = top;
        }
      }
      __syncthreads();
      for (u32 d = threadIdx.x; d < value_width; d += attend_threads) {
        float part[attend_rows];
        for (u32 r = 0; r < attend_rows; ++r) {
          part[r] = r < here_rows ? sum[r * value_width + d] * shrink_of[r] : 0.0f;
        }
        for (u32 i = 0; i < count; ++i) {
          const float v = load_float<V>(segment.value_row(token + i), d);
#pragma unroll
          for (u32 r = 0; r < attend_rows; ++r) {
            // Unseen values may be NaN.
            if (r < here_rows && weights[r][i] != 0.0f) part[r] = fmaf(weights[r][i], v, part[r]);
          }
        }
        for (u32 r = 0; r < here_rows; ++r) sum[r * value_width + d] = part[r];
      }
      __syncthreads();
    }
    const u64 row = pieces.row(blockIdx.x, piece.unit, 0);
    for (u32 i = threadIdx.x; i < here_rows * value_width; i += attend_threads) {
      pieces.values[row * value_width + i] = sum[i];
    }
    if (threadIdx.x < here_rows) {
      pieces.sums[row + threadIdx.x] = RowSum{top_of[threadIdx.x], sum_of[threadIdx.x]};
    }
    __syncthreads();
  });
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
