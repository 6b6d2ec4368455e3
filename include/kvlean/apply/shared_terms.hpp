// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/plan.hpp"
#include "kvlean/core/row_addresses.hpp"
#include "kvlean/simd/merge_kernels.hpp"

// Sums of slots whose term ranges overlap, as CaM's do: neighbours have most of their terms in
// common. A sum is made of sums over blocks of neighbouring terms, which neighbouring slots share.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Whether a slot has terms in common with the slot before or after it.
[[nodiscard]] inline bool shares_terms(const CompressionPlan& plan, u32 segment,
                                       u64 slot) noexcept {
  if (!plan.has_terms() || plan.term_begin[slot] == plan.term_end[slot]) return false;
  const auto overlap = [&plan](u64 a, u64 b) noexcept {
    return plan.term_begin[a] < plan.term_end[b] && plan.term_begin[b] < plan.term_end[a];
  };
  return (slot + 1 < plan.first[segment + 1] && overlap(slot, slot + 1)) ||
         (slot > plan.first[segment] && overlap(slot - 1, slot));
}

/// Weighted sums over ranges of a plan's terms. A range is cut where the term's number is a
/// multiple of 16: its first piece is added from the end, the others from the beginning, then the
/// pieces in order. The result depends on the range alone, not on what was asked before; but pieces
/// are kept, and when ranges move ahead together each term is read twice in all. Only sums are
/// added, nothing is taken off again, so the error is that of one addition a term, and a term that
/// is not finite stays in the ranges that hold it.
class SharedTerms {
 public:
  SharedTerms(const Rows& rows, u32 segment, const RowAddresses& address, const u32* token,
              const float* weight) noexcept
      : rows_(rows),
        segment_(segment),
        address_(address),
        token_(token),
        weight_(weight),
        places_(rows.width * (block + 2) <= room
                    ? std::min<u32>(room / rows.width - block, most_places)
                    : 0) {
    std::fill_n(kept_, most_places, Piece{});
  }

  /// sum [width] = self * row(anchor) + the terms [begin, end), in float.
  void add(u32 anchor, float self, u64 begin, u64 end, float* sum) noexcept {
    const simd::MergeKernels& kernels = simd::merge_kernels();
    start(anchor, self, sum);
    for_each_piece(begin, end, [&](const float* piece) noexcept {
      kernels.add_scaled(sum, piece, 1.0f, rows_.width);
    });
  }
  /// The same into a row of the rows' type, or of float; false where there is no room for the
  /// pieces.
  [[nodiscard]] bool write(u32 anchor, float self, u64 begin, u64 end, bool as_float,
                           void* out) noexcept {
    const u64 pieces = (end - 1) / block - begin / block + 1;
    if (places_ < pieces) return false;
    const std::byte* pointers[most_places + 1];
    u32 count = 0;
    for_each_piece(begin, end, [&](const float* piece) noexcept {
      pointers[count++] = reinterpret_cast<const std::byte*>(piece);
    });
    simd::merge_kernels().add_parts({address_(anchor), self, {pointers, count}, nullptr},
                                    rows_.dtype, rows_.width, as_float, out);
    return true;
  }

 private:
  static constexpr u32 block = 16;
  static constexpr u32 most_places = 64;
  static constexpr u32 room = 12288;  // floats
  static constexpr u64 none = ~u64{0};

  /// A sum over the terms of a block up to `end`.
  struct Piece {
    u64 block = none;
    u64 end = 0;
  };

  void start(u32 anchor, float self, float* sum) const noexcept {
    const simd::MergeKernels& kernels = simd::merge_kernels();
    if (is_contiguous_row(rows_)) {
      kernels.weigh({address_(anchor), self, {}, nullptr}, rows_.dtype, rows_.width, true, false,
                    sum);
      return;
    }
    load_row(rows_, segment_, anchor, sum);
    kernels.weigh({sum, self, {}, nullptr}, DType::f32, rows_.width, true, false, sum);
  }
  /// sum += the terms [begin, end), at most a block of them.
  void add_terms(u64 begin, u64 end, float* sum) noexcept {
    const simd::MergeKernels& kernels = simd::merge_kernels();
    const u32 count = static_cast<u32>(end - begin);
    if (is_contiguous_row(rows_)) {
      const std::byte* pointers[block];
      kernels.add_weighed(address_.point(token_ + begin, count, pointers), weight_ + begin,
                          rows_.dtype, rows_.width, sum);
      return;
    }
    float row[max_row_width];
    for (u64 term = begin; term < end; ++term) {
      load_row(rows_, segment_, token_[term], row);
      kernels.add_scaled(sum, row, weight_[term], rows_.width);
    }
  }

  template <class Visit>
  void for_each_piece(u64 begin, u64 end, Visit&& visit) noexcept {
    u64 next = begin - begin % block + block;
    if (next >= end) {
      visit(front_piece(begin, end));
      return;
    }
    visit(back_piece(begin));
    for (; next < end; next += block) visit(front_piece(next, std::min<u64>(end, next + block)));
  }
  /// The terms [begin, end) of one block in order; kept when it begins there.
  const float* front_piece(u64 begin, u64 end) noexcept {
    if (places_ == 0 || begin % block != 0) {
      std::fill_n(alone_, rows_.width, 0.0f);
      add_terms(begin, end, alone_);
      return alone_;
    }
    const u64 number = begin / block;
    Piece& kept = kept_[number % places_];
    float* sum = floats_ + (block + number % places_) * rows_.width;
    if (kept.block != number || kept.end > end) {
      std::fill_n(sum, rows_.width, 0.0f);
      kept = {number, begin};
    }
    if (kept.end < end) add_terms(kept.end, end, sum);
    kept.end = end;
    return sum;
  }
  /// The terms from `begin` to the end of its block, the last one first.
  const float* back_piece(u64 begin) noexcept {
    const u64 number = begin / block;
    if (places_ == 0) {
      std::fill_n(alone_, rows_.width, 0.0f);
      for (u64 term = (number + 1) * block; term-- > begin;) add_terms(term, term + 1, alone_);
      return alone_;
    }
    if (back_block_ != number) {
      back_block_ = number;
      back_begin_ = (number + 1) * block;
    }
    while (back_begin_ > begin) {
      --back_begin_;
      float* sum = floats_ + back_begin_ % block * rows_.width;
      if (back_begin_ % block == block - 1) {
        std::fill_n(sum, rows_.width, 0.0f);
      } else {
        std::copy_n(sum + rows_.width, rows_.width, sum);
      }
      add_terms(back_begin_, back_begin_ + 1, sum);
    }
    return floats_ + begin % block * rows_.width;
  }

  const Rows& rows_;
  u32 segment_;
  const RowAddresses& address_;
  const u32* token_;
  const float* weight_;
  u32 places_;  // pieces that are kept besides those of back_piece; 0: none of either
  u64 back_block_ = none;
  u64 back_begin_ = 0;
  Piece kept_[most_places];
  float alone_[max_row_width];
  float floats_[room];  // [block] back pieces, [places_] front pieces
};

}  // namespace detail
KVLEAN_NAMESPACE_END
