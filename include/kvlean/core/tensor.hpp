// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <type_traits>

#include "kvlean/core/rows.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Extents of a tensor [kv_head][token][dim]. `tokens` is the capacity, not the valid length.
struct Extents {
  std::size_t kv_heads = 0;
  std::size_t tokens = 0;
  std::size_t dim = 0;
};

/// Extents of queries [query_head][token][dim].
struct QueryExtents {
  std::size_t heads = 0;
  std::size_t tokens = 0;
  std::size_t dim = 0;
};

/// Strides in elements; all zero means contiguous [kv_head][token][dim]. A transposed V has
/// `dim` = its token capacity and `token` = 1.
struct Strides {
  std::ptrdiff_t head = 0;
  std::ptrdiff_t token = 0;
  std::ptrdiff_t dim = 0;
};

/// A tensor whose rows can be addressed: it hands out the one description that kernels take.
template <class T>
concept StridedTensor = requires(const T& tensor) {
  { tensor.rows() }
  noexcept->std::same_as<Rows>;
};

/// A tensor with rows in an exotic form (tiles, blocks with scales inside): it loads and stores a
/// whole row of `width()` floats. The tensor must outlive every view made of it.
template <class T>
concept RowTensor = requires(const T& tensor, u32 head, u32 token, float* row, const float* in) {
  { tensor.num_heads() }
  noexcept->std::convertible_to<std::size_t>;
  { tensor.num_tokens() }
  noexcept->std::convertible_to<std::size_t>;
  { tensor.width() }
  noexcept->std::convertible_to<std::size_t>;
  { tensor.load(head, token, row) }
  noexcept;
  { tensor.store(head, token, in) }
  noexcept;
};

/// What KVCache can wrap.
template <class T>
concept Tensor = StridedTensor<T> || RowTensor<T>;

namespace detail {

[[nodiscard]] constexpr u32 saturate_u32(std::size_t value) noexcept {
  constexpr std::size_t limit = std::numeric_limits<u32>::max();
  return static_cast<u32>(value < limit ? value : limit);
}

template <class Element>
[[nodiscard]] Rows make_rows(Element* data, Extents extents, Strides strides) noexcept {
  using Storage = std::remove_const_t<Element>;
  static_assert(StorageType<Storage>, "KVLean tensors hold float, kvlean::f16 or kvlean::bf16");
  Rows rows;
  rows.data = const_cast<Storage*>(data);  // NOLINT: `writable` carries the constness
  rows.dtype = dtype_of<Storage>;
  rows.writable = !std::is_const_v<Element>;
  rows.width = saturate_u32(extents.dim);
  rows.heads = saturate_u32(extents.kv_heads);
  rows.tokens = saturate_u32(extents.tokens);
  const bool contiguous = strides.head == 0 && strides.token == 0 && strides.dim == 0;
  rows.dim_stride = contiguous ? 1 : strides.dim;
  rows.token_stride = contiguous ? static_cast<i64>(extents.dim) : strides.token;
  rows.head_stride =
      contiguous ? static_cast<i64>(extents.tokens) * static_cast<i64>(extents.dim) : strides.head;
  return rows;
}

}  // namespace detail

/// Pointer and strides. Element may be const: then the view is read-only.
template <class Element>
class Strided {
 public:
  Strided(Element* data, Extents extents, Strides strides = {}) noexcept
      : rows_(detail::make_rows(data, extents, strides)) {}
  [[nodiscard]] Rows rows() const noexcept { return rows_; }

 private:
  Rows rows_;
};

/// Pages of `page_tokens` tokens found through a table of page numbers, as in paged engines.
/// Strides are within a page; `page_stride` leads from page to page. `extents.tokens` is the
/// capacity: table length * page_tokens.
template <class Element>
class Paged {
 public:
  Paged(Element* pool, Extents extents, Strides strides, std::ptrdiff_t page_stride,
        std::size_t page_tokens, std::span<const i32> page_table,
        std::ptrdiff_t page_table_head_stride = 0) noexcept
      : rows_(detail::make_rows(pool, extents, strides)) {
    rows_.page_table = page_table.data();
    rows_.page_tokens = detail::saturate_u32(page_tokens);
    rows_.page_stride = page_stride;
    rows_.page_table_stride = page_table_head_stride;
    const auto per_head = static_cast<std::size_t>(page_table_head_stride);
    const std::size_t before_last = extents.kv_heads == 0 ? 0 : per_head * (extents.kv_heads - 1);
    const std::size_t last = page_table.size() - std::min(page_table.size(), before_last);
    rows_.page_table_length = detail::saturate_u32(per_head == 0 ? last : std::min(last, per_head));
  }
  [[nodiscard]] Rows rows() const noexcept { return rows_; }

 private:
  Rows rows_;
};

/// Cells named by an index list: logical token t of head h lives in cell order[h * stride + t].
/// Entries must be distinct and below the number of cells behind `data`.
template <class Element>
class Indexed {
 public:
  Indexed(Element* data, Extents extents, Strides strides, std::span<const u32> order,
          std::ptrdiff_t order_head_stride = 0) noexcept
      : rows_(detail::make_rows(data, extents, strides)) {
    rows_.order = order.data();
    rows_.order_stride = order_head_stride;
    const auto per_head = static_cast<std::size_t>(order_head_stride);
    const std::size_t before_last = extents.kv_heads == 0 ? 0 : per_head * (extents.kv_heads - 1);
    const std::size_t last = order.size() - std::min(order.size(), before_last);
    rows_.tokens = std::min(rows_.tokens, detail::saturate_u32(last));
  }
  [[nodiscard]] Rows rows() const noexcept { return rows_; }

 private:
  Rows rows_;
};

/// Wraps pointer and strides: `strided(k, {.kv_heads = 8, .tokens = n, .dim = 128})`.
template <class Element>
[[nodiscard]] Strided<Element> strided(Element* data, Extents extents,
                                       Strides strides = {}) noexcept {
  return Strided<Element>(data, extents, strides);
}

/// Wraps queries: `strided(q, {.heads = 32, .tokens = 32, .dim = 128})`.
template <class Element>
[[nodiscard]] Strided<Element> strided(Element* data, QueryExtents extents,
                                       Strides strides = {}) noexcept {
  return Strided<Element>(
      data, Extents{.kv_heads = extents.heads, .tokens = extents.tokens, .dim = extents.dim},
      strides);
}

/// Wraps a page pool and its table; see Paged.
template <class Element>
[[nodiscard]] Paged<Element> paged(Element* pool, Extents extents, Strides strides,
                                   std::ptrdiff_t page_stride, std::size_t page_tokens,
                                   std::span<const i32> page_table,
                                   std::ptrdiff_t page_table_head_stride = 0) noexcept {
  return Paged<Element>(pool, extents, strides, page_stride, page_tokens, page_table,
                        page_table_head_stride);
}

/// Valid tokens of a page table whose last page is partly filled, as paged engines state it: pass
/// it to KVCache::set_length. 0 pages hold nothing.
[[nodiscard]] constexpr std::size_t paged_length(std::size_t pages, std::size_t page_tokens,
                                                 std::size_t last_page_tokens) noexcept {
  return pages == 0 ? 0 : (pages - 1) * page_tokens + last_page_tokens;
}

/// Wraps cells behind an index list; see Indexed.
template <class Element>
[[nodiscard]] Indexed<Element> indexed(Element* data, Extents extents, Strides strides,
                                       std::span<const u32> order,
                                       std::ptrdiff_t order_head_stride = 0) noexcept {
  return Indexed<Element>(data, extents, strides, order, order_head_stride);
}

/// The description kernels take, of any Tensor. For a RowTensor it points at the tensor itself.
template <Tensor T>
[[nodiscard]] Rows rows_of(const T& tensor) noexcept {
  if constexpr (StridedTensor<T>) {
    return tensor.rows();
  } else {
    Rows rows;
    rows.width = detail::saturate_u32(tensor.width());
    rows.heads = detail::saturate_u32(tensor.num_heads());
    rows.tokens = detail::saturate_u32(tensor.num_tokens());
    rows.writable = true;
    rows.accessor = &tensor;
    rows.load = [](const void* self, u32 head, u32 token, float* row) noexcept {
      static_cast<const T*>(self)->load(head, token, row);
    };
    rows.store = [](const void* self, u32 head, u32 token, const float* row) noexcept {
      static_cast<const T*>(self)->store(head, token, row);
    };
    return rows;
  }
}

KVLEAN_NAMESPACE_END
