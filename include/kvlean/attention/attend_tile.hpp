// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/attention/attend_context.hpp"

// Attention of many query rows of a group, as in a prefill: the time goes to arithmetic.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// One tile of more than few_rows query rows against everything they see: softmax online over key
/// tiles. A row is at most attend_tile_floats / query_block wide.
class AttendTile {
 public:
  AttendTile(const AttendContext& context, u32 segment, u64 first_row, u32 rows) noexcept
      : context_(context),
        cache_(context.cache),
        segment_(segment),
        rows_(rows),
        first_row_(first_row),
        tile_tokens_(std::min(max_tokens, attend_tile_floats / context.width())) {}

  void run() noexcept {
    const TokenRange all = load_queries();
    for (u32 token = all.begin; token < all.end; token += tile_tokens_) {
      const u32 tokens = std::min(tile_tokens_, all.end - token);
      score(token, tokens);
      weigh(token, tokens);
      if (context_.output.values != nullptr) blend(token, tokens);
    }
    for (u32 r = 0; r < rows_; ++r) {
      context_.write(segment_, first_row_ + r, softmax_[r], sum_ + r * cache_.values.width);
    }
  }

 private:
  static constexpr u32 max_tokens = 64;

  TokenRange load_queries() noexcept {
    const u32 width = cache_.keys.width;
    const u32 padded = padded_query_rows(rows_);
    std::fill_n(query_, padded * width, 0.0f);
    std::fill_n(sum_, rows_ * cache_.values.width, 0.0f);
    for (u32 r = 0; r < rows_; ++r) {
      context_.load(segment_, first_row_ + r, tile_);
      put_query_column(tile_, width, r, query_, padded);
      visible_[r] = context_.visible(segment_, first_row_ + r);
      softmax_[r] = context_.start(segment_, first_row_ + r);
    }
    return context_.visible(segment_, first_row_, rows_);
  }

  void score(u32 token, u32 tokens) noexcept {
    const u32 width = cache_.keys.width;
    load_rows(cache_.keys, segment_, token, tokens, tile_, width);
    context_.kernels.score_many({query_, padded_query_rows(rows_)}, rows_, {tile_, width}, tokens,
                                width, {weight_, max_tokens});
  }

  void weigh(u32 token, u32 tokens) noexcept {
    for (u32 r = 0; r < rows_; ++r) {
      const TokenRange range = seen_in(visible_[r], token, tokens);
      if (range.begin == range.end) continue;
      const float* log_mass =
          cache_.log_mass ? cache_.log_mass.segment(segment_) + token + range.begin : nullptr;
      context_.weigh({weight_ + r * max_tokens + range.begin, max_tokens}, 1,
                     range.end - range.begin, log_mass, softmax_ + r,
                     sum_ + r * cache_.values.width);
    }
  }

  /// Adds a tile's weighted value rows. An unseen row is never touched: it may be NaN.
  void blend(u32 token, u32 tokens) noexcept {
    const u32 width = cache_.values.width;
    const TileRows values =
        tile_rows(cache_.values, segment_, token, tokens, value_row_, tile_, true);
    for (u32 first = 0; first < rows_;) {
      const TokenRange range = seen_in(visible_[first], token, tokens);
      u32 last = first + 1;
      while (last < rows_ && same_range(seen_in(visible_[last], token, tokens), range)) ++last;
      if (range.begin != range.end) {
        context_.kernels.blend({weight_ + first * max_tokens + range.begin, max_tokens},
                               last - first,
                               {values.rows.row + range.begin, range.end - range.begin},
                               values.dtype, width, {}, {sum_ + first * width, width});
      }
      first = last;
    }
  }

  const AttendContext& context_;
  const CacheView& cache_;
  u32 segment_;
  u32 rows_;
  u64 first_row_;
  u32 tile_tokens_;
  const std::byte* value_row_[max_tokens];
  TokenRange visible_[attend_max_queries];
  SoftmaxSum softmax_[attend_max_queries];
  alignas(64) float weight_[attend_max_queries * max_tokens];
  alignas(64) float query_[attend_tile_floats];  // scaled, a row a column
  alignas(64) float sum_[attend_tile_floats];    // unnormalised outputs
  alignas(64) float tile_[attend_tile_floats];   // keys, then values as float
};

}  // namespace detail
KVLEAN_NAMESPACE_END
