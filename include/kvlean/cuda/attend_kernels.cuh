// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_stage.cuh"

// Attention of few queries by tensor cores. No warp waits for another before the end of a piece.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Weights of 16 keys as a factor of the product with their values, and what was lost by rounding
/// them.
template <class E>
KVLEAN_DEVICE void split_weights(float x, float y, u32& high, u32& low) noexcept {
  if constexpr (__is_same(E, __nv_bfloat16)) {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    const float2 back = __bfloat1622float2(rounded);
    const __nv_bfloat162 rest = __floats2bfloat162_rn(x - back.x, y - back.y);
    high = *reinterpret_cast<const u32*>(&rounded);
    low = *reinterpret_cast<const u32*>(&rest);
  } else {
    const __half2 rounded = __floats2half2_rn(x, y);
    const float2 back = __half22float2(rounded);
    const __half2 rest = __floats2half2_rn(x - back.x, y - back.y);
    high = *reinterpret_cast<const u32*>(&rounded);
    low = *reinterpret_cast<const u32*>(&rest);
  }
}

/// What a warp has of a piece: for its rows the sums of weighted values, unscaled. Narrow: at most
/// 8 rows. Then they are the columns of the second product (values times weights) and not its rows,
/// of which half would be idle.
template <class E, u32 Width, bool Capped, bool Narrow>
struct AttendWarp {
  using Stage = AttendStage<Width>;
  static constexpr u32 groups = Width / 32;  // of a key row: 64 bytes
  static constexpr u32 parts = Width / 16;   // of a value row
  static constexpr u32 halves = Narrow ? 1 : 2;
  static constexpr u32 rows = 8 * halves;

  u32 query[groups * 2][2 * halves];
  i32 first_seen[halves];  ///< of rows lane / 4 and lane / 4 + 8
  i32 last_seen[halves];
  float sum_of[parts * halves][4];
  float largest[halves];
  float total[halves];

  /// Rows from first_row on; behind the last, that again.
  KVLEAN_DEVICE void begin(const SegmentQueries& own, u32 first_row, u32 all_rows) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
#pragma unroll
    for (u32 half = 0; half < halves; ++half) {
      const u32 row = smaller(first_row + lane / 4 + 8 * half, all_rows - 1);
      const char* from = own.row(row / own.count, row % own.count) + lane % 4 * 16;
#pragma unroll
      for (u32 g = 0; g < groups; ++g) {
        const uint4 x = load_16_constant(from + g * 64);
        query[2 * g][half] = x.x;
        query[2 * g][halves + half] = x.y;
        query[2 * g + 1][half] = x.z;
        query[2 * g + 1][halves + half] = x.w;
      }
      first_seen[half] = own.first_seen(row % own.count);
      last_seen[half] = own.last_seen(row % own.count);
      largest[half] = -INFINITY;
      total[half] = 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < parts * halves; ++i) {
#pragma unroll
      for (float& x : sum_of[i]) x = 0.0f;
    }
  }

  /// Adds the tile at `token`, which lies in `stage`.
  KVLEAN_DEVICE void add(const char* stage, u32 shared, const LogitSpec& logits, u32 token,
                         u32 last, bool has_mass, bool has_positions) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 column = lane % 4;
    // Keys: lane reads row 8 n + lane / 4, 16 bytes of each 64.
    float product[2][4] = {};
    const char* keys = stage + lane / 4 * Stage::row_bytes + column * 16;
    const u32 key_swap = Stage::key_swap(lane / 4) * 16;
#pragma unroll
    for (u32 g = 0; g < groups; ++g) {
      const char* from = g % 2 == 0 ? keys + key_swap : keys - key_swap;
      const uint4 key0 = load_16(from + g * 64);
      const uint4 key1 = load_16(from + 8 * Stage::row_bytes + g * 64);
      u32 a[4];
      factor_of(query[2 * g], a);
      multiply_add<E>(product[0], a, key0.x, key0.y);
      multiply_add<E>(product[1], a, key1.x, key1.y);
      factor_of(query[2 * g + 1], a);
      multiply_add<E>(product[0], a, key0.z, key0.w);
      multiply_add<E>(product[1], a, key1.z, key1.w);
    }
    // x[half][2 n + j]: row lane / 4 + 8 half, key 8 n + 2 column + j.
    float x[halves][4];
    const float* masses = reinterpret_cast<const float*>(stage + Stage::masses);
    const i32* positions = reinterpret_cast<const i32*>(stage + Stage::positions);
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
      float2 bias = {0.0f, 0.0f};
      if (has_mass) bias = *reinterpret_cast<const float2*>(masses + 8 * n + 2 * column);
      const u32 t = token + 8 * n + 2 * column;
      int2 at = {static_cast<i32>(t), static_cast<i32>(t + 1)};
      if (has_positions) at = *reinterpret_cast<const int2*>(positions + 8 * n + 2 * column);
      if (t >= last) at.x = unseen_position;
      if (t + 1 >= last) at.y = unseen_position;
#pragma unroll
      for (u32 half = 0; half < halves; ++half) {
        const float x0 = logits.template exponent<Capped>(product[n][half * 2], bias.x * log2_e);
        const float x1 =
            logits.template exponent<Capped>(product[n][half * 2 + 1], bias.y * log2_e);
        x[half][n * 2] = at.x > last_seen[half] || at.x < first_seen[half] ? -INFINITY : x0;
        x[half][n * 2 + 1] = at.y > last_seen[half] || at.y < first_seen[half] ? -INFINITY : x1;
      }
    }
    // Weights relative to the largest so far, which the sums follow.
    float shrink[halves];
    bool grows = false;
#pragma unroll
    for (u32 half = 0; half < halves; ++half) {
      float top = fmaxf(fmaxf(x[half][0], x[half][1]), fmaxf(x[half][2], x[half][3]));
      top = fmaxf(top, __shfl_xor_sync(full_warp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(full_warp, top, 2));
      top = fmaxf(top, largest[half]);
      const bool more = top > largest[half];
      shrink[half] = more ? exp2_approximate(largest[half] - top) : 1.0f;
      grows = grows || more;
      largest[half] = top;
    }
    if (__any_sync(full_warp, grows)) {
      float column_shrink[2];
      if constexpr (Narrow) {
        column_shrink[0] = __shfl_sync(full_warp, shrink[0], column * 8);
        column_shrink[1] = __shfl_sync(full_warp, shrink[0], column * 8 + 4);
      }
#pragma unroll
      for (u32 half = 0; half < halves; ++half) total[half] *= shrink[half];
#pragma unroll
      for (u32 i = 0; i < parts * halves; ++i) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
          if constexpr (Narrow) {
            sum_of[i][j] *= column_shrink[j % 2];
          } else {
            sum_of[i][j] *= shrink[j / 2];
          }
        }
      }
    }
    u32 high[4];
    u32 low[4];
#pragma unroll
    for (u32 half = 0; half < halves; ++half) {
      const float shift = largest[half] == -INFINITY ? 0.0f : largest[half];
      float weight[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        weight[i] = exp2_approximate(x[half][i] - shift);
        total[half] += weight[i];
      }
      split_weights<E>(weight[0], weight[1], high[half], low[half]);
      split_weights<E>(weight[2], weight[3], high[half + 2], low[half + 2]);
    }
    // Values, transposed 8 by 8: keys 0 to 7 with elements 0 to 7 and 8 to 15 of a part, then keys
    // 8 to 15.
    const u32 row = lane % 8 + lane / 16 * 8;
    const u32 row_place = shared + Stage::values + row * Stage::row_bytes;
    const u32 chunk = lane / 8 % 2;
    const u32 swap = Stage::value_swap(row);
#pragma unroll
    for (u32 m = 0; m < parts; ++m) {
      u32 v[4];
      load_transposed(v, row_place + ((2 * m + chunk) ^ swap) * 16);
      if constexpr (Narrow) {
        multiply_add<E>(sum_of[m], v, high[0], high[2]);
        multiply_add<E>(sum_of[m], v, low[0], low[2]);
      } else {
        multiply_add<E>(sum_of[2 * m], high, v[0], v[2]);
        multiply_add<E>(sum_of[2 * m + 1], high, v[1], v[3]);
        multiply_add<E>(sum_of[2 * m], low, v[0], v[2]);
        multiply_add<E>(sum_of[2 * m + 1], low, v[1], v[3]);
      }
    }
  }

  /// Adds up the warps' sums and writes the piece's rows. The whole block calls; `joined`
  /// [warps][rows][Width + 4] is memory that no copy and no other warp uses after the first
  /// barrier.
  KVLEAN_DEVICE void finish(float* joined, RowSum (&warp_sum)[attend_warps][attend_rows],
                            u32 here_rows, float* values, RowSum* sums) noexcept {
    constexpr u32 stride = Width + 4;
    static_assert(attend_warps * rows * stride * sizeof(float) <= Stage::block_bytes);
    const u32 warp = threadIdx.x / warp_threads;
    const u32 lane = threadIdx.x % warp_threads;
    const u32 column = lane % 4;
    const u32 upper = lane / 4;
#pragma unroll
    for (u32 half = 0; half < halves; ++half) {
      total[half] += __shfl_xor_sync(full_warp, total[half], 1);
      total[half] += __shfl_xor_sync(full_warp, total[half], 2);
      if (column == 0) warp_sum[warp][upper + 8 * half] = RowSum{largest[half], total[half]};
    }
    __syncthreads();
    float* own = joined + warp * (rows * stride);
#pragma unroll
    for (u32 i = 0; i < parts * halves; ++i) {
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 r = Narrow ? 2 * column + j % 2 : upper + 8 * (j / 2);
        const u32 element = Narrow ? i * 16 + upper + 8 * (j / 2) : i * 8 + 2 * column + j % 2;
        own[r * stride + element] = sum_of[i][j];
      }
    }
    __syncthreads();
    // In the order of warps, relative to the largest of all.
    for (u32 i = threadIdx.x; i < here_rows * Width; i += attend_threads) {
      const u32 r = i / Width;
      const float top = largest_of(warp_sum, r);
      float sum = 0.0f;
#pragma unroll
      for (u32 w = 0; w < attend_warps; ++w) {
        const float part = joined[(w * rows + r) * stride + i % Width];
        sum = fmaf(part, factor_to(warp_sum[w][r].largest, top), sum);
      }
      values[i] = sum;
    }
    if (threadIdx.x < here_rows) {
      const float top = largest_of(warp_sum, threadIdx.x);
      float sum = 0.0f;
#pragma unroll
      for (u32 w = 0; w < attend_warps; ++w) {
        const RowSum& part = warp_sum[w][threadIdx.x];
        sum = fmaf(part.sum, factor_to(part.largest, top), sum);
      }
      sums[threadIdx.x] = RowSum{top, sum};
    }
    __syncthreads();
  }

 private:
  KVLEAN_DEVICE static void factor_of(const u32 (&from)[2 * halves], u32 (&a)[4]) noexcept {
    a[0] = from[0];
    a[1] = Narrow ? 0 : from[1];
    a[2] = from[halves];
    a[3] = Narrow ? 0 : from[2 * halves - 1];
  }
  [[nodiscard]] static KVLEAN_DEVICE float largest_of(
      const RowSum (&warp_sum)[attend_warps][attend_rows], u32 r) noexcept {
    float top = -INFINITY;
    for (u32 w = 0; w < attend_warps; ++w) top = fmaxf(top, warp_sum[w][r].largest);
    return top;
  }
  /// Where no weight is a number the sums stay: NaN must show.
  [[nodiscard]] static KVLEAN_DEVICE float factor_to(float largest_here, float top) noexcept {
    return top == -INFINITY ? 1.0f : exp2_approximate(largest_here - top);
  }
};

/// Blocks share all tiles evenly. A warp takes every fourth tile of a piece.
template <class E, u32 Width, bool Capped, bool Narrow>
__global__ void __launch_bounds__(attend_threads, AttendStage<Width>::blocks)
    attend_kernel(const CacheView cache, const Queries queries, const Attention attention,
                  const LogitSpec logits, const AttendPieces pieces) {
  using Stage = AttendStage<Width>;
  extern __shared__ __align__(16) char attend_stages[];
  __shared__ RowSum warp_sum[attend_warps][attend_rows];
  __shared__ AttendSplitScratch scratch;
  allow_next();
  if (threadIdx.x < cache.num_segments()) prefetch_line(cache.segments + threadIdx.x);
  const u32 warp = threadIdx.x / warp_threads;
  char* stages = attend_stages + warp * (Stage::count * Stage::bytes);
  const u32 shared = shared_address(stages);
  for_each_piece(cache, queries, pieces, scratch, [&](const AttendPiece& piece) {
    const u32 s = piece.unit / pieces.row_tiles;
    const Segment segment = cache.segments[s];
    const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, cache.lengths[s]);
    const u32 rows = own.count * cache.group_size;
    const u32 first_row = piece.unit % pieces.row_tiles * attend_rows;
    constexpr u32 step = attend_warps * attend_tile;
    constexpr u32 all_stages = Stage::count * Stage::bytes;
    const u32 begin = piece.first + warp * attend_tile;
    AttendWarp<E, Width, Capped, Narrow> work;
    work.begin(own, first_row, rows);
    AttendFeed<Width> feed(segment, begin, piece.last);
    // The first rounds only fill stages.
    u32 token = begin;
    u32 empty = Stage::count - 1;
    u32 fill = 0;
    u32 stage = 0;
    while (token < piece.last) {
      if (empty == 0) wait_for_copies<static_cast<int>(Stage::count) - 2>();
      __syncwarp();
      feed.next(shared + fill, segment, step);
      fill = fill + Stage::bytes == all_stages ? 0 : fill + Stage::bytes;
      if (empty != 0) {
        --empty;
        continue;
      }
      work.add(stages + stage, shared + stage, logits, token, piece.last,
               segment.log_mass != nullptr, segment.positions != nullptr);
      stage = stage + Stage::bytes == all_stages ? 0 : stage + Stage::bytes;
      token += step;
    }
    const u64 row = pieces.row(blockIdx.x, piece.unit, 0);
    work.finish(reinterpret_cast<float*>(attend_stages), warp_sum,
                smaller(attend_rows, rows - first_row), pieces.values + row * Width,
                pieces.sums + row);
  });
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
