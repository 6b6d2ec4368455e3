// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/attention_output.hpp"
#include "kvlean/core/row_tile.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/simd/row_math.hpp"

// What every tile of attend() knows, and how its work is cut into tiles of query rows.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 attend_tile_floats = 4096;  // query rows of a tile, or rows not read in place
inline constexpr u32 attend_max_queries = 32;    // query rows of a group that share a loaded row
static_assert(attend_tile_floats >= max_row_width);

/// Softmax so far of one query row: logits are relative to `maximum`.
struct SoftmaxSum {
  double total = 0.0;  ///< sum of the weights
  float maximum = -std::numeric_limits<float>::infinity();
};

/// Row r of a group is query r / group_size of its head r % group_size: neighbours see nearly the
/// same tokens, so little of a tile's work is masked.
struct AttendContext {
  AttendContext(const Queries& all, const CacheView& view, const AttentionSpec& how,
                const AttentionOutput& to) noexcept
      : queries(all),
        cache(view),
        spec(how),
        output(to),
        kernels(simd::attention_kernels(how.target)),
        shape(attention_shape(all, view)),
        group_size(all.rows.heads / view.segments),
        scale(how.scale_for(view.keys.width)) {}

  [[nodiscard]] u32 width() const noexcept {
    return std::max(cache.keys.width, cache.values.width);
  }
  [[nodiscard]] u64 group_rows() const noexcept { return u64{group_size} * queries.count; }
  /// Query rows of a tile: few, or whole blocks of lanes.
  [[nodiscard]] u32 tile_rows() const noexcept {
    const u32 rows = std::min(attend_max_queries, attend_tile_floats / width());
    return rows < simd::query_block ? std::min(rows, simd::few_rows)
                                    : rows / simd::query_block * simd::query_block;
  }
  [[nodiscard]] u32 query_of(u64 row) const noexcept { return static_cast<u32>(row / group_size); }
  [[nodiscard]] u32 head_of(u32 segment, u64 row) const noexcept {
    return segment * group_size + static_cast<u32>(row % group_size);
  }
  [[nodiscard]] TokenRange visible(u32 segment, u64 row) const noexcept {
    return visible_tokens(cache, segment, queries, spec, query_of(row));
  }
  /// What some of `rows` query rows see.
  [[nodiscard]] TokenRange visible(u32 segment, u64 first_row, u32 rows) const noexcept {
    TokenRange all{std::numeric_limits<u32>::max(), 0};
    u32 before = std::numeric_limits<u32>::max();
    for (u32 r = 0; r < rows; ++r) {
      const u32 query = query_of(first_row + r);
      if (query == before) continue;
      before = query;
      const TokenRange one = visible_tokens(cache, segment, queries, spec, query);
      if (one.begin >= one.end) continue;
      all.begin = std::min(all.begin, one.begin);
      all.end = std::max(all.end, one.end);
    }
    return all.begin < all.end ? all : TokenRange{};
  }
  /// The sink's part of the softmax, or nothing.
  [[nodiscard]] SoftmaxSum start(u32 segment, u64 row) const noexcept {
    SoftmaxSum sum;
    if (spec.sink_logits != nullptr) sum.maximum = spec.sink_logits[head_of(segment, row)];
    if (sum.maximum != -std::numeric_limits<float>::infinity()) sum.total = 1.0;
    return sum;
  }
  void load(u32 segment, u64 row, float* query) const noexcept {
    load_query(queries, head_of(segment, row), query_of(row), query);
    row_math::scale(query, scale, queries.rows.width);
  }

  /// Logits to weights, online: what was summed so far shrinks when a row's maximum grows. Up to
  /// few_rows rows; `sums` are a value width apart.
  void weigh(simd::FloatRows weight, u32 rows, u32 count, const float* log_mass, SoftmaxSum* so_far,
             float* sums) const noexcept {
    float maximum[simd::few_rows];
    double added[simd::few_rows];
    for (u32 r = 0; r < rows; ++r) maximum[r] = so_far[r].maximum;
    const u32 grown =
        kernels.weigh_few(weight, rows, count, spec.softcap, log_mass, maximum, added);
    for (u32 r = 0; r < rows; ++r) {
      if ((grown >> r & 1) != 0) {
        const float shrink = std::exp(so_far[r].maximum - maximum[r]);
        so_far[r].total *= static_cast<double>(shrink);
        kernels.scale(sums + r * cache.values.width, cache.values.width, shrink);
        so_far[r].maximum = maximum[r];
      }
      so_far[r].total += added[r];
    }
  }

  /// Writes what a query row's sums come to.
  void write(u32 segment, u64 row, const SoftmaxSum& so_far, const float* sum) const noexcept {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const bool empty = so_far.total == 0.0;
    const u32 head = head_of(segment, row);
    const u32 query = query_of(row);
    if (output.lse != nullptr) {
      const double shift = so_far.maximum == -infinity ? 0.0 : static_cast<double>(so_far.maximum);
      output.log_sum_exp(shape, head, query) =
          empty ? -infinity : static_cast<float>(shift + std::log(so_far.total));
    }
    if (output.values == nullptr) return;
    float* to = output.row(shape, head, query);
    const float factor = empty ? 0.0f : static_cast<float>(1.0 / so_far.total);
    for (u32 i = 0; i < shape.value_width; ++i) to[i] = empty ? 0.0f : sum[i] * factor;
  }

  const Queries& queries;
  const CacheView& cache;
  const AttentionSpec& spec;
  const AttentionOutput& output;
  const simd::AttentionKernels& kernels;
  AttentionShape shape;
  u32 group_size;
  float scale;
};

/// The part of [token, token + tokens) in `range`, counted from `token`.
[[nodiscard]] inline TokenRange seen_in(TokenRange range, u32 token, u32 tokens) noexcept {
  return {std::clamp(range.begin, token, token + tokens) - token,
          std::clamp(range.end, token, token + tokens) - token};
}

[[nodiscard]] inline bool same_range(TokenRange a, TokenRange b) noexcept {
  return a.begin == b.begin && a.end == b.end;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
