// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kvlean/observe/observation.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Extents of one layer's attention output, [query_head][query][value_width].
struct AttentionShape {
  u32 query_heads = 0;
  u32 count = 0;        ///< queries a head
  u32 value_width = 0;  ///< elements of an output row

  [[nodiscard]] constexpr u64 rows() const noexcept {
    return static_cast<u64>(query_heads) * count;
  }
};

/// Where one layer's attention output lies: rows of `value_width` contiguous elements, and one
/// log-sum-exp a row. Element is float, double (reference only) or const (read-only parts).
template <class Element>
struct BasicAttentionOutput {
  Element* values = nullptr;  ///< [query_head][count][value_width], or null: only `lse` is wanted
  Element* lse = nullptr;     ///< [query_head][count] natural log, contiguous; or null
  i64 head_stride = 0;        ///< elements from head to head; both strides 0: contiguous
  i64 query_stride = 0;       ///< elements from query to query

  /// The output row of one query of one head. O(1).
  [[nodiscard]] Element* row(const AttentionShape& shape, u32 head, u32 query) const noexcept {
    const bool contiguous = head_stride == 0 && query_stride == 0;
    const i64 per_query = contiguous ? static_cast<i64>(shape.value_width) : query_stride;
    const i64 per_head = contiguous ? per_query * static_cast<i64>(shape.count) : head_stride;
    return values + static_cast<i64>(head) * per_head + static_cast<i64>(query) * per_query;
  }
  /// The log-sum-exp of one query of one head. `lse` must not be null. O(1).
  [[nodiscard]] Element& log_sum_exp(const AttentionShape& shape, u32 head,
                                     u32 query) const noexcept {
    return lse[static_cast<u64>(head) * shape.count + query];
  }
  [[nodiscard]] constexpr operator BasicAttentionOutput<const Element>() const noexcept
      requires(!std::is_const_v<Element>) {
    return {values, lse, head_stride, query_stride};
  }
};

using AttentionOutput = BasicAttentionOutput<float>;
using ConstAttentionOutput = BasicAttentionOutput<const float>;

/// The shape of attention of these queries over this cache. O(1).
template <Cache C>
[[nodiscard]] AttentionShape attention_shape(const Queries& queries, const C& cache) noexcept {
  return {queries.rows.heads, queries.count, view_of(cache).values.width};
}

namespace detail {

template <class Element>
[[nodiscard]] Status check_attention(const Queries& queries, const CacheView& cache,
                                     const AttentionSpec& spec,
                                     const BasicAttentionOutput<Element>& output) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_queries(queries, cache));
  if (output.values == nullptr && output.lse == nullptr) return StatusCode::null_pointer;
  if (!std::isfinite(spec.scale) || !std::isfinite(spec.softcap) || spec.softcap < 0.0f) {
    return StatusCode::invalid_option;
  }
  return StatusCode::ok;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
