// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "kvlean/core/dtype.hpp"
#include "kvlean/simd/row_kernels.hpp"
#include "kvlean/status.hpp"

KVLEAN_NAMESPACE_BEGIN

/// One run-time-typed description of rows [head][token][dim] in somebody's memory: all that a
/// kernel takes, so kernels are never instantiated per layout. Strides count elements and may be
/// negative; the address of element (head, token, dim) is found by the first rule that applies:
///
///   load/store set  the accessor is called (tiles, blocks with scales)
///   order set       token := order[head * order_stride + token], then on
///   page_table set  page  := page_table[head * page_table_stride + token / page_tokens]
///                   data + page * page_stride + head * head_stride + (token % page_tokens) *
///                   token_stride
///   otherwise       data + head * head_stride + (first[head] + token) * token_stride   (first: 0
///   if null)
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool writable = false;
  u32 width = 0;   ///< elements in a row
  u32 heads = 0;   ///< rows of segments, or query heads
  u32 tokens = 0;  ///< capacity of the longest segment, in tokens
  i64 head_stride = 0;
  i64 token_stride = 0;
  i64 dim_stride = 1;
  const u64* first = nullptr;  ///< [heads] first row of each segment in a flat ragged store
  const i32* page_table = nullptr;
  u32 page_tokens = 0;
  u32 page_table_length = 0;  ///< entries of the table (per head when page_table_stride != 0)
  i64 page_table_stride = 0;  ///< 0: one table for all heads
  i64 page_stride = 0;
  const u32* order = nullptr;  ///< index list: logical token -> cell
  i64 order_stride = 0;        ///< 0: one list for all heads
  const void* accessor = nullptr;
  void (*load)(const void* accessor, u32 head, u32 token, float* row) noexcept = nullptr;
  void (*store)(const void* accessor, u32 head, u32 token, const float* row) noexcept = nullptr;
};

/// Address of element 0 of a row. Not for accessor rows. O(1).
[[nodiscard]] inline std::byte* row_address(const Rows& rows, u32 head, u32 token) noexcept {
  i64 offset = static_cast<i64>(head) * rows.head_stride;
  if (rows.order != nullptr) {
    token = rows.order[static_cast<i64>(head) * rows.order_stride + static_cast<i64>(token)];
  }
  if (rows.page_table != nullptr) {
    const u32 entry = token / rows.page_tokens;
    const i64 page =
        rows.page_table[static_cast<i64>(head) * rows.page_table_stride + static_cast<i64>(entry)];
    offset += page * rows.page_stride +
              static_cast<i64>(token - entry * rows.page_tokens) * rows.token_stride;
  } else {
    const i64 first = rows.first != nullptr ? static_cast<i64>(rows.first[head]) : 0;
    offset += (first + static_cast<i64>(token)) * rows.token_stride;
  }
  return static_cast<std::byte*>(rows.data) + offset * static_cast<i64>(size_bytes(rows.dtype));
}

/// Reads a row as float into `row` [width]. O(width).
inline void load_row(const Rows& rows, u32 head, u32 token, float* row) noexcept {
  if (rows.load != nullptr) {
    rows.load(rows.accessor, head, token, row);
    return;
  }
  const std::byte* address = row_address(rows, head, token);
  if (rows.dim_stride == 1) {
    simd::row_kernels().load(address, rows.dtype, row, rows.width);
    return;
  }
  const i64 step = rows.dim_stride * static_cast<i64>(size_bytes(rows.dtype));
  if (rows.dtype == DType::f32) {
    for (u32 i = 0; i < rows.width; ++i, address += step) std::memcpy(row + i, address, 4);
  } else if (rows.dtype == DType::f16) {
    for (u32 i = 0; i < rows.width; ++i, address += step) {
      u16 bits;
      std::memcpy(&bits, address, 2);
      row[i] = detail::f16_bits_to_f32(bits);
    }
  } else {
    for (u32 i = 0; i < rows.width; ++i, address += step) {
      u16 bits;
      std::memcpy(&bits, address, 2);
      row[i] = detail::bf16_bits_to_f32(bits);
    }
  }
}

/// Writes a float row, rounded to the storage type. `rows.writable` must hold. O(width).
inline void store_row(const Rows& rows, u32 head, u32 token, const float* row) noexcept {
  if (rows.store != nullptr) {
    rows.store(rows.accessor, head, token, row);
    return;
  }
  std::byte* address = row_address(rows, head, token);
  if (rows.dim_stride == 1) {
    simd::row_kernels().store(row, address, rows.dtype, rows.width);
    return;
  }
  const i64 step = rows.dim_stride * static_cast<i64>(size_bytes(rows.dtype));
  for (u32 i = 0; i < rows.width; ++i, address += step) store_element(address, rows.dtype, row[i]);
}

/// Copies one row between stores of any layout; the bits are kept when the types agree and neither
/// side is an accessor. The rows must not partly overlap. O(width).
inline void copy_row(const Rows& from, u32 from_head, u32 from_token, const Rows& to, u32 to_head,
                     u32 to_token) noexcept {
  if (from.load == nullptr && to.store == nullptr && from.dtype == to.dtype) {
    const std::byte* source = row_address(from, from_head, from_token);
    std::byte* target = row_address(to, to_head, to_token);
    const std::size_t element = size_bytes(from.dtype);
    if (from.dim_stride == 1 && to.dim_stride == 1) {
      if (source != target) std::memmove(target, source, from.width * element);
      return;
    }
    const i64 source_step = from.dim_stride * static_cast<i64>(element);
    const i64 target_step = to.dim_stride * static_cast<i64>(element);
    for (u32 i = 0; i < from.width; ++i, source += source_step, target += target_step) {
      std::memcpy(target, source, element);
    }
    return;
  }
  float row[max_row_width];
  load_row(from, from_head, from_token, row);
  store_row(to, to_head, to_token, row);
}

namespace detail {

/// Tokens from `token` on whose rows are token_stride apart, at most `limit`. Not for accessors.
[[nodiscard]] inline u32 straight_tokens(const Rows& rows, u32 token, u32 limit) noexcept {
  if (rows.order != nullptr) return 1;
  if (rows.page_table == nullptr) return limit;
  return std::min(limit, rows.page_tokens - token % rows.page_tokens);
}

}  // namespace detail

/// Checks everything that shapes and tables can show: null data, zero extents, width, page size,
/// page entries for the first `tokens` tokens. Does not touch the rows. O(heads * pages).
[[nodiscard]] inline Status check_rows(const Rows& rows, u32 tokens) noexcept {
  if (rows.heads == 0 || rows.width == 0) return StatusCode::invalid_shape;
  if (rows.width > max_row_width) return StatusCode::row_too_wide;
  if (tokens > rows.tokens) return StatusCode::invalid_length;
  if (rows.load != nullptr) return StatusCode::ok;
  if (rows.data == nullptr && rows.tokens != 0) return StatusCode::null_pointer;
  if (rows.page_table != nullptr) {
    if (rows.page_tokens == 0) return StatusCode::invalid_shape;
    const u32 heads = rows.page_table_stride == 0 ? 1 : rows.heads;
    // With an index list any page of the table may be reached.
    const u32 used = rows.order != nullptr
                         ? rows.page_table_length
                         : static_cast<u32>((static_cast<u64>(tokens) + rows.page_tokens - 1) /
                                            rows.page_tokens);
    if (used > rows.page_table_length) return StatusCode::invalid_page_table;
    for (u32 head = 0; head < heads; ++head) {
      for (u32 entry = 0; entry < used; ++entry) {
        if (rows.page_table[static_cast<i64>(head) * rows.page_table_stride +
                            static_cast<i64>(entry)] < 0) {
          return StatusCode::invalid_page_table;
        }
      }
    }
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
