// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/move_rows.hpp"
#include "kvlean/core/plan.hpp"
#include "kvlean/core/row_addresses.hpp"
#include "kvlean/simd/merge_kernels.hpp"

// Sums of slots whose term ranges overlap, as CaM's do: neighbours have most of their terms in
// common. Neighbouring slots share sums of them.

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

/// Sums of a segment's slots that share terms, as MergeKernels::add_windows has them.
class SharedTerms {
 public:
  SharedTerms(const CompressionPlan& plan, const Rows& values, u32 segment) noexcept
      : values_(values), segment_(segment), kernels_(simd::merge_kernels()) {
    rows_.slots = {plan.anchor, plan.term_begin, plan.term_end, plan.term_token};
    rows_.end = plan.first[segment + 1];
    // What the segments before have evicted is not to change the order of additions.
    const u64 first_slot = plan.first[segment];
    if (plan.has_terms() && first_slot != rows_.end) rows_.first_term = plan.term_begin[first_slot];
    rows_.width = values.width;
    rows_.self = plan.self_value_weight != nullptr ? plan.self_value_weight : plan.self_weight;
    rows_.weight = plan.term_value_weight != nullptr ? plan.term_value_weight : plan.term_weight;
    if (is_contiguous_row(values)) {
      rows_.from = places_of(values, segment);
      rows_.dtype = values.dtype;
    } else {
      rows_.load = load;
      rows_.source = this;
    }
  }
  SharedTerms(const SharedTerms&) = delete;
  SharedTerms& operator=(const SharedTerms&) = delete;

  /// Writes the values of slots [begin, end) to rows of `to` from `to_token` on; they must be
  /// contiguous rows in memory on both sides, those written of the type read or float.
  void write(u64 begin, u64 end, const Rows& to, u32 to_token) noexcept {
    kernels_.add_windows(rows_, sums_, begin, end, places_of(to, segment_), to_token,
                         to.dtype == DType::f32);
  }
  /// A slot's value [width], in float.
  void add(u64 slot, float* sum) noexcept {
    simd::RowPlaces place;
    place.data = reinterpret_cast<std::byte*>(sum);
    kernels_.add_windows(rows_, sums_, slot, slot + 1, place, 0, true);
  }

 private:
  static void load(const void* source, u32 token, float* row) noexcept {
    const SharedTerms& terms = *static_cast<const SharedTerms*>(source);
    load_row(terms.values_, terms.segment_, token, row);
  }

  const Rows& values_;
  u32 segment_;
  const simd::MergeKernels& kernels_;
  simd::WindowedRows rows_;
  simd::WindowSums sums_;
};

}  // namespace detail
KVLEAN_NAMESPACE_END
