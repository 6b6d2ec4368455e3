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

KVLEAN_NAMESPACE_BEGIN
namespace detail {

// Queries, sums and a tile of rows share three times this: little enough for a thread's stack, and
// for the first cache levels.
inline constexpr u32 attend_tile_floats = 4096;
inline constexpr u32 attend_max_queries = 32;  // query rows of a group that share a loaded K/V row
inline constexpr u32 attend_max_tokens = 64;
static_assert(attend_tile_floats >= max_row_width);

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
        kernels_(simd::attention_kernels(spec.target)),
        scale_(spec.scale_for(cache.keys.width)) {}

  /// Rows or tokens that fit the buffers; depends on the shape only.
  [[nodiscard]] static u32 fit(const CacheView& cache, u32 limit) noexcept {
    const u32 width = std::max(cache.keys.width, cache.values.width);
    return std::min(limit, attend_tile_floats / width);
  }

  /// Query rows of a tile: few, or whole blocks of lanes.
  [[nodiscard]] static u32 query_rows(const CacheView& cache) noexcept {
    const u32 rows = fit(cache, attend_max_queries);
    return rows < simd::query_block ? std::min(rows, simd::few_rows)
                                    : rows / simd::query_block * simd::query_block;
  }

  /// Row r of a group is query r / group_size of its head r % group_size: neighbours see nearly the
  /// same tokens, so little of a tile's work is masked.
  void run(u32 segment, u64 first_row, u32 rows) noexcept {
    segment_ = segment;
    first_row_ = first_row;
    rows_ = rows;
    share_buffer();
    const TokenRange all = load_queries();
    if (all.begin < all.end) locate_keys(all.begin, tokens_from(all.begin, all.end));
    for (u32 token = all.begin; token < all.end; token += tile_tokens_) {
      const u32 tokens = tokens_from(token, all.end);
      locate_values(token, tokens);
      weigh(token, tokens);
      const u32 next = token + tokens;
      locate_keys(next, tokens_from(next, all.end));
      if (output_.values != nullptr) blend(token, tokens);
    }
    write();
  }

 private:
  /// Few query rows leave more room for a tile of keys or values. Depends on the shape only.
  void share_buffer() noexcept {
    few_ = rows_ <= simd::few_rows;
    const u32 width = std::max(cache_.keys.width, cache_.values.width);
    const u32 used = few_ ? (rows_ * width + 15) / 16 * 16 : attend_tile_floats;
    query_ = buffer_;
    sum_ = buffer_ + used;
    tile_ = buffer_ + 2 * used;
    tile_tokens_ = std::min(attend_max_tokens, (3 * attend_tile_floats - 2 * used) / width);
  }

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
    const u32 padded = padded_query_rows(rows_);
    if (!few_) std::fill_n(query_, padded * width, 0.0f);
    for (u32 r = 0; r < rows_; ++r) {
      float* query = few_ ? query_ + r * width : tile_;
      load_query(queries_, head_of(r), query_of(r), query);
      row_math::scale(query, scale_, width);
      if (!few_) put_query_column(query, width, r, query_, padded);
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

  [[nodiscard]] u32 tokens_from(u32 token, u32 end) const noexcept {
    return std::min(tile_tokens_, end - token);
  }

  // Where the next rows lie in place, to be prefetched by the kernel before the one that reads
  // them.
  void locate_keys(u32 token, u32 tokens) noexcept {
    keys_ahead_ = is_contiguous_row(cache_.keys)
                      ? point_at_rows(cache_.keys, segment_, token, tokens, key_row_)
                      : simd::RowPointers{};
  }
  void locate_values(u32 token, u32 tokens) noexcept {
    values_ahead_ = output_.values != nullptr && is_contiguous_row(cache_.values)
                        ? point_at_rows(cache_.values, segment_, token, tokens, value_row_)
                        : simd::RowPointers{};
  }

  /// Softmax weights of a tile, relative to each row's new maximum.
  void weigh(u32 token, u32 tokens) noexcept {
    const u32 width = cache_.keys.width;
    const simd::FloatRows products{weight_, attend_max_tokens};
    if (few_) {
      const TileRows keys = tile_rows(cache_.keys, segment_, token, tokens, key_row_, tile_, false);
      kernels_.score_few({query_, width}, rows_, keys.rows, keys.dtype, width, values_ahead_,
                         products);
    } else {
      load_rows(cache_.keys, segment_, token, tokens, tile_, width);
      kernels_.score_many({query_, padded_query_rows(rows_)}, rows_, {tile_, width}, tokens, width,
                          products);
    }
    for (u32 r = 0; r < rows_; ++r) {
      const TokenRange range = seen(r, token, tokens);
      if (range.begin == range.end) continue;
      const float* log_mass =
          cache_.log_mass ? cache_.log_mass.segment(segment_) + token + range.begin : nullptr;
      normalise(r, weight_ + r * attend_max_tokens + range.begin, range.end - range.begin,
                log_mass);
    }
  }

  /// Logits to weights, online: what was summed so far shrinks when the maximum grows.
  void normalise(u32 row, float* weight, u32 count, const float* log_mass) noexcept {
    const float maximum = kernels_.logits(weight, count, 1.0f, spec_.softcap, log_mass);
    if (maximum > maximum_[row]) {
      const float shrink = std::exp(maximum_[row] - maximum);
      total_[row] *= static_cast<double>(shrink);
      kernels_.scale(sum_ + row * cache_.values.width, cache_.values.width, shrink);
      maximum_[row] = maximum;
    }
    // Only logits of -inf (or NaN, which must show) so far: -inf - -inf would make them NaN.
    const float shift = maximum_[row] == -infinity ? 0.0f : maximum_[row];
    total_[row] += kernels_.exponentials_or_nan(weight, count, shift);
  }

  /// Adds a tile's weighted value rows. An unseen row is never touched: it may be NaN.
  void blend(u32 token, u32 tokens) noexcept {
    const u32 width = cache_.values.width;
    const TileRows values =
        tile_rows(cache_.values, segment_, token, tokens, value_row_, tile_, !few_);
    for (u32 first = 0; first < rows_;) {
      const TokenRange range = seen(first, token, tokens);
      u32 last = first + 1;
      while (last < rows_ && same(seen(last, token, tokens), range)) ++last;
      if (range.begin != range.end) {
        const u32 count = range.end - range.begin;
        kernels_.blend({weight_ + first * attend_max_tokens + range.begin, attend_max_tokens},
                       last - first, {values.rows.row + range.begin, count}, values.dtype, width,
                       first == 0 ? keys_ahead_ : simd::RowPointers{},
                       {sum_ + first * width, width});
      }
      first = last;
    }
  }

  [[nodiscard]] static bool same(TokenRange a, TokenRange b) noexcept {
    return a.begin == b.begin && a.end == b.end;
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
  const simd::AttentionKernels& kernels_;
  u32 tile_tokens_ = 0;
  float scale_;
  u32 segment_ = 0;
  u32 rows_ = 0;
  bool few_ = true;
  u64 first_row_ = 0;
  simd::RowPointers keys_ahead_;
  simd::RowPointers values_ahead_;
  const std::byte* key_row_[attend_max_tokens];
  const std::byte* value_row_[attend_max_tokens];
  TokenRange visible_[attend_max_queries];
  float maximum_[attend_max_queries];
  double total_[attend_max_queries];
  alignas(64) float weight_[attend_max_queries * attend_max_tokens];
  float* query_ = nullptr;  // scaled: rows if few, else columns
  float* sum_ = nullptr;    // unnormalised outputs
  float* tile_ = nullptr;   // keys, then values, unless they are read in place
  alignas(64) float buffer_[3 * attend_tile_floats];
};

}  // namespace detail
KVLEAN_NAMESPACE_END
