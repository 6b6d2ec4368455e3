// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <utility>

#include "kvlean/apply/in_place.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Pages that `length` tokens take, the last one perhaps partly filled.
[[nodiscard]] constexpr u32 pages_used(u32 length, u32 page_tokens) noexcept {
  return length / page_tokens + (length % page_tokens != 0 ? 1u : 0u);
}

namespace detail {

/// Whether the plan keeps of segment s just the pages that it keeps of segment `of`.
[[nodiscard]] inline bool keeps_same_pages(const CompressionPlan& plan, const CacheView& cache,
                                           u32 s, u32 of) noexcept {
  u32 i = 0;
  u32 j = 0;
  const auto page_at = [&](u32 segment, u32& at) noexcept {
    const u32 token = plan.anchor[plan.first[segment] + at];
    at += std::min(plan.page_tokens, cache.length(segment) - token);
    return token / plan.page_tokens;
  };
  const u32 pages = pages_used(cache.length(s), plan.page_tokens);
  while (i < plan.length[s]) {
    if (j >= plan.length[of] || page_at(s, i) != page_at(of, j)) return false;
  }
  // The longer segment may keep pages where the shorter one has none.
  return j >= plan.length[of] || plan.anchor[plan.first[of] + j] / plan.page_tokens >= pages;
}

/// Moves the entries of kept pages to the front in order; dropped ones follow in any order.
inline void compact_table(const CompressionPlan& plan, const CacheView& cache, u32 s,
                          i32* table) noexcept {
  u32 kept = 0;
  for (u32 j = 0; j < plan.length[s]; ++kept) {
    const u32 token = plan.anchor[plan.first[s] + j];
    std::swap(table[kept], table[token / plan.page_tokens]);
    j += std::min(plan.page_tokens, cache.length(s) - token);
  }
}

}  // namespace detail

/// Carries out a plan of whole pages (plan.page_tokens > 0) by rewriting the page table that keys
/// and values are found through; no row moves. Blended and turned keys are written at their
/// anchors' rows first, then positions, log mass, lengths and the next position follow.
/// `page_table` is the table the cache's tensors point at. Kept pages come first, in order; the
/// dropped ones stand behind them, up to the pages that were in use, and are the caller's to free.
/// With one table for all heads the heads must keep the same pages; with a table a head each is
/// compacted. `pages_kept` is the sum over the tables.
///
/// Errors, all found before the first write: those of validate_plan; invalid_plan (no page_tokens,
/// another page size, or heads that share a table and differ); invalid_page_table (keys and values
/// are not both found through `page_table`, it is too short, or an index list lies over it);
/// read_only when rows would be rewritten; the others of apply(plan, cache, in_place).
/// O(slots + pages + terms * width).
[[nodiscard]] inline Status apply_to_page_table(const CompressionPlan& plan, CacheView& cache,
                                                std::span<i32> page_table, std::size_t& pages_kept,
                                                const Executor& executor = {}) noexcept {
  KVLEAN_RETURN_IF_ERROR(validate_plan(plan, cache));
  const Rows& keys = cache.keys;
  const Rows& values = cache.values;
  if (plan.page_tokens == 0) return StatusCode::invalid_plan;
  if (page_table.data() == nullptr || keys.page_table != page_table.data() ||
      values.page_table != page_table.data() || keys.order != nullptr || values.order != nullptr ||
      keys.page_table_stride != values.page_table_stride || keys.page_table_stride < 0) {
    return StatusCode::invalid_page_table;
  }
  if (keys.page_tokens != plan.page_tokens || values.page_tokens != plan.page_tokens) {
    return StatusCode::invalid_plan;
  }
  const bool shared = keys.page_table_stride == 0;
  const auto stride = static_cast<std::size_t>(keys.page_table_stride);
  u32 longest = 0;
  for (u32 s = 0; s < plan.segments; ++s) {
    if (cache.length(s) > cache.length(longest)) longest = s;
    if (s * stride + pages_used(cache.length(s), plan.page_tokens) > page_table.size()) {
      return StatusCode::invalid_page_table;
    }
  }
  for (u32 s = 0; shared && s < plan.segments; ++s) {
    if (!detail::keeps_same_pages(plan, cache, s, longest)) return StatusCode::invalid_plan;
  }
  if (detail::rewrites_rows(plan, cache) && (!keys.writable || !values.writable)) {
    return StatusCode::read_only;
  }
  KVLEAN_RETURN_IF_ERROR(detail::check_cache_can_hold(plan, cache));

  const detail::KeyRotation rotation(plan, cache);
  parallel_for(executor, plan.segments,
               [&](u32, u32 s) noexcept { detail::fold_segment(plan, cache, rotation, s); });
  pages_kept = 0;
  for (u32 s = 0; s < plan.segments; ++s) {
    if (shared && s != longest) continue;
    detail::compact_table(plan, cache, s, page_table.data() + s * stride);
    pages_kept += pages_used(plan.length[s], plan.page_tokens);
  }
  detail::compact_arrays(plan, cache);
  return StatusCode::ok;
}

/// The same for a KVCache, whose length and next position are updated.
template <Tensor K, Tensor V>
[[nodiscard]] Status apply_to_page_table(const CompressionPlan& plan, KVCache<K, V>& cache,
                                         std::span<i32> page_table, std::size_t& pages_kept,
                                         const Executor& executor = {}) noexcept {
  CacheView view = cache.view();
  KVLEAN_RETURN_IF_ERROR(apply_to_page_table(plan, view, page_table, pages_kept, executor));
  detail::adopt_length(cache, view);
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
