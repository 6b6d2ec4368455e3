// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "kvlean/attention/attend_context.hpp"
#include "kvlean/attention/token_blocks.hpp"

// Attention of few query rows of a group, as in decoding: the time goes to reading keys and values.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// One tile of up to few_rows query rows against the tokens of some of its blocks (see
/// TokenBlocks). Blocks are summed on their own, then merged as the tree says.
class AttendFew {
 public:
  AttendFew(const AttendContext& context, u32 segment, u64 first_row, u32 rows) noexcept
      : context_(context),
        cache_(context.cache),
        segment_(segment),
        rows_(rows),
        first_row_(first_row),
        tile_tokens_(block_tile_tokens(context.width())),
        keys_in_place_(is_contiguous_row(cache_.keys)),
        values_in_place_(is_contiguous_row(cache_.values)),
        wants_values_(context.output.values != nullptr) {
    for (u32 r = 0; r < rows_; ++r) {
      context_.load(segment_, first_row_ + r, query_ + r * cache_.keys.width);
      visible_[r] = context_.visible(segment_, first_row_ + r);
    }
  }

  /// Blocks [first, last) of the tile, where `first` is a multiple of a power of two that is at
  /// least last - first. The result is part 0.
  ///
  /// A tile's keys are scored before the values of the tile before are blended: the softmax waits
  /// for products that are there long since, and what follows it does not wait for the softmax.
  void run(const TokenBlocks& blocks, u32 first, u32 last) noexcept {
    const TokenRange all{blocks.range(first).begin, blocks.range(last - 1).end};
    u32 depth = 0;
    begin_part(0, first == 0);
    locate({all.begin, tile_end(all.begin, all)}, {});
    TokenRange before;  // the tile whose values come next
    for (u32 token = all.begin; token < all.end || before.begin < before.end;) {
      const TokenRange here{token, tile_end(token, all)};
      parity_ ^= 1;  // what was located is here now
      locate({here.end, tile_end(here.end, all)}, here);
      if (here.begin < here.end) score(here);
      if (before.begin < before.end) {
        if (wants_values_) blend(before, here);
        const u32 done = (before.end - all.begin) / blocks.block_tokens;  // blocks, unless the last
        if (here.begin < here.end && before.end == all.begin + done * blocks.block_tokens) {
          depth = merge_last(depth, done) + 1;
          begin_part(depth, false);
        }
      }
      if (here.begin < here.end) weigh(here);
      before = here;
      token = here.end;
    }
    for (depth = merge_last(depth, last - first); depth > 0; --depth) {
      merge(part(depth - 1), part(depth));
    }
  }

  void write() const noexcept {
    for (u32 r = 0; r < rows_; ++r) {
      context_.write(segment_, first_row_ + r, softmax_[r], sums_ + r * cache_.values.width);
    }
  }
  /// Keeps the result for a later merge.
  void store(const BlockPart& to) const noexcept {
    std::copy_n(softmax_, rows_, to.softmax);
    std::copy_n(sums_, rows_ * cache_.values.width, to.sums);
  }

  /// Adds `other` to `into`: disjoint tokens of the same query rows.
  static void merge(const AttendContext& context, u32 rows, const BlockPart& into,
                    const BlockPart& other) noexcept {
    const u32 width = context.cache.values.width;
    for (u32 r = 0; r < rows; ++r) {
      SoftmaxSum& a = into.softmax[r];
      const SoftmaxSum& b = other.softmax[r];
      const float maximum = a.maximum < b.maximum ? b.maximum : a.maximum;
      const float keep = a.maximum == maximum ? 1.0f : std::exp(a.maximum - maximum);
      const float add = b.maximum == maximum ? 1.0f : std::exp(b.maximum - maximum);
      a.total = a.total * static_cast<double>(keep) + b.total * static_cast<double>(add);
      a.maximum = maximum;
      if (context.output.values == nullptr) continue;
      float* sum = into.sums + r * width;
      if (keep != 1.0f) context.kernels.scale(sum, width, keep);
      const std::byte* row = reinterpret_cast<const std::byte*>(other.sums + r * width);
      context.kernels.blend({&add, 1}, 1, {&row, 1}, DType::f32, width, {}, {sum, width});
    }
  }

 private:
  [[nodiscard]] BlockPart part(u32 index) noexcept {
    return {softmax_ + index * simd::few_rows, sums_ + index * rows_ * cache_.values.width};
  }
  void merge(const BlockPart& into, const BlockPart& other) const noexcept {
    merge(context_, rows_, into, other);
  }

  void begin_part(u32 index, bool with_sink) noexcept {
    const BlockPart to = part(index);
    for (u32 r = 0; r < rows_; ++r) {
      to.softmax[r] = with_sink ? context_.start(segment_, first_row_ + r) : SoftmaxSum{};
    }
    std::fill_n(to.sums, rows_ * cache_.values.width, 0.0f);
    here_ = to;
  }

  /// After block `done` of a run, whose part is part(depth): merges subtrees that are complete.
  /// Returns the depth of the last part.
  u32 merge_last(u32 depth, u32 done) noexcept {
    for (; done % 2 == 0 && depth > 0; done /= 2, --depth) merge(part(depth - 1), part(depth));
    return depth;
  }

  [[nodiscard]] u32 tile_end(u32 token, TokenRange all) const noexcept {
    return all.end - token < tile_tokens_ ? all.end : token + tile_tokens_;
  }

  // Rows in place are located a step ahead, the keys then the values that it reads, to be fetched
  // by the kernels of the step before.
  void locate(TokenRange keys, TokenRange values) noexcept {
    const std::byte** next = row_[parity_ ^ 1];
    ahead_ = {next, 0};
    if (keys_in_place_) {
      point_at_rows(cache_.keys, segment_, keys.begin, keys.end - keys.begin, next);
      ahead_.count += keys.end - keys.begin;
    }
    if (values_in_place_ && wants_values_) {
      point_at_rows(cache_.values, segment_, values.begin, values.end - values.begin,
                    next + ahead_.count);
      ahead_.count += values.end - values.begin;
    }
  }
  /// What to fetch while keys, or after `before` of them values, are read.
  [[nodiscard]] simd::RowsAhead ahead(u32 before) const noexcept {
    const std::size_t key_bytes = cache_.keys.width * size_bytes(cache_.keys.dtype);
    const std::size_t value_bytes = cache_.values.width * size_bytes(cache_.values.dtype);
    return {ahead_, static_cast<u32>(std::max(key_bytes, value_bytes)), before};
  }

  [[nodiscard]] float* weights_of(TokenRange tile) noexcept {
    return weight_[tile.begin / tile_tokens_ % 2];
  }

  void score(TokenRange tile) noexcept {
    const u32 width = cache_.keys.width;
    const u32 tokens = tile.end - tile.begin;
    const simd::ConstFloatRows queries{query_, width};
    float* weight = weights_of(tile);
    if (keys_in_place_) {
      context_.kernels.score_few(queries, rows_, {row_[parity_], tokens}, cache_.keys.dtype, width,
                                 ahead(0), {weight, block_max_tile_tokens});
      return;
    }
    const u32 fit = attend_tile_floats / width;
    for (u32 first = 0; first < tokens; first += fit) {
      const u32 count = std::min(fit, tokens - first);
      const TileRows keys =
          tile_rows(cache_.keys, segment_, tile.begin + first, count, spare_row_, buffer_, false);
      context_.kernels.score_few(queries, rows_, keys.rows, keys.dtype, width,
                                 first == 0 ? ahead(0) : simd::RowsAhead{},
                                 {weight + first, block_max_tile_tokens});
    }
  }

  void weigh(TokenRange tile) noexcept {
    for_each_range(tile.begin, tile.end - tile.begin, [&](u32 row, u32 rows, TokenRange range) {
      const float* log_mass =
          cache_.log_mass ? cache_.log_mass.segment(segment_) + tile.begin + range.begin : nullptr;
      context_.weigh(
          {weights_of(tile) + row * block_max_tile_tokens + range.begin, block_max_tile_tokens},
          rows, range.end - range.begin, log_mass, here_.softmax + row,
          here_.sums + row * cache_.values.width);
    });
  }
  /// body(row, rows, range) for neighbouring query rows that see the same part of some tokens.
  template <class Body>
  void for_each_range(u32 token, u32 tokens, Body&& body) const noexcept {
    for (u32 row = 0; row < rows_;) {
      const TokenRange range = seen_in(visible_[row], token, tokens);
      u32 last = row + 1;
      while (last < rows_ && same_range(seen_in(visible_[last], token, tokens), range)) ++last;
      if (range.begin != range.end) body(row, last - row, range);
      row = last;
    }
  }

  /// Adds a tile's weighted value rows, after the keys of `after` were scored.
  void blend(TokenRange tile, TokenRange after) noexcept {
    const u32 tokens = tile.end - tile.begin;
    const u32 scored = keys_in_place_ ? after.end - after.begin : 0;
    if (values_in_place_) {
      blend_rows({row_[parity_] + scored, tokens}, cache_.values.dtype, tile, 0,
                 ahead(after.end - after.begin));
      return;
    }
    const u32 fit = attend_tile_floats / cache_.values.width;
    for (u32 first = 0; first < tokens; first += fit) {
      const u32 count = std::min(fit, tokens - first);
      const TileRows values =
          tile_rows(cache_.values, segment_, tile.begin + first, count, spare_row_, buffer_, false);
      blend_rows(values.rows, values.dtype, tile, first,
                 first == 0 ? ahead(after.end - after.begin) : simd::RowsAhead{});
    }
  }
  /// Rows [first, first + values.count) of a tile. An unseen row is never touched: it may be NaN.
  void blend_rows(simd::RowPointers values, DType dtype, TokenRange tile, u32 first,
                  simd::RowsAhead fetch) noexcept {
    const u32 width = cache_.values.width;
    for_each_range(tile.begin + first, values.count, [&](u32 row, u32 rows, TokenRange range) {
      const float* weight = weights_of(tile) + row * block_max_tile_tokens + first + range.begin;
      context_.kernels.blend({weight, block_max_tile_tokens}, rows,
                             {values.row + range.begin, range.end - range.begin}, dtype, width,
                             fetch, {here_.sums + row * width, width});
      fetch = {};
    });
  }

  const AttendContext& context_;
  const CacheView& cache_;
  u32 segment_;
  u32 rows_;
  u64 first_row_;
  u32 tile_tokens_;
  bool keys_in_place_;
  bool values_in_place_;
  bool wants_values_;
  u32 parity_ = 0;  // which half of the row pointers is in use
  BlockPart here_;
  simd::RowPointers ahead_;
  const std::byte* row_[2][2 * block_max_tile_tokens];
  const std::byte* spare_row_[block_max_tile_tokens];
  TokenRange visible_[simd::few_rows];
  SoftmaxSum softmax_[block_max_depth * simd::few_rows];
  alignas(64) float weight_[2][simd::few_rows * block_max_tile_tokens];
  alignas(64) float query_[attend_tile_floats];   // scaled
  alignas(64) float sums_[block_part_floats];     // unnormalised outputs, a part after the other
  alignas(64) float buffer_[attend_tile_floats];  // rows that are not read in place
};

}  // namespace detail
KVLEAN_NAMESPACE_END
