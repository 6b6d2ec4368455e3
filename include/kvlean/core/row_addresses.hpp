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

/// The rows of one tensor, or of two side by side, to be prefetched in a loop over tokens, in
/// order. The loop asks often for a few: the memory is then busy all the time.
class RowsAhead {
 public:
  /// So many tokens ahead, rows arrive in time and still fit into the first cache.
  static constexpr u32 lead = 32;

  RowsAhead(const RowAddresses& first, const RowAddresses* second, u32 length) noexcept
      : first_(first), second_(second), length_(length) {}

  /// The rows before token `to` that were not asked for yet, at most `most`, into pointers[most].
  simd::RowPointers take(u32 to, u32 most, const std::byte** pointers) noexcept {
    const u32 tensors = second_ != nullptr ? 2 : 1;
    const u32 end = std::min({to, length_, next_ + most / tensors});
    u32 count = 0;
    for (; next_ < end; ++next_) {
      pointers[count++] = first_(next_);
      if (second_ != nullptr) pointers[count++] = (*second_)(next_);
    }
    return {pointers, count};
  }

 private:
  const RowAddresses& first_;
  const RowAddresses* second_;
  u32 length_;
  u32 next_ = 0;
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
