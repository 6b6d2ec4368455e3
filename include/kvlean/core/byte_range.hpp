// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kvlean/core/rows.hpp"

// Where rows lie in memory, for overlap checks.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Addresses [begin, end) as numbers, so that unrelated objects can be compared.
struct ByteRange {
  u64 begin = 0;
  u64 end = 0;

  [[nodiscard]] static ByteRange of(const void* data, std::size_t bytes) noexcept {
    const u64 begin = static_cast<u64>(reinterpret_cast<std::uintptr_t>(data));
    return {begin, begin + bytes};
  }
  [[nodiscard]] bool overlaps(const ByteRange& other) const noexcept {
    return begin < other.end && other.begin < end;
  }
};

/// The bytes of `tokens` rows that lie token_stride apart, the first one `offset` elements after
/// the data pointer.
[[nodiscard]] inline ByteRange straight_range(const Rows& rows, i64 offset, u64 tokens) noexcept {
  if (tokens == 0 || rows.width == 0) return {};
  const i64 across_tokens = static_cast<i64>(tokens - 1) * rows.token_stride;
  const i64 across_dims = static_cast<i64>(rows.width - 1) * rows.dim_stride;
  const i64 low = offset + std::min<i64>(across_tokens, 0) + std::min<i64>(across_dims, 0);
  const i64 high = offset + std::max<i64>(across_tokens, 0) + std::max<i64>(across_dims, 0) + 1;
  const i64 element = static_cast<i64>(size_bytes(rows.dtype));
  const u64 data = static_cast<u64>(reinterpret_cast<std::uintptr_t>(rows.data));
  return {data + static_cast<u64>(low * element), data + static_cast<u64>(high * element)};
}

/// Calls visit(ByteRange) for ranges that together hold the first `length` rows of a head: one for
/// plain rows, one a page, and one from the lowest to the highest cell of an index list. Accessor
/// rows have no addresses and give none. O(pages or cells).
template <class Visit>
void for_each_byte_range(const Rows& rows, u32 head, u32 length, Visit&& visit) noexcept {
  if (rows.load != nullptr || rows.data == nullptr || length == 0) return;
  const i64 head_offset = static_cast<i64>(head) * rows.head_stride;
  if (rows.page_table != nullptr) {
    const u32 pages =
        rows.order != nullptr ? rows.page_table_length : (length - 1) / rows.page_tokens + 1;
    const i32* table = rows.page_table + static_cast<i64>(head) * rows.page_table_stride;
    for (u32 page = 0; page < pages; ++page) {
      const u32 tokens = rows.order != nullptr
                             ? rows.page_tokens
                             : std::min(rows.page_tokens, length - page * rows.page_tokens);
      visit(straight_range(rows, head_offset + table[page] * rows.page_stride, tokens));
    }
    return;
  }
  u64 low = 0;
  u64 tokens = length;
  if (rows.order != nullptr) {
    const u32* cells = rows.order + static_cast<i64>(head) * rows.order_stride;
    const auto ends = std::minmax_element(cells, cells + length);
    low = *ends.first;
    tokens = static_cast<u64>(*ends.second) - low + 1;
  }
  const u64 first = rows.first != nullptr ? rows.first[head] : 0;
  visit(straight_range(rows, head_offset + static_cast<i64>(first + low) * rows.token_stride,
                       tokens));
}

/// Whether any of the first `length` rows of a head may share bytes with `other`.
[[nodiscard]] inline bool rows_touch(const Rows& rows, u32 head, u32 length,
                                     const ByteRange& other) noexcept {
  bool touch = false;
  for_each_byte_range(rows, head, length,
                      [&](const ByteRange& range) noexcept { touch |= range.overlaps(other); });
  return touch;
}

/// The smallest range around the first `length` rows of a head; empty for accessor rows.
[[nodiscard]] inline ByteRange hull(const Rows& rows, u32 head, u32 length) noexcept {
  ByteRange all;
  for_each_byte_range(rows, head, length, [&](const ByteRange& range) noexcept {
    if (all.begin == all.end) {
      all = range;
    } else {
      all = {std::min(all.begin, range.begin), std::max(all.end, range.end)};
    }
  });
  return all;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
