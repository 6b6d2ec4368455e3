// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/byte_range.hpp"
#include "kvlean/core/rows.hpp"

// Moving rows in the largest pieces that a layout allows.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Neighbouring entries of `anchor` that name neighbouring tokens, from entry 0, at most `limit`.
[[nodiscard]] inline u32 run_length(const u32* anchor, u32 limit) noexcept {
  u32 n = 1;
  while (n < limit && anchor[n] == anchor[0] + n) ++n;
  return n;
}

template <std::size_t element>
void copy_elements(const std::byte* source, std::byte* target, const Rows& from, const Rows& to,
                   u32 count) noexcept {
  constexpr i64 bytes = static_cast<i64>(element);
  for (u32 i = 0; i < count; ++i) {
    const std::byte* s = source + static_cast<i64>(i) * from.token_stride * bytes;
    std::byte* t = target + static_cast<i64>(i) * to.token_stride * bytes;
    for (u32 d = 0; d < from.width; ++d) {
      std::memmove(t, s, element);
      s += from.dim_stride * bytes;
      t += to.dim_stride * bytes;
    }
  }
}

/// Copies `count` rows that are token_stride apart on both sides; the types agree. Rows are copied
/// in ascending order, so within one tensor they may move towards token 0.
inline void copy_straight(const std::byte* source, std::byte* target, const Rows& from,
                          const Rows& to, u32 count) noexcept {
  const std::size_t element = size_bytes(from.dtype);
  const i64 bytes = static_cast<i64>(element);
  const i64 width = static_cast<i64>(from.width);
  if (from.dim_stride == 1 && to.dim_stride == 1) {
    const std::size_t row = from.width * element;
    if (from.token_stride == width && to.token_stride == width) {
      std::memmove(target, source, count * row);
      return;
    }
    for (u32 i = 0; i < count; ++i) {
      std::memmove(target, source, row);
      source += from.token_stride * bytes;
      target += to.token_stride * bytes;
    }
  } else if (from.token_stride == 1 && to.token_stride == 1) {
    for (u32 d = 0; d < from.width; ++d) {
      std::memmove(target, source, count * element);
      source += from.dim_stride * bytes;
      target += to.dim_stride * bytes;
    }
  } else if (element == 4) {
    copy_elements<4>(source, target, from, to, count);
  } else {
    copy_elements<2>(source, target, from, to, count);
  }
}

/// Copies tokens [from_token, from_token + count) of a head onto [to_token, ...), in ascending
/// order. The bits are kept when the types agree and neither side is an accessor. O(count * width).
inline void copy_tokens(const Rows& from, u32 from_head, u32 from_token, const Rows& to,
                        u32 to_head, u32 to_token, u32 count) noexcept {
  if (from.load != nullptr || to.store != nullptr || from.dtype != to.dtype) {
    for (u32 i = 0; i < count; ++i) {
      copy_row(from, from_head, from_token + i, to, to_head, to_token + i);
    }
    return;
  }
  while (count != 0) {
    const u32 n =
        std::min(straight_tokens(from, from_token, count), straight_tokens(to, to_token, count));
    copy_straight(row_address(from, from_head, from_token), row_address(to, to_head, to_token),
                  from, to, n);
    from_token += n;
    to_token += n;
    count -= n;
  }
}

/// Whether tokens are neighbours in memory and dimensions are not: a transposed V.
[[nodiscard]] inline bool is_transposed(const Rows& rows) noexcept {
  return rows.load == nullptr && rows.order == nullptr && rows.page_table == nullptr &&
         rows.token_stride == 1 && rows.dim_stride != 1;
}

template <std::size_t element>
void gather_columns(const Rows& rows, u32 head, const u32* anchor, u32 begin, u32 end) noexcept {
  for (u32 d = 0; d < rows.width; ++d) {
    std::byte* column = row_address(rows, head, 0) +
                        static_cast<i64>(d) * rows.dim_stride * static_cast<i64>(element);
    for (u32 j = begin; j < end; ++j) {
      std::memcpy(column + j * element, column + std::size_t{anchor[j]} * element, element);
    }
  }
}

/// Moves row anchor[j] to row j for all j in [begin, end), in place. anchor[begin] != begin.
inline void gather_in_place(const Rows& rows, u32 head, const u32* anchor, u32 begin,
                            u32 end) noexcept {
  if (is_transposed(rows)) {  // one pass a dimension: scattered tokens would touch every line twice
    if (rows.dtype == DType::f32) {
      gather_columns<4>(rows, head, anchor, begin, end);
    } else {
      gather_columns<2>(rows, head, anchor, begin, end);
    }
    return;
  }
  for (u32 j = begin; j < end;) {
    const u32 n = run_length(anchor + j, end - j);
    copy_tokens(rows, head, anchor[j], rows, head, j, n);
    j += n;
  }
}

/// Moves the keys and values of a segment's anchors to its first `count` rows, in place. Rows that
/// stay where they are, all frozen ones among them, are not written.
inline void compact_segment(const Rows& keys, const Rows& values, u32 head, u32 length,
                            const u32* anchor, u32 count) noexcept {
  u32 begin = 0;
  while (begin < count && anchor[begin] == begin) ++begin;
  if (begin == count) return;
  if (!hull(keys, head, length).overlaps(hull(values, head, length))) {
    gather_in_place(keys, head, anchor, begin, count);
    gather_in_place(values, head, anchor, begin, count);
    return;
  }
  // V may be columns of K (latent attention): then both must leave a row before it is overwritten.
  for (u32 j = begin; j < count; ++j) {
    copy_row(keys, head, anchor[j], keys, head, j);
    copy_row(values, head, anchor[j], values, head, j);
  }
}

}  // namespace detail
KVLEAN_NAMESPACE_END
