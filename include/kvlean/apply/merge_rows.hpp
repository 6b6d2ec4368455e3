// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/fold.hpp"
#include "kvlean/apply/move_rows.hpp"

// Blends that are written to their slots' rows at once, without a move after them.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// A tensor's rows for MergeKernels::merge, in place.
[[nodiscard]] inline simd::MergedRows merged_rows(const Rows& rows, u32 segment, const float* self,
                                                  const float* weight) noexcept {
  simd::MergedRows merged;
  merged.from = merged.to = places_of(rows, segment);
  merged.dtype = rows.dtype;
  merged.width = rows.width;
  merged.self = self;
  merged.weight = weight;
  return merged;
}

/// Whether all rows are whole lines of the caches, so that stores may pass by these.
[[nodiscard]] inline bool rows_are_lines(const Rows& rows, u32 segment) noexcept {
  const simd::RowPlaces places = places_of(rows, segment);
  const auto lines = [](u64 bytes) noexcept { return bytes % 64 == 0; };
  return lines(reinterpret_cast<std::uintptr_t>(places.data)) &&
         lines(static_cast<u64>(places.stride)) && lines(static_cast<u64>(places.page_stride)) &&
         lines(rows.width * size_bytes(rows.dtype));
}

/// Whether a segment's slots are in order as MergeKernels::merge has them: their terms follow each
/// other and ascend, and a slot's tokens lie after all of the slot before. O(slots + terms).
[[nodiscard]] inline bool slots_follow(const CompressionPlan& plan, u32 segment) noexcept {
  const u64 first = plan.first[segment];
  if (first == plan.first[segment + 1]) return true;
  const u64 first_term = plan.term_begin[first];
  u64 next_term = first_term;
  u32 from = 0;  // the lowest token that may come
  for (u64 slot = first; slot < plan.first[segment + 1]; ++slot) {
    const u64 begin = plan.term_begin[slot];
    const u64 end = plan.term_end[slot];
    if (begin != next_term || end < begin) return false;
    const u32 anchor = plan.anchor[slot];
    u32 lowest = anchor;
    u32 highest = anchor;
    if (plan.num_terms != 0) {  // no branch on the number of terms: it can't be foreseen
      const bool any = begin != end;
      lowest = std::min(lowest, plan.term_token[any ? begin : 0] | (any ? 0u : ~0u));
      highest = std::max(highest, plan.term_token[any ? end - 1 : 0] & (any ? ~0u : 0u));
    }
    if (lowest < from) return false;
    from = highest + 1;
    next_term = end;
  }
  unsigned broken = 0;
  for (u64 term = first_term + 1; term < next_term; ++term) {
    broken |= unsigned{plan.term_token[term] <= plan.term_token[term - 1]};
  }
  return broken == 0;
}

/// Whether a plan blends rows as they lie and does nothing else to them, so that each slot's can be
/// written to its place at once.
[[nodiscard]] inline bool merges_rows(const CompressionPlan& plan,
                                      const CacheView& cache) noexcept {
  const auto plain = [](const Rows& rows) noexcept {
    return is_contiguous_row(rows) && rows.store == nullptr;
  };
  return plan.has_terms() && (plan.needs & (needs_moved_keys | needs_changed_values)) != 0 &&
         (plan.needs & needs_aligned_terms) == 0 && !plan.has_literal_keys() &&
         !plan.has_literal_values() && !keys_turn(plan, cache) && plain(cache.keys) &&
         plain(cache.values);
}

/// fold_segment() and compact_segment() in one pass over the rows. False, with nothing done, where
/// slots are out of order or K and V lie among each other. Expects merges_rows().
[[nodiscard]] inline bool merge_segment(const CompressionPlan& plan, const CacheView& cache,
                                        u32 s) noexcept {
  constexpr u32 at_once = 64;
  constexpr u32 most_fetched = 4 * at_once;
  constexpr u64 streamed_distance = u64{2} << 20;  // left the first two caches
  const u32 length = cache.length(s);
  if (!slots_follow(plan, s) ||
      hull(cache.keys, s, length).overlaps(hull(cache.values, s, length))) {
    return false;
  }
  simd::MergedRows rows[2] = {merged_rows(cache.keys, s, plan.self_weight, plan.term_weight),
                              merged_rows(cache.values, s, plan.self_weight, plan.term_weight)};
  rows[0].blends = (plan.needs & needs_moved_keys) != 0;
  if (plan.self_value_weight != nullptr) rows[1].self = plan.self_value_weight;
  if (plan.term_value_weight != nullptr) rows[1].weight = plan.term_value_weight;
  const simd::MergedSlots slots{plan.anchor, plan.term_begin, plan.term_end, plan.term_token};
  const u64 row_bytes = cache.keys.width * size_bytes(cache.keys.dtype);
  const bool lines = rows_are_lines(cache.keys, s) && rows_are_lines(cache.values, s);
  const RowAddresses key_at(cache.keys, s);
  const RowAddresses value_at(cache.values, s);
  RowsAhead ahead(key_at, &value_at, length);
  const simd::MergeKernels& kernels = simd::merge_kernels();
  bool streamed = false;
  for (u64 begin = plan.first[s]; begin < plan.first[s + 1];) {
    const u64 end = std::min<u64>(begin + at_once, plan.first[s + 1]);
    const u32 to = static_cast<u32>(begin - plan.first[s]);
    const u32 last = plan.anchor[end - 1];
    const bool streams = lines && (plan.anchor[begin] - to) * row_bytes >= streamed_distance;
    const std::byte* fetched[most_fetched];
    const simd::RowPointers soon = ahead.take(last + 2 * RowsAhead::lead, most_fetched, fetched);
    const u32 half = soon.count / 2;
    rows[0].ahead = {soon.row, half};
    rows[1].ahead = {soon.row + half, soon.count - half};
    kernels.merge(rows, 2, slots, begin, end, to, streams);
    streamed = streamed || streams;
    begin = end;
  }
  if (streamed) kernels.stream_end();
  return true;
}

}  // namespace detail
KVLEAN_NAMESPACE_END
