// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_sets.cuh"

// Cosines of neighbouring keys: one pass over the keys. Each row is loaded once and serves both its
// neighbours.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 cosine_threads = 256;
inline constexpr u32 cosine_lanes = 8;
inline constexpr u32 cosine_blocks = 3;  // of a multiprocessor
inline constexpr u32 cosine_teams = cosine_threads / cosine_lanes;

/// The cosine of two keys from their product and norms, as adjacent_cosines() has it.
[[nodiscard]] KVLEAN_DEVICE float cosine_of(float product, float norm, float other) noexcept {
  const float scale = __fmul_rn(norm, other);
  return scale != 0.0f ? __fdiv_rn(product, scale) : 0.0f;
}

/// The link score of a token: its cosine where it and the next one may merge.
[[nodiscard]] KVLEAN_DEVICE float link_score(const SetWork& work, u32 u, u32 token,
                                             float cosine) noexcept {
  const u8* state = work.state + work.at(u, token);
  const bool may = state[0] == token_free && state[1] == token_free;
  return may ? cosine : __int_as_float(0x7fc00000);
}

/// Cosine of each key with the next: a team of 8 lanes takes `rows` rows in a row and the one after
/// them. Chunks: 16-byte pieces of a row that a lane holds at most.
template <DType D, u32 Chunks>
__global__ void __launch_bounds__(cosine_threads)
    adjacent_cosines(const SetWork work, float* cosine, bool masks, u32 rows, u32 blocks) {
  constexpr u32 each = elements_16<D>;
  constexpr u32 batch = Chunks >= 8 ? 1 : 8 / Chunks;  // rows whose loads are in flight
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = work.cache.lengths[s];
  const u32 first_of_block = blockIdx.x % blocks * cosine_teams * rows;
  if (first_of_block + 1 >= length) return;
  const Segment segment = work.cache.segments[s];
  const u32 row_bytes = work.cache.key_width * element_bytes<D>;
  const u32 lane = threadIdx.x % cosine_lanes;
  const u32 first = first_of_block + threadIdx.x / cosine_lanes * rows;
  const u32 end = smaller(first + rows + 1, length);  // one past the last row that is read
  float held[Chunks * each];                          // the row before
  float held_norm = 0.0f;
#pragma unroll
  for (u32 i = 0; i < Chunks * each; ++i) held[i] = 0.0f;
  // The lanes of a warp make every shuffle, so all go the same number of rounds.
  for (u32 at = 0; at < rows + 1; at += batch) {
    uint4 bits[batch][Chunks];
#pragma unroll
    for (u32 b = 0; b < batch; ++b) {
      const u32 token = first + at + b;
      const char* row = token < end ? segment.key_row(token) : nullptr;
#pragma unroll
      for (u32 c = 0; c < Chunks; ++c) {
        const u32 offset = (c * cosine_lanes + lane) * 16;
        bits[b][c] = row != nullptr && offset < row_bytes ? load_16_constant(row + offset)
                                                          : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (u32 b = 0; b < batch; ++b) {
      float product = 0.0f;
      float square = 0.0f;
#pragma unroll
      for (u32 c = 0; c < Chunks; ++c) {
        float x[each];
        unpack<D>(bits[b][c], x);
#pragma unroll
        for (u32 i = 0; i < each; ++i) {
          product = fmaf(x[i], held[c * each + i], product);
          square = fmaf(x[i], x[i], square);
          held[c * each + i] = x[i];
        }
      }
      product = sum_lanes<cosine_lanes>(product);
      const float norm = __fsqrt_rn(sum_lanes<cosine_lanes>(square));
      const u32 row_number = at + b;
      const u32 token = first + row_number;
      if (row_number != 0 && row_number <= rows && token < end &&
          lane == row_number % cosine_lanes) {
        const float value = cosine_of(product, held_norm, norm);
        cosine[s * work.stride + token - 1] = value;
        if (masks) {
          work.link[work.at(s, token - 1)] = link_score(work, s, token - 1, value);
        }
      }
      held_norm = norm;
    }
  }
}

/// The same for rows too wide to hold: both rows are read for every pair.
template <DType D>
__global__ void __launch_bounds__(cosine_threads)
    adjacent_cosines_wide(const SetWork work, float* cosine, bool masks, u32 blocks) {
  constexpr u32 each = elements_16<D>;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = work.cache.lengths[s];
  const u32 token = blockIdx.x % blocks * cosine_teams + threadIdx.x / cosine_lanes;
  const u32 lane = threadIdx.x % cosine_lanes;
  const u32 row_bytes = work.cache.key_width * element_bytes<D>;
  const bool fine = token + 1 < length;
  float product = 0.0f;
  float square = 0.0f;
  float other = 0.0f;
  if (fine) {
    const char* row = work.cache.segments[s].key_row(token);
    const char* next = work.cache.segments[s].key_row(token + 1);
    for (u32 offset = lane * 16; offset < row_bytes; offset += cosine_lanes * 16) {
      float x[each];
      float y[each];
      unpack<D>(load_16_constant(row + offset), x);
      unpack<D>(load_16_constant(next + offset), y);
#pragma unroll
      for (u32 i = 0; i < each; ++i) {
        product = fmaf(x[i], y[i], product);
        square = fmaf(x[i], x[i], square);
        other = fmaf(y[i], y[i], other);
      }
    }
  }
  product = sum_lanes<cosine_lanes>(product);
  square = sum_lanes<cosine_lanes>(square);
  other = sum_lanes<cosine_lanes>(other);
  if (!fine || lane != 0) return;
  const float value = cosine_of(product, __fsqrt_rn(square), __fsqrt_rn(other));
  cosine[s * work.stride + token] = value;
  if (masks) work.link[work.at(s, token)] = link_score(work, s, token, value);
}

/// Link scores from cosines that are there: averaged over a unit's heads, or of the run before.
template <int = 0>
__global__ void __launch_bounds__(256)
    mask_links(const SetWork work, const float* cosine, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / blocks;
  const u32 token = blockIdx.x % blocks * 256 + threadIdx.x;
  const SetUnit unit = work.unit[u];
  if (unit.active == 0 || token + 1 >= unit.length) return;
  const u32 heads = work.heads_per_unit;
  float value = cosine[u64{u} * heads * work.stride + token];
  for (u32 h = 1; h < heads; ++h) {
    value = __fadd_rn(value, cosine[(u64{u} * heads + h) * work.stride + token]);
  }
  if (heads > 1) value = __fdiv_rn(value, static_cast<float>(heads));
  work.link[work.at(u, token)] = link_score(work, u, token, value);
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
