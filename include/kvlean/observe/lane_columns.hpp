// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvlean/core/row_tile.hpp"
#include "kvlean/observe/attention_scratch.hpp"
#include "kvlean/observe/row_group.hpp"

// Column sums of attention with vectors: up to 32 query rows at a time, one a lane.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Keys of a block: with their products and the queries they stay in the first cache level.
inline constexpr u32 lane_keys = 32;

/// Keys as floats: in place where they are that, else converted.
inline simd::ConstFloatRows float_keys(const Rows& keys, u32 segment, u32 first, u32 count,
                                       float* buffer) noexcept {
  if (is_contiguous_row(keys) && keys.dtype == DType::f32 && keys.token_stride > 0 &&
      straight_tokens(keys, first, count) == count) {
    const std::byte* at = row_address(keys, segment, first);
    if (reinterpret_cast<std::uintptr_t>(at) % alignof(float) == 0) {
      return {reinterpret_cast<const float*>(at), static_cast<u64>(keys.token_stride)};
    }
  }
  load_rows(keys, segment, first, count, buffer, keys.width);
  return {buffer, keys.width};
}

/// The same rows for a prefetch, where they are evenly spaced.
[[nodiscard]] inline simd::StridedAhead keys_ahead(const Rows& keys, u32 segment, u32 first,
                                                   u32 count) noexcept {
  if (count == 0 || !is_contiguous_row(keys) || straight_tokens(keys, first, count) != count) {
    return {};
  }
  const u32 element = static_cast<u32>(size_bytes(keys.dtype));
  return {row_address(keys, segment, first), keys.token_stride * static_cast<i64>(element), count,
          keys.width * element};
}

/// Adds the attention of the group's rows, at most lane_rows, to target(head)[token]. Powers of all
/// tokens wait in scratch.probabilities for the sums; with given sums, those of a tile of keys.
/// False, and nothing is added, where close_rows says so.
template <class Target>
[[nodiscard]] bool add_lane_columns(const CacheView& cache, const Queries& queries,
                                    const AttentionSpec& spec, RowGroup& group,
                                    const AttentionScratch& scratch, Target&& target) noexcept {
  const simd::MatrixKernels& kernels = simd::matrix_kernels(spec.target);
  const u32 width = cache.keys.width;
  const u32 lanes = padded_query_rows(group.rows);
  const bool given = queries.lse != nullptr;
  std::fill_n(scratch.queries, static_cast<u64>(lanes) * width, 0.0f);
  for (u32 r = 0; r < group.rows; ++r) {
    load_query(queries, group.query_head[r], group.query[r], scratch.keys);
    put_query_column(scratch.keys, width, r, scratch.queries, lanes);
  }
  const auto add_columns = [&](const float* x, u32 first, u32 count) noexcept {
    for_each_span(group, target, [&](u32 from, u32 to, float* out) noexcept {
      float weights[simd::lane_rows] = {};
      std::copy(group.weight + from, group.weight + to, weights + from);
      kernels.columns(x, count, lanes, weights, out + first);
    });
  };

  float bounds[2 * simd::tile_rows_limit];
  for (u32 first = group.seen.begin; first < group.seen.end; first += lane_keys) {
    const u32 count = std::min(lane_keys, group.seen.end - first);
    float* x =
        scratch.probabilities + (given ? 0 : static_cast<u64>(first - group.seen.begin) * lanes);
    const u32 next = std::min(lane_keys, group.seen.end - first - count);
    kernels.products({scratch.queries, lanes},
                     float_keys(cache.keys, group.segment, first, count, scratch.keys), count,
                     width, keys_ahead(cache.keys, group.segment, first + count, next), x);
    const simd::LaneLogits logits = lane_logits(cache, spec, group, first, count, bounds);
    if (group.unset != 0) {
      float largest[simd::lane_rows];
      std::fill_n(largest, simd::lane_rows, -std::numeric_limits<float>::infinity());
      kernels.maxima(x, count, lanes, logits, largest);
      set_shifts(largest, group);
    }
    float sums[simd::lane_rows] = {};
    kernels.powers(x, count, lanes, logits, sums);
    if (given) {
      add_columns(x, first, count);
    } else {
      for (u32 r = 0; r < group.rows; ++r) group.sum[r] += static_cast<double>(sums[r]);
    }
  }
  if (given) return true;
  if (!close_rows(spec, group)) return false;
  // Backwards: what was written last is still in the cache.
  const u32 length = group.seen.end - group.seen.begin;
  for (u32 block = (length + lane_keys - 1) / lane_keys; block-- > 0;) {
    const u32 from = block * lane_keys;
    add_columns(scratch.probabilities + static_cast<u64>(from) * lanes, group.seen.begin + from,
                std::min(lane_keys, length - from));
  }
  return true;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
