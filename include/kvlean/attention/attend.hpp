// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kvlean/core/executor.hpp"
#include "kvlean/observe/visibility.hpp"
#include "kvlean/simd/row_math.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Extents of one layer's attention output, [query_head][query][value_width].
struct AttentionShape {
  u32 query_heads = 0;
  u32 count = 0;        ///< queries a head
  u32 value_width = 0;  ///< elements of an output row

  [[nodiscard]] constexpr u64 rows() const noexcept {
    return static_cast<u64>(query_heads) * count;
  }
};

/// Where one layer's attention output lies: rows of `value_width` contiguous elements, and one
/// log-sum-exp a row. Element is float, double (reference only) or const (read-only parts).
template <class Element>
struct BasicAttentionOutput {
  Element* values = nullptr;  ///< [query_head][count][value_width], or null: only `lse` is wanted
  Element* lse = nullptr;     ///< [query_head][count] natural log, contiguous; or null
  i64 head_stride = 0;        ///< elements from head to head; both strides 0: contiguous
  i64 query_stride = 0;       ///< elements from query to query

  /// The output row of one query of one head. O(1).
  [[nodiscard]] Element* row(const AttentionShape& shape, u32 head, u32 query) const noexcept {
    const bool contiguous = head_stride == 0 && query_stride == 0;
    const i64 per_query = contiguous ? static_cast<i64>(shape.value_width) : query_stride;
    const i64 per_head = contiguous ? per_query * static_cast<i64>(shape.count) : head_stride;
    return values + static_cast<i64>(head) * per_head + static_cast<i64>(query) * per_query;
  }
  /// The log-sum-exp of one query of one head. `lse` must not be null. O(1).
  [[nodiscard]] Element& log_sum_exp(const AttentionShape& shape, u32 head,
                                     u32 query) const noexcept {
    return lse[static_cast<u64>(head) * shape.count + query];
  }
  [[nodiscard]] constexpr operator BasicAttentionOutput<const Element>() const noexcept
      requires(!std::is_const_v<Element>) {
    return {values, lse, head_stride, query_stride};
  }
};

using AttentionOutput = BasicAttentionOutput<float>;
using ConstAttentionOutput = BasicAttentionOutput<const float>;

/// The shape of attention of these queries over this cache. O(1).
template <Cache C>
[[nodiscard]] AttentionShape attention_shape(const Queries& queries, const C& cache) noexcept {
  return {queries.rows.heads, queries.count, view_of(cache).values.width};
}

namespace detail {

template <class Element>
[[nodiscard]] Status check_attention(const Queries& queries, const CacheView& cache,
                                     const AttentionSpec& spec,
                                     const BasicAttentionOutput<Element>& output) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
  if (output.values == nullptr && output.lse == nullptr) return StatusCode::null_pointer;
  if (!std::isfinite(spec.scale) || !std::isfinite(spec.softcap) || spec.softcap < 0.0f) {
    return StatusCode::invalid_option;
  }
  return StatusCode::ok;
}

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

[[nodiscard]] inline Status attend_view(const Queries& queries, const CacheView& cache,
                                        const AttentionSpec& spec, const AttentionOutput& output,
                                        const Executor& executor) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_attention(queries, cache, spec, output));
  const u64 rows = static_cast<u64>(queries.rows.heads / cache.segments) * queries.count;
  const u32 step = AttendTile::fit(cache, attend_max_queries);
  const u64 tiles = (rows + step - 1) / step;
  if (tiles * cache.segments > std::numeric_limits<u32>::max()) return StatusCode::invalid_shape;
  parallel_for(executor, static_cast<u32>(tiles * cache.segments), [&](u32, u32 index) noexcept {
    const u64 first_row = index % tiles * step;
    AttendTile tile(queries, cache, spec, output);
    tile.run(static_cast<u32>(index / tiles), first_row,
             static_cast<u32>(std::min<u64>(step, rows - first_row)));
  });
  return StatusCode::ok;
}

}  // namespace detail

/// Softmax attention of every query over its segment, as `spec` says, ragged lengths and log mass
/// included: query head h reads KV head h / group_size, where group_size is query heads / KV heads.
///   logit(t)  = softcap(scale * q.k_t) + log_mass_t
///   Z         = sum_t exp(logit(t)) [+ exp(sink)]
///   output    = sum_t exp(logit(t)) v_t / Z,   lse = log Z
/// over the tokens t that the query's mask and the sliding window leave. Positions must ascend, for
/// tokens (see CacheView) and queries; in a cache without positions the index is the position, and
/// queries without any are the newest `count` tokens of each segment. A query that sees nothing
/// gets zeros and -inf, or its sink's logit; NaN and infinity in the data show in the results.
/// `output.values` may be null when only the LSE is wanted: then no value row is read.
///
/// float arithmetic, Z summed in double over tiles; any layout and storage type. The output must
/// not overlap the cache or the queries. No allocation: about 62 KiB of stack a worker. A loaded
/// K/V row serves up to 32 query rows of its group; work is split by shape, so the bits do not
/// depend on the executor. O(query_heads * count * visible tokens * (key width + value width)).
///
/// Errors, all found before anything is written: those of check_cache and check_queries (no
/// queries: missing_observation), null_pointer (no output at all), invalid_option (scale or softcap
/// not finite, softcap negative), invalid_shape (more than 2^32 tiles).
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionSpec& spec,
                            const AttentionOutput& output, const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), spec, output, executor);
}

/// The same with the default AttentionSpec: scale 1 / sqrt(key width), nothing else.
template <Cache C>
[[nodiscard]] Status attend(const Queries& queries, const C& cache, const AttentionOutput& output,
                            const Executor& executor = {}) noexcept {
  return detail::attend_view(queries, view_of(cache), AttentionSpec{}, output, executor);
}

KVLEAN_NAMESPACE_END
