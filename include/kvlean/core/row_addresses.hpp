// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/core/row_tile.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// The addresses of one segment's rows, for loops that ask for many. Expects is_contiguous_row, or
/// is never asked.
class RowAddresses {
 public:
  RowAddresses(const Rows& rows, u32 head) noexcept : rows_(rows), head_(head) {
    straight_ = rows.load == nullptr && rows.order == nullptr && rows.page_table == nullptr;
    if (!straight_) return;
    first_ = row_address(rows, head, 0);
    step_ = rows.token_stride * static_cast<i64>(size_bytes(rows.dtype));
  }
  [[nodiscard]] std::byte* operator()(u32 token) const noexcept {
    return straight_ ? first_ + static_cast<i64>(token) * step_ : row_address(rows_, head_, token);
  }
  /// Points pointers[i] at row token[i].
  simd::RowPointers point(const u32* token, u32 count, const std::byte** pointers) const noexcept {
    for (u32 i = 0; i < count; ++i) pointers[i] = (*this)(token[i]);
    return {pointers, count};
  }

 private:
  const Rows& rows_;
  u32 head_;
  bool straight_;
  std::byte* first_ = nullptr;
  i64 step_ = 0;
};

/// The rows of one tensor, or of two side by side, to be prefetched in a loop over tokens: in an
/// order that goes along several pages at a time, because the CPU reads ahead in each page by
/// itself, and one page is too few to keep the memory busy.
class RowsAhead {
 public:
  RowsAhead(const RowAddresses& first, const RowAddresses* second, std::size_t row_bytes,
            u32 length) noexcept
      : first_(first),
        second_(second),
        length_(length),
        page_rows_(static_cast<u32>(std::max<std::size_t>(page_bytes / row_bytes, 1))),
        pages_(second != nullptr ? pages / 2 : pages) {}

  /// Tokens from the first row that is asked for to the last, at most: start with so many.
  [[nodiscard]] u32 window() const noexcept { return page_rows_ * pages_; }
  /// The next rows, those of `tokens` tokens times sixteenths / 16, into pointers[most].
  simd::RowPointers take(u32 tokens, u32 sixteenths, u32 most,
                         const std::byte** pointers) noexcept {
    const u32 tensors = second_ != nullptr ? 2 : 1;
    const u32 wanted = std::min(tokens * tensors * sixteenths / 16, most);
    u32 count = 0;
    for (u32 i = 0; i < wanted && block_ < length_; ++i) {
      const u32 token = block_ + page_ * page_rows_ + row_;
      if (token < length_) {
        pointers[count++] = first_(token);
        if (second_ != nullptr && ++i < most) pointers[count++] = (*second_)(token);
      }
      if (++page_ != pages_) continue;
      page_ = 0;
      if (++row_ != page_rows_) continue;
      row_ = 0;
      block_ += window();
    }
    return {pointers, count};
  }

 private:
  static constexpr std::size_t page_bytes = 4096;
  static constexpr u32 pages = 8;

  const RowAddresses& first_;
  const RowAddresses* second_;
  u32 length_;
  u32 page_rows_;
  u32 pages_;  // of each tensor
  u32 block_ = 0;
  u32 page_ = 0;
  u32 row_ = 0;
};

/// Calls body(first, pointers, dtype) for a segment's rows in pieces of up to 64, in order; those
/// that kernels can't read where they lie come one by one, as float. The rows last for the call.
template <class Body>
void for_each_row_tile(const Rows& rows, u32 head, u32 length, Body&& body) noexcept {
  constexpr u32 tile = 64;
  const std::byte* pointers[tile];
  if (is_contiguous_row(rows)) {
    for (u32 first = 0; first < length; first += tile) {
      body(first, point_at_rows(rows, head, first, std::min(tile, length - first), pointers),
           rows.dtype);
    }
    return;
  }
  float row[max_row_width];
  pointers[0] = reinterpret_cast<const std::byte*>(row);
  for (u32 token = 0; token < length; ++token) {
    load_row(rows, head, token, row);
    body(token, simd::RowPointers{pointers, 1}, DType::f32);
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
