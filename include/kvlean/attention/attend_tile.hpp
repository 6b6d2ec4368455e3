// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvlean/attention/attention_output.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/simd/row_math.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

// Three buffers of this size are all the scratch: small enough for a thread's stack and for L1.
inline constexpr u32 attend_tile_floats = 4096;
inline constexpr u32 attend_max_queries = 32;  // query rows of a group that share a loaded K/V row
inline constexpr u32 attend_max_tokens = 32;
static_assert(attend_tile_floats >= max_row_width);

/// sum [width] += weight[0] row_0 + .. + weight[count - 1] row_(count - 1) for rows `stride` apart.
/// Four rows at a time: a quarter of the loads and stores of `sum` that single additions need.
inline void add_weighted_rows(float* __restrict sum, const float* __restrict rows, u32 stride,
                              const float* __restrict weight, u32 count, u32 width) noexcept {
  u32 row = 0;
  for (; row + 4 <= count; row += 4) {
    const float* a = rows + row * stride;
    const float* b = a + stride;
    const float* c = b + stride;
    const float* d = c + stride;
    const float* w = weight + row;
    for (u32 i = 0; i < width; ++i) {
      sum[i] += (w[0] * a[i] + w[1] * b[i]) + (w[2] * c[i] + w[3] * d[i]);
    }
  }
  for (; row < count; ++row) row_math::add_scaled(sum, rows + row * stride, weight[row], width);
}

/// One tile of query rows of one group against everything they see: softmax online over key tiles.
class AttendTile {
 public:
  AttendTile(const Queries& queries, const CacheView& cache, const AttentionSpec& spec,
             const AttentionOutput& output) noexcept
      : queries_(queries),
        cache_(cache),
        spec_(spec),
        output_(output),
        shape_(attention_shape(queries, cache)),
        group_size_(queries.rows.heads / cache.segments),
        tile_tokens_(fit(cache, attend_max_tokens)),
        scale_(spec.scale_for(cache.keys.width)) {}

  /// Query rows or tokens that fit the buffers; depends on the shape only.
  [[nodiscard]] static u32 fit(const CacheView& cache, u32 limit) noexcept {
    const u32 width = std::max(cache.keys.width, cache.values.width);
    return std::min(limit, attend_tile_floats / width);
  }

  /// Row r of a group is query r / group_size of its head r % group_size: neighbours see nearly the
  /// same tokens, so little of a tile's work is masked.
  void run(u32 segment, u64 first_row, u32 rows) noexcept {
    segment_ = segment;
    first_row_ = first_row;
    rows_ = rows;
    const TokenRange all = load_queries();
    for (u32 token = all.begin; token < all.end; token += tile_tokens_) {
      const u32 tokens = std::min(tile_tokens_, all.end - token);
      weigh(token, tokens);
      if (output_.values != nullptr) blend(token, tokens);
    }
    write();
  }

 private:
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  [[nodiscard]] u32 query_of(u32 row) const noexcept {
    return static_cast<u32>((first_row_ + row) / group_size_);
  }
  [[nodiscard]] u32 head_of(u32 row) const noexcept {
    return segment_ * group_size_ + static_cast<u32>((first_row_ + row) % group_size_);
  }

  TokenRange load_queries() noexcept {
    TokenRange all{std::numeric_limits<u32>::max(), 0};
    const u32 width = cache_.keys.width;
    for (u32 r = 0; r < rows_; ++r) {
      load_query(queries_, head_of(r), query_of(r), query_ + r * width);
      row_math::scale(query_ + r * width, scale_, width);
      visible_[r] = visible_tokens(cache_, segment_, queries_, spec_, query_of(r));
      if (visible_[r].begin < visible_[r].end) {
        all.begin = std::min(all.begin, visible_[r].begin);
        all.end = std::max(all.end, visible_[r].end);
      }
      maximum_[r] = spec_.sink_logits != nullptr ? spec_.sink_logits[head_of(r)] : -infinity;
      total_[r] = maximum_[r] == -infinity ? 0.0 : 1.0;
    }
    std::fill_n(sum_, rows_ * cache_.values.width, 0.0f);
    return all;
  }

  /// The part of a key tile that row r sees, counted from the tile's first token.
  [[nodiscard]] TokenRange seen(u32 row, u32 token, u32 tokens) const noexcept {
    const u32 begin = std::clamp(visible_[row].begin, token, token + tokens) - token;
    const u32 end = std::clamp(visible_[row].end, token, token + tokens) - token;
    return {begin, end};
  }

  /// Keys [dim][token]: logits then add up over many tokens at once, without horizontal sums.
  void load_keys(u32 token, u32 tokens) noexcept {
    float key[max_row_width];
    for (u32 t = 0; t < tokens; ++t) {
      load_row(cache_.keys, segment_, token + t, key);
      for (u32 d = 0; d < cache_.keys.width; ++d) tile_[d * tile_tokens_ + t] = key[d];
    }
  }

  /// Softmax weights of a tile, relative to each row's new maximum.
  void weigh(u32 token, u32 tokens) noexcept {
    load_keys(token, tokens);
    const u32 width = cache_.keys.width;
    for (u32 r = 0; r < rows_; ++r) {
      const TokenRange range = seen(r, token, tokens);
      const u32 count = range.end - range.begin;
      float* weight = weight_ + r * attend_max_tokens + range.begin;
      std::fill_n(weight, count, 0.0f);
      add_weighted_rows(weight, tile_ + range.begin, tile_tokens_, query_ + r * width, width,
                        count);
      if (spec_.softcap > 0.0f) {
        for (u32 t = 0; t < count; ++t) {
          weight[t] = spec_.softcap * std::tanh(weight[t] / spec_.softcap);
        }
      }
      if (cache_.log_mass) {
        row_math::add_scaled(weight, cache_.log_mass.segment(segment_) + token + range.begin, 1.0f,
                             count);
      }
      normalise(r, weight, count);
    }
  }

  /// Logits to weights, online: what was summed so far shrinks when the maximum grows.
  void normalise(u32 row, float* weight, u32 count) noexcept {
    float maximum = maximum_[row];
    for (u32 t = 0; t < count; ++t) maximum = weight[t] > maximum ? weight[t] : maximum;
    if (maximum > maximum_[row]) {
      const float shrink = std::exp(maximum_[row] - maximum);
      total_[row] *= static_cast<double>(shrink);
      row_math::scale(sum_ + row * cache_.values.width, shrink, cache_.values.width);
      maximum_[row] = maximum;
    }
    // Only logits of -inf (or NaN, which must show) so far: -inf - -inf would make them NaN.
    const float shift = maximum == -infinity ? 0.0f : maximum;
    float total = 0.0f;
    for (u32 t = 0; t < count; ++t) {
      weight[t] = std::exp(weight[t] - shift);
      total += weight[t];
    }
    total_[row] += static_cast<double>(total);
  }

  /// Adds a tile's weighted value rows.
  void blend(u32 token, u32 tokens) noexcept {
    const u32 width = cache_.values.width;
    for (u32 t = 0; t < tokens; ++t) {
      load_row(cache_.values, segment_, token + t, tile_ + t * width);
    }
    for (u32 r = 0; r < rows_; ++r) {
      const TokenRange range = seen(r, token, tokens);
      add_weighted_rows(sum_ + r * width, tile_ + range.begin * width, width,
                        weight_ + r * attend_max_tokens + range.begin, range.end - range.begin,
                        width);
    }
  }

  void write() noexcept {
    for (u32 r = 0; r < rows_; ++r) {
      const bool empty = total_[r] == 0.0;
      if (output_.lse != nullptr) {
        const double shift = maximum_[r] == -infinity ? 0.0 : static_cast<double>(maximum_[r]);
        output_.log_sum_exp(shape_, head_of(r), query_of(r)) =
            empty ? -infinity : static_cast<float>(shift + std::log(total_[r]));
      }
      if (output_.values == nullptr) continue;
      float* row = output_.row(shape_, head_of(r), query_of(r));
      const float* sum = sum_ + r * shape_.value_width;
      const float factor = empty ? 0.0f : static_cast<float>(1.0 / total_[r]);
      for (u32 i = 0; i < shape_.value_width; ++i) row[i] = empty ? 0.0f : sum[i] * factor;
    }
  }

  const Queries& queries_;
  const CacheView& cache_;
  const AttentionSpec& spec_;
  const AttentionOutput& output_;
  AttentionShape shape_;
  u32 group_size_;
  u32 tile_tokens_;
  float scale_;
  u32 segment_ = 0;
  u32 rows_ = 0;
  u64 first_row_ = 0;
  TokenRange visible_[attend_max_queries];
  float maximum_[attend_max_queries];
  double total_[attend_max_queries];
  alignas(64) float weight_[attend_max_queries * attend_max_tokens];
  alignas(64) float query_[attend_tile_floats];  // scaled
  alignas(64) float sum_[attend_tile_floats];    // unnormalised outputs
  alignas(64) float tile_[attend_tile_floats];   // keys, then values
};

}  // namespace detail
KVLEAN_NAMESPACE_END
