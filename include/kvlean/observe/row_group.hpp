// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/observe/observation.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/simd/matrix_kernels.hpp"

// Query rows whose attention is summed over tokens together: what each sees, and its softmax so
// far. Logits are in units of log 2 here: powers of two take the place of exponentials.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr float log2_e = 1.44269504f;

/// Query rows of one segment, rows of a head together, and the state of each row's softmax.
struct RowGroup {
  u32 segment = 0;
  u32 rows = 0;
  u32 unset = 0;    ///< rows that see tokens and have no shift yet
  TokenRange seen;  ///< tokens that some row sees
  TokenRange all;   ///< tokens that every row sees
  u32 query_head[simd::tile_rows_limit] = {};
  u32 query[simd::tile_rows_limit] = {};  ///< index within the Queries
  TokenRange visible[simd::tile_rows_limit] = {};
  float minus_shift[simd::tile_rows_limit] = {};  ///< -inf: none yet, or all powers are zero
  double sum[simd::tile_rows_limit] = {};         ///< of 2^(y - shift)
  float weight[simd::tile_rows_limit] = {};       ///< what a power is multiplied with; pads: 0
};

/// Names the rows of `heads` query heads from `head` on, `count` queries each from `first` on.
inline void name_rows(const CacheView& cache, u32 segment, const Queries& queries,
                      const AttentionSpec& spec, u32 head, u32 heads, u32 first, u32 count,
                      RowGroup& group) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const bool given = queries.lse != nullptr;
  group.segment = segment;
  group.rows = heads * count;
  group.unset = 0;
  group.seen = {std::numeric_limits<u32>::max(), 0};
  group.all = {0, std::numeric_limits<u32>::max()};
  for (u32 i = 0; i < count; ++i) {
    const TokenRange range = visible_tokens(cache, segment, queries, spec, first + i);
    const bool empty = range.begin == range.end;
    group.all.begin = std::max(group.all.begin, range.begin);
    group.all.end = std::min(group.all.end, empty ? 0 : range.end);
    if (!empty) {
      group.seen.begin = std::min(group.seen.begin, range.begin);
      group.seen.end = std::max(group.seen.end, range.end);
    }
    for (u32 h = 0; h < heads; ++h) {
      const u32 r = h * count + i;
      group.query_head[r] = head + h;
      group.query[r] = first + i;
      group.visible[r] = range;
      group.minus_shift[r] = -inf;
      group.weight[r] = given ? 1.0f : 0.0f;
      group.sum[r] = 0.0;
      if (given) {
        const float lse = queries.lse[static_cast<u64>(head + h) * queries.count + first + i];
        if (lse != -inf) group.minus_shift[r] = -log2_e * lse;  // else nothing was seen
      } else if (!empty) {
        ++group.unset;
      }
    }
  }
  if (group.seen.end == 0) group.seen.begin = 0;
  const u32 padded = (group.rows + simd::lane_rows - 1) / simd::lane_rows * simd::lane_rows;
  std::fill(group.minus_shift + group.rows, group.minus_shift + padded, -inf);
  std::fill(group.weight + group.rows, group.weight + padded, 0.0f);
}

/// How products with tokens [first, first + count) become powers. `bounds` [2 * tile_rows_limit].
inline simd::LaneLogits lane_logits(const CacheView& cache, const AttentionSpec& spec,
                                    const RowGroup& group, u32 first, u32 count,
                                    float* bounds) noexcept {
  simd::LaneLogits logits;
  const float scale = spec.scale_for(cache.keys.width);
  logits.factor = spec.softcap > 0.0f ? scale / spec.softcap : scale * log2_e;
  logits.cap = spec.softcap > 0.0f ? spec.softcap * log2_e : 0.0f;
  logits.log_mass = cache.log_mass ? cache.log_mass.segment(group.segment) + first : nullptr;
  logits.minus_shift = group.minus_shift;
  if (group.all.begin <= first && first + count <= group.all.end) return logits;
  const auto relative = [&](u32 token) noexcept {  // exact in float
    return static_cast<float>(std::clamp(token, first, first + count) - first);
  };
  const u32 padded = (group.rows + simd::lane_rows - 1) / simd::lane_rows * simd::lane_rows;
  for (u32 r = 0; r < padded; ++r) {
    bounds[r] = r < group.rows ? relative(group.visible[r].begin) : 0.0f;
    bounds[simd::tile_rows_limit + r] = r < group.rows ? relative(group.visible[r].end) : 0.0f;
  }
  logits.begin = bounds;
  logits.end = bounds + simd::tile_rows_limit;
  return logits;
}

/// Gives rows without a shift the largest logit of some tokens that they saw. It only has to be
/// near the largest of all: a float's range is the room that there is.
inline void set_shifts(const float* largest, RowGroup& group) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (u32 r = 0; r < group.rows; ++r) {
    if (group.minus_shift[r] != -inf || largest[r] == -inf) continue;
    group.minus_shift[r] = -largest[r];
    --group.unset;
  }
}

/// Lets sinks join the sums and turns them to weights. False if some row's softmax needs the way
/// that takes care of NaN, infinity and logits over 69 above those it was shifted by.
[[nodiscard]] inline bool close_rows(const AttentionSpec& spec, RowGroup& group) noexcept {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (u32 r = 0; r < group.rows; ++r) {
    double sum = group.sum[r];
    const bool seen = group.minus_shift[r] != -inf;
    if (!seen && sum == 0.0) continue;  // weight 0, powers 0
    if (seen && spec.sink_logits != nullptr) {
      const double sink = static_cast<double>(spec.sink_logits[group.query_head[r]]);
      sum += std::exp2(sink * 1.4426950408889634 + static_cast<double>(group.minus_shift[r]));
    }
    if (!(sum > 1e-30 && sum < 1e30)) return false;
    group.weight[r] = static_cast<float>(1.0 / sum);
  }
  return true;
}

/// Calls body(first_row, last_row, target(head)) for every run of rows that goes to one target.
template <class Target, class Body>
void for_each_span(const RowGroup& group, Target&& target, Body&& body) noexcept {
  for (u32 first = 0; first < group.rows;) {
    float* to = target(group.query_head[first]);
    u32 last = first + 1;
    while (last < group.rows && (group.query_head[last] == group.query_head[last - 1] ||
                                 target(group.query_head[last]) == to)) {
      ++last;
    }
    body(first, last, to);
    first = last;
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
