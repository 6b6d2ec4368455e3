// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"
#include "kvlean/cuda/launch.cuh"

// Attention of few queries over ragged segments. The keys are cut into chunks of a fixed number of
// tokens, one block each, so a long segment is spread like many short ones; the chunks' outputs are
// joined by their log-sum-exp in a fixed order.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 attend_threads = 128;
inline constexpr u32 attend_warps = attend_threads / warp_threads;
inline constexpr u32 attend_rows = 16;  // query rows of a block: heads of a group times queries

/// What a chunk leaves for each row: sum of 2^(x - largest) v, unscaled, and the two numbers.
struct ChunkOutputs {
  float* values = nullptr;  ///< [segments][row_tiles][chunks][attend_rows][value_width]
  RowSum* sums = nullptr;   ///< [segments][row_tiles][chunks][attend_rows]
  u32 chunk_tokens = 0;
  u32 chunks = 0;
  u32 row_tiles = 0;

  [[nodiscard]] KVLEAN_HOST_DEVICE u64 at(u32 s, u32 tile, u32 chunk) const noexcept {
    return (static_cast<u64>(s) * row_tiles + tile) * chunks + chunk;
  }
};

/// Weights of 16 keys as the first factor of the product with their values, and what was lost by
/// rounding them.
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

/// Blocks (chunk, segment, row tile). A warp takes 16 keys at a time: logits from key rows read
/// straight into registers, weights kept where the second product wants them, values paired by key.
template <class E, u32 Width, bool Capped>
__global__ void __launch_bounds__(attend_threads)
    attend_kernel(const CacheView cache, const Queries queries, const Attention attention,
                  const LogitSpec logits, const ChunkOutputs outputs) {
  constexpr u32 groups = Width / 32;             // of a key row: 64 bytes
  constexpr u32 each = Width % 64 == 0 ? 8 : 4;  // value elements of a lane in a unit
  constexpr u32 units = Width / (8 * each);
  __shared__ float joined[attend_rows][Width + 4];
  __shared__ RowSum warp_sum[attend_warps][attend_rows];

  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 first = blockIdx.x * outputs.chunk_tokens;
  if (first >= length) return;
  const u32 last = smaller(first + outputs.chunk_tokens, length);
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 rows = own.count * cache.group_size;
  const u32 first_row = blockIdx.z * attend_rows;
  if (first_row >= rows) return;
  const u32 here_rows = smaller(attend_rows, rows - first_row);
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 column = lane % 4;
  const u32 upper = lane / 4;  // this lane's rows: upper and upper + 8

  u32 query[groups * 2][4];
  i32 first_seen[2];
  i32 last_seen[2];
  {
    const u32 row0 = smaller(first_row + upper, rows - 1);
    const u32 row1 = smaller(first_row + upper + 8, rows - 1);
    const char* q0 = own.row(row0 / own.count, row0 % own.count) + column * 16;
    const char* q1 = own.row(row1 / own.count, row1 % own.count) + column * 16;
#pragma unroll
    for (u32 g = 0; g < groups; ++g) {
      const uint4 x = load_16_constant(q0 + g * 64);
      const uint4 y = load_16_constant(q1 + g * 64);
      query[2 * g][0] = x.x;
      query[2 * g][1] = y.x;
      query[2 * g][2] = x.y;
      query[2 * g][3] = y.y;
      query[2 * g + 1][0] = x.z;
      query[2 * g + 1][1] = y.z;
      query[2 * g + 1][2] = x.w;
      query[2 * g + 1][3] = y.w;
      settle(query[2 * g]);
      settle(query[2 * g + 1]);
    }
    first_seen[0] = own.first_seen(row0 % own.count);
    last_seen[0] = own.last_seen(row0 % own.count);
    first_seen[1] = own.first_seen(row1 % own.count);
    last_seen[1] = own.last_seen(row1 % own.count);
  }

  float sum_of[units][each][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  for (u32 token = first + warp * 16; token < last; token += attend_warps * 16) {
    // Keys: lane reads row token + 8 n + upper, 16 bytes of each 64.
    uint4 key[2][groups];
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
      const char* row = segment.key_row(smaller(token + 8 * n + upper, last - 1)) + column * 16;
#pragma unroll
      for (u32 g = 0; g < groups; ++g) key[n][g] = load_16_once(row + g * 64);
    }
    // Values: rows token + 2 column + {0, 1, 8, 9}, `each` elements from upper * each of each unit.
    uint4 value[4][units];
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
      const u32 t = smaller(token + 2 * column + (r & 1u) + (r & 2u) * 4, last - 1);
      const char* row = segment.value_row(t) + upper * each * 2;
#pragma unroll
      for (u32 u = 0; u < units; ++u) {
        if constexpr (each == 8) {
          value[r][u] = load_16_once(row + u * 128);
        } else {
          const uint2 half = __ldg(reinterpret_cast<const uint2*>(row + u * 64));
          value[r][u] = make_uint4(half.x, half.y, 0, 0);
        }
      }
    }
    float product[2][4] = {};
#pragma unroll
    for (u32 g = 0; g < groups; ++g) {
#pragma unroll
      for (u32 n = 0; n < 2; ++n)
        multiply_add<E>(product[n], query[2 * g], key[n][g].x, key[n][g].y);
#pragma unroll
      for (u32 n = 0; n < 2; ++n) {
        multiply_add<E>(product[n], query[2 * g + 1], key[n][g].z, key[n][g].w);
      }
    }
    // x[row half][n][j]: row upper + 8 half, key token + 8 n + 2 column + j.
    float x[2][4];
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const u32 t = token + 8 * n + 2 * column + j;
        const bool here = t < last;
        const float bias = here ? segment.mass_bias(t) * log2_e : 0.0f;
        const i32 at = here ? segment.position(t) : unseen_position;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          const float exponent = logits.template exponent<Capped>(product[n][half * 2 + j], bias);
          x[half][n * 2 + j] = at > last_seen[half] || at < first_seen[half] ? -INFINITY : exponent;
        }
      }
    }
    u32 high[4];
    u32 low[4];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      float top = fmaxf(fmaxf(x[half][0], x[half][1]), fmaxf(x[half][2], x[half][3]));
      top = fmaxf(top, __shfl_xor_sync(full_warp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(full_warp, top, 2));
      top = fmaxf(top, largest[half]);
      if (top > largest[half]) {
        const float shrink = exp2_approximate(largest[half] - top);
        total[half] *= shrink;
        largest[half] = top;
#pragma unroll
        for (u32 u = 0; u < units; ++u) {
#pragma unroll
          for (u32 e = 0; e < each; ++e) {
            sum_of[u][e][half * 2] *= shrink;
            sum_of[u][e][half * 2 + 1] *= shrink;
          }
        }
      }
      const float shift = top == -INFINITY ? 0.0f : top;
      float weight[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        weight[i] = exp2_approximate(x[half][i] - shift);
        total[half] += weight[i];
      }
      split_weights<E>(weight[0], weight[1], high[half], low[half]);
      split_weights<E>(weight[2], weight[3], high[half + 2], low[half + 2]);
    }
    __syncwarp();
    // Rows behind the last are no tokens: their words are zero, as 0 times NaN is not.
    const bool ragged = token + 16 > last;
#pragma unroll
    for (u32 u = 0; u < units; ++u) {
#pragma unroll
      for (u32 pair = 0; pair < each / 2; ++pair) {
        u32 word[4];
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
          word[r] = pair == 0   ? value[r][u].x
                    : pair == 1 ? value[r][u].y
                    : pair == 2 ? value[r][u].z
                                : value[r][u].w;
          if (ragged && token + 2 * column + (r & 1u) + (r & 2u) * 4 >= last) word[r] = 0;
        }
        const u32 even0 = __byte_perm(word[0], word[1], 0x5410);
        const u32 even1 = __byte_perm(word[2], word[3], 0x5410);
        const u32 odd0 = __byte_perm(word[0], word[1], 0x7632);
        const u32 odd1 = __byte_perm(word[2], word[3], 0x7632);
        multiply_add<E>(sum_of[u][2 * pair], high, even0, even1);
        multiply_add<E>(sum_of[u][2 * pair + 1], high, odd0, odd1);
        multiply_add<E>(sum_of[u][2 * pair], low, even0, even1);
        multiply_add<E>(sum_of[u][2 * pair + 1], low, odd0, odd1);
      }
    }
  }
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(full_warp, total[half], 1);
    total[half] += __shfl_xor_sync(full_warp, total[half], 2);
    if (column == 0) warp_sum[warp][upper + 8 * half] = RowSum{largest[half], total[half]};
  }
  __syncthreads();
  // Warps add their outputs one after the other, relative to the largest of all.
  float factor[2];
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    float top = -INFINITY;
    for (u32 w = 0; w < attend_warps; ++w) {
      top = fmaxf(top, warp_sum[w][upper + 8 * half].largest);
    }
    factor[half] = top == -INFINITY ? 0.0f : exp2_approximate(largest[half] - top);
    if (top == -INFINITY && total[half] != 0.0f) factor[half] = 1.0f;  // NaN must show
  }
  for (u32 w = 0; w < attend_warps; ++w) {
    if (w == warp) {
#pragma unroll
      for (u32 u = 0; u < units; ++u) {
#pragma unroll
        for (u32 e = 0; e < each; ++e) {
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            // Column n of product e is element unit * 8 * each + n * each + e.
            const u32 element = (u * 8 + 2 * column + (i & 1u)) * each + e;
            const u32 half = i / 2;
            if (upper + 8 * half >= here_rows) continue;
            float& to = joined[upper + 8 * half][element];
            const float part = sum_of[u][e][i] * factor[half];
            to = w == 0 ? part : to + part;
          }
        }
      }
    }
    __syncthreads();
  }
  const u64 chunk = outputs.at(s, blockIdx.z, blockIdx.x) * attend_rows;
  for (u32 i = threadIdx.x; i < here_rows * Width; i += attend_threads) {
    outputs.values[chunk * Width + i] = joined[i / Width][i % Width];
  }
  if (threadIdx.x < attend_rows) {
    RowSum all{-INFINITY, 0.0f};
    for (u32 w = 0; w < attend_warps; ++w) {
      all.largest = fmaxf(all.largest, warp_sum[w][threadIdx.x].largest);
    }
    for (u32 w = 0; w < attend_warps; ++w) {
      const RowSum& part = warp_sum[w][threadIdx.x];
      all.sum += all.largest == -INFINITY ? part.sum
                                          : part.sum * exp2_approximate(part.largest - all.largest);
    }
    outputs.sums[chunk + threadIdx.x] = all;
  }
}

/// The same for every type and width, a warp a key: binary32 caches, and shapes without tensor-core
/// code. Blocks (chunk, segment, row tile).
template <DType K, DType V, bool Capped>
__global__ void __launch_bounds__(attend_threads)
    attend_any_kernel(const CacheView cache, const Queries queries, const Attention attention,
                      const LogitSpec logits, const ChunkOutputs outputs) {
  extern __shared__ float chunk_floats[];  // queries [16][key width], then sums [16][value width]
  __shared__ float weights[attend_rows][attend_threads];
  __shared__ float top_of[attend_rows];
  __shared__ float sum_of[attend_rows];
  __shared__ float shrink_of[attend_rows];
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 first = blockIdx.x * outputs.chunk_tokens;
  if (first >= length) return;
  const u32 last = smaller(first + outputs.chunk_tokens, length);
  const Segment segment = cache.segments[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 rows = own.count * cache.group_size;
  const u32 first_row = blockIdx.z * attend_rows;
  if (first_row >= rows) return;
  const u32 here_rows = smaller(attend_rows, rows - first_row);
  const u32 key_width = cache.key_width;
  const u32 value_width = cache.value_width;
  float* query = chunk_floats;
  float* sum = chunk_floats + attend_rows * key_width;
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
  const u64 chunk = outputs.at(s, blockIdx.z, blockIdx.x) * attend_rows;
  for (u32 i = threadIdx.x; i < attend_rows * value_width; i += attend_threads) {
    outputs.values[chunk * value_width + i] = sum[i];
  }
  if (threadIdx.x < attend_rows) {
    outputs.sums[chunk + threadIdx.x] = RowSum{top_of[threadIdx.x], sum_of[threadIdx.x]};
  }
}

/// Joins the chunks of a row. Blocks (row of the group, segment).
template <int = 0>
__global__ void __launch_bounds__(attend_threads)
    join_chunks_kernel(const CacheView cache, const Queries queries, const Attention attention,
                       const ChunkOutputs outputs, float* values, float* lse) {
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
  const u32 row = blockIdx.x;
  if (row >= own.count * cache.group_size) return;
  const u32 chunks = ceil_div(length, outputs.chunk_tokens);
  const u32 head = cache.head_of(s) * cache.group_size + row / own.count;
  const u32 query_heads = cache.kv_heads * cache.group_size;
  const u64 base = outputs.at(s, row / attend_rows, 0) * attend_rows + row % attend_rows;
  float top = -INFINITY;
  for (u32 c = threadIdx.x; c < chunks; c += attend_threads) {
    top = fmaxf(top, outputs.sums[base + static_cast<u64>(c) * attend_rows].largest);
  }
  __shared__ float tops[attend_warps];
  top = max_lanes<32>(top);
  if (threadIdx.x % warp_threads == 0) tops[threadIdx.x / warp_threads] = top;
  __syncthreads();
  for (u32 w = 0; w < attend_warps; ++w) top = fmaxf(top, tops[w]);
  const float* sinks = attention.sink_logits != nullptr
                           ? attention.sink_logits + cache.layer_of(s) * query_heads
                           : nullptr;
  const float sink = sinks != nullptr ? sinks[head] * log2_e : -INFINITY;
  top = fmaxf(top, sink);
  const float shift = top == -INFINITY ? 0.0f : top;
  // Every thread sums the same numbers in the same order.
  float total = sinks != nullptr ? exp2f(sink - shift) : 0.0f;
  for (u32 c = 0; c < chunks; ++c) {
    const RowSum& part = outputs.sums[base + static_cast<u64>(c) * attend_rows];
    total += part.sum * (part.largest == -INFINITY ? 1.0f : exp2f(part.largest - shift));
  }
  const u32 width = cache.value_width;
  const u64 at =
      ((static_cast<u64>(cache.layer_of(s)) * cache.num_sequences + cache.sequence_of(s)) *
           query_heads +
       head) *
          queries.count +
      own.skipped + row % own.count;
  for (u32 d = threadIdx.x; d < width; d += attend_threads) {
    float sum = 0.0f;
    for (u32 c = 0; c < chunks; ++c) {
      const u64 part = base + static_cast<u64>(c) * attend_rows;
      const float largest = outputs.sums[part].largest;
      sum +=
          outputs.values[part * width + d] * (largest == -INFINITY ? 1.0f : exp2f(largest - shift));
    }
    values[at * width + d] = total != 0.0f ? sum / total : 0.0f;
  }
  if (lse != nullptr && threadIdx.x == 0) {
    lse[at] = top == -INFINITY && total == 0.0f ? -INFINITY
                                                : (shift + log2f(total)) * 0.6931471805599453f;
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
