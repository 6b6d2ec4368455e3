// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_plan.cuh"
#include "kvlean/cuda/rotation.cuh"

// What weights go by: how far each term's key is from its pivot's. Distances are float, all that
// follows from them is double.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 distance_threads = 256;
inline constexpr u32 distance_lanes = 8;
inline constexpr u32 distance_each = 4;  ///< terms of a team
inline constexpr u32 distance_terms = distance_threads / distance_lanes * distance_each;

/// Squared distance of each term's key to its pivot's, into term_weight. Neighbouring terms share
/// their pivot mostly, so of two reads one is in the cache. Aligned: keys are compared at the
/// pivot's position.
template <DType D, bool Aligned>
__global__ void __launch_bounds__(distance_threads)
    measure_distances(const SetWork work, const WeightWork out, const Rotation rotation,
                      u32 blocks) {
  constexpr u32 each = elements_16<D>;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 terms = work.unit[s / work.heads_per_unit].links;
  const u32 first_of_block = blockIdx.x % blocks * distance_terms;
  if (first_of_block >= terms) return;
  const Segment segment = work.cache.segments[s];
  const u32 row_bytes = work.cache.key_width * element_bytes<D>;
  const u32 lane = threadIdx.x % distance_lanes;
  const u32 first = first_of_block + threadIdx.x / distance_lanes * distance_each;
  const char* row[distance_each];
  const char* pivot_row[distance_each];
  float distance[distance_each];
  i32 shift[distance_each];
  bool merges[distance_each];
#pragma unroll
  for (u32 i = 0; i < distance_each; ++i) {
    distance[i] = 0.0f;
    shift[i] = 0;
    const u32 pivot = first + i < terms ? out.term_pivot[s * work.stride + first + i] : no_token;
    merges[i] = pivot != no_token;
    const u32 token = merges[i] ? out.plan.term_token[out.plan.term(s, first + i)] : 0;
    row[i] = segment.key_row(token);  // without a branch, so that all loads are under way at once
    pivot_row[i] = segment.key_row(merges[i] ? pivot : 0);
    if constexpr (Aligned)
      if (merges[i]) shift[i] = segment.position(pivot) - segment.position(token);
  }
  for (u32 offset = lane * 16; offset < row_bytes; offset += distance_lanes * 16) {
    uint4 bits[distance_each];
    uint4 pivot_bits[distance_each];
#pragma unroll
    for (u32 i = 0; i < distance_each; ++i) {
      bits[i] = load_16_constant(row[i] + offset);
      pivot_bits[i] = load_16_constant(pivot_row[i] + offset);
    }
#pragma unroll
    for (u32 i = 0; i < distance_each; ++i) {
      float x[each];
      float p[each];
      unpack<D>(bits[i], x);
      unpack<D>(pivot_bits[i], p);
      if constexpr (Aligned) {
        if (merges[i]) {
#pragma unroll
          for (u32 k = 0; k < each; ++k) {
            const u32 element = offset / element_bytes<D> + k;
            const float partner = load_float<D>(row[i], rotation.partner(element));
            x[k] = rotation.turned(element, x[k], partner, shift[i]);
          }
        }
      }
#pragma unroll
      for (u32 k = 0; k < each; ++k) {
        const float difference = p[k] - x[k];
        distance[i] = fmaf(difference, difference, distance[i]);
      }
    }
  }
#pragma unroll
  for (u32 i = 0; i < distance_each; ++i) {
    distance[i] = sum_lanes<distance_lanes>(distance[i]);
    if (lane == i && merges[i]) {
      out.plan.term_weight[out.plan.term(s, first + i)] = distance[i];
    }
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
