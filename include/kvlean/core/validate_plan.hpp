// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/plan.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

[[nodiscard]] inline bool slot_has_terms(const CompressionPlan& plan, u64 slot) noexcept {
  return plan.has_terms() && plan.term_begin[slot] < plan.term_end[slot];
}
/// Position a slot will have.
[[nodiscard]] inline i32 slot_position(const CompressionPlan& plan, const CacheView& cache,
                                       u32 segment, u64 slot) noexcept {
  return plan.position != nullptr ? plan.position[slot]
                                  : cache.position(segment, plan.anchor[slot]);
}
/// Whether a slot's key is anything but its anchor's, its position left aside.
[[nodiscard]] inline bool key_blends(const CompressionPlan& plan, u64 slot) noexcept {
  return plan.has_literal_keys() ||
         ((plan.needs & needs_moved_keys) != 0 &&
          (slot_has_terms(plan, slot) || plan.key_self_weight(slot) != 1.0f));
}
/// Whether keys are turned when their slots move.
[[nodiscard]] inline bool keys_turn(const CompressionPlan& plan, const CacheView& cache) noexcept {
  return plan.position != nullptr && cache.rope != nullptr &&
         cache.rope->pairing != RopePairing::none;
}
/// Whether a slot's key row is anything but its anchor's: blended, replaced or turned.
[[nodiscard]] inline bool key_changes(const CompressionPlan& plan, const CacheView& cache,
                                      u32 segment, u64 slot) noexcept {
  return key_blends(plan, slot) ||
         (keys_turn(plan, cache) &&
          plan.position[slot] != cache.position(segment, plan.anchor[slot]));
}
/// Whether a slot's value is anything but its anchor's.
[[nodiscard]] inline bool value_changes(const CompressionPlan& plan, u64 slot) noexcept {
  return plan.has_literal_values() || slot_has_terms(plan, slot) ||
         plan.value_self_weight(slot) != 1.0f;
}

/// Answers "is this token an anchor?" for tokens that mostly come in order.
class AnchorSearch {
 public:
  AnchorSearch(const u32* anchor, u32 count) noexcept : anchor_(anchor), count_(count) {}

  [[nodiscard]] bool contains(u32 token) noexcept {
    constexpr u32 near = 4;
    u32 step = 0;
    while (step < near && at_ < count_ && anchor_[at_] < token) ++at_, ++step;
    if (step == near || (at_ > 0 && anchor_[at_ - 1] >= token)) {
      at_ = static_cast<u32>(std::lower_bound(anchor_, anchor_ + count_, token) - anchor_);
    }
    return at_ < count_ && anchor_[at_] == token;
  }

 private:
  const u32* anchor_;
  u32 count_;
  u32 at_ = 0;
};

[[nodiscard]] inline Status check_plan_arrays(const CompressionPlan& plan,
                                              const CacheView& cache) noexcept {
  constexpr u32 known = needs_ragged_lengths | needs_log_mass | needs_moved_keys |
                        needs_changed_values | needs_new_positions | needs_aligned_terms;
  if (plan.segments != cache.segments || (plan.needs & ~known) != 0)
    return StatusCode::invalid_plan;
  if (plan.length == nullptr || plan.first == nullptr || plan.first[0] != 0) {
    return StatusCode::invalid_plan;
  }
  bool ragged = false;
  u32 longest = 0;
  for (u32 s = 0; s < plan.segments; ++s) {
    if (plan.length[s] > cache.length(s)) return StatusCode::invalid_plan;
    if (plan.first[s + 1] != plan.first[s] + plan.length[s]) return StatusCode::invalid_plan;
    ragged = ragged || plan.length[s] != plan.length[0];
    longest = std::max(longest, plan.length[s]);
  }
  const auto asks = [&plan](u32 need) noexcept { return (plan.needs & need) != 0; };
  if (plan.anchor == nullptr && plan.num_slots() != 0) return StatusCode::invalid_plan;
  if (ragged != asks(needs_ragged_lengths)) return StatusCode::invalid_plan;
  if ((plan.log_mass != nullptr) != asks(needs_log_mass)) return StatusCode::invalid_plan;
  if ((plan.position != nullptr) != asks(needs_new_positions)) return StatusCode::invalid_plan;
  if (asks(needs_aligned_terms) && cache.rope == nullptr) return StatusCode::needs_rope;
  if ((plan.term_begin == nullptr) != (plan.term_end == nullptr)) return StatusCode::invalid_plan;

  const auto literal_fits = [&](const Rows& rows, u32 width) noexcept {
    return rows.heads == plan.segments && rows.width == width && check_rows(rows, longest).ok();
  };
  if (plan.has_literal_keys() &&
      (!asks(needs_moved_keys) || !literal_fits(plan.literal_keys, cache.keys.width))) {
    return StatusCode::invalid_plan;
  }
  if (plan.has_literal_values() &&
      (!asks(needs_changed_values) || !literal_fits(plan.literal_values, cache.values.width))) {
    return StatusCode::invalid_plan;
  }
  if ((plan.has_literal_keys() || plan.has_literal_values()) && cache.frozen != 0) {
    return StatusCode::frozen_token_changed;
  }
  return StatusCode::ok;
}

/// Whether all of `count` numbers are finite. No branch: compilers vectorise it.
[[nodiscard]] inline bool all_finite(const float* values, u32 count) noexcept {
  constexpr u32 exponent = 0x7f800000u;
  u32 broken = 0;
  for (u32 i = 0; i < count; ++i) {
    broken |= (std::bit_cast<u32>(values[i]) & exponent) == exponent ? 1u : 0u;
  }
  return broken == 0;
}
/// Whether each number is above the one before.
template <class T>
[[nodiscard]] bool ascends(const T* values, u32 count) noexcept {
  u32 broken = 0;
  for (u32 i = 1; i < count; ++i) broken |= values[i] <= values[i - 1] ? 1u : 0u;
  return broken == 0;
}

[[nodiscard]] inline Status check_plan_slots(const CompressionPlan& plan, const CacheView& cache,
                                             u32 s) noexcept {
  const u32 count = plan.length[s];
  const u64 first = plan.first[s];
  if (count == 0) return StatusCode::ok;
  const auto finite = [=](const float* values) noexcept {
    return values == nullptr || all_finite(values + first, count);
  };
  bool good =
      plan.anchor[first + count - 1] < cache.length(s) && ascends(plan.anchor + first, count);
  good = good && (plan.position == nullptr || ascends(plan.position + first, count));
  good =
      good && finite(plan.log_mass) && finite(plan.self_weight) && finite(plan.self_value_weight);
  if (good && plan.has_terms()) {
    u32 broken = 0;
    for (u64 slot = first; slot < first + count; ++slot) {
      const u64 end = plan.term_end[slot];
      broken |= unsigned{plan.term_begin[slot] > end} | unsigned{end > plan.num_terms};
    }
    good = broken == 0;
  }
  if ((plan.needs & needs_changed_values) == 0) {
    for (u64 slot = first; good && slot < first + count; ++slot) good = !value_changes(plan, slot);
  }
  if (!good) return StatusCode::invalid_plan;
  if (plan.next_position >= 0 &&
      slot_position(plan, cache, s, first + count - 1) >= plan.next_position) {
    return StatusCode::invalid_plan;
  }
  return StatusCode::ok;
}

[[nodiscard]] inline Status check_plan_frozen(const CompressionPlan& plan, const CacheView& cache,
                                              u32 s) noexcept {
  if (plan.length[s] < cache.frozen) return StatusCode::frozen_token_changed;
  for (u32 j = 0; j < cache.frozen; ++j) {
    const u64 slot = plan.first[s] + j;
    const bool same =
        plan.anchor[slot] == j && !key_blends(plan, slot) && !value_changes(plan, slot) &&
        (plan.position == nullptr || plan.position[slot] == cache.position(s, j)) &&
        // Plans hold finite numbers; apply() leaves a frozen token's own as it is.
        (plan.log_mass == nullptr || plan.log_mass[slot] == cache.finite_mass_bias(s, j));
    if (!same) return StatusCode::frozen_token_changed;
  }
  return StatusCode::ok;
}

/// Whether each new term of a slot lies between the anchors of the slots before and after it, as
/// is usual, and nothing is wrong with it.
[[nodiscard]] inline bool terms_are_near(const CompressionPlan& plan, const CacheView& cache,
                                         u32 s) noexcept {
  const bool weights = plan.term_weight != nullptr;
  const bool values = plan.term_value_weight != nullptr;
  if (plan.term_token == nullptr ||
      (!weights && (!values || (plan.needs & needs_moved_keys) != 0))) {
    return false;
  }
  const u64 last = plan.first[s + 1];
  u64 seen_begin = 0;  // these were looked at
  u64 seen = 0;
  u32 from = cache.frozen;  // the lowest token that may come
  u32 broken = 0;
  for (u64 slot = plan.first[s]; slot < last; ++slot) {
    u64 begin = plan.term_begin[slot];
    const u64 end = plan.term_end[slot];
    const u32 anchor = plan.anchor[slot];
    const u32 next = slot + 1 < last ? plan.anchor[slot + 1] : cache.length(s);
    if (begin != end) {
      if (begin >= seen) {
        seen_begin = begin;
      } else if (begin < seen_begin) {
        return false;
      }
      begin = std::min(std::max(begin, seen), end);
      for (u64 term = begin; term < end; ++term) {
        const u32 token = plan.term_token[term];
        broken |= unsigned{token < from} | unsigned{token >= next} | unsigned{token == anchor};
      }
      const u32 count = static_cast<u32>(end - begin);
      broken |= unsigned{weights && !all_finite(plan.term_weight + begin, count)};
      broken |= unsigned{values && !all_finite(plan.term_value_weight + begin, count)};
      seen = std::max(seen, end);
    }
    from = std::max(from, anchor + 1);
  }
  return broken == 0;
}

/// Whether each slot's range of terms begins and ends where the one before does or later, without
/// a gap. No branch: compilers vectorise it. The ranges must be inside the plan's terms.
[[nodiscard]] inline bool ranges_move_ahead(const CompressionPlan& plan, u32 s) noexcept {
  const u64 last = plan.first[s + 1];
  u64 broken = 0;  // its sign
  for (u64 slot = plan.first[s] + 1; slot < last; ++slot) {
    const u64 end = plan.term_end[slot - 1];
    broken |= (plan.term_begin[slot] - plan.term_begin[slot - 1]) | (end - plan.term_begin[slot]) |
              (plan.term_end[slot] - end);
  }
  return static_cast<i64>(broken) >= 0;
}
/// Whether moreover terms ascend, each new one of a slot lies between the anchors of the slot
/// before and of the slot itself, as CaM's do, and nothing is wrong with them.
[[nodiscard]] inline bool terms_move_ahead(const CompressionPlan& plan, const CacheView& cache,
                                           u32 s) noexcept {
  const u64 first = plan.first[s];
  const u64 last = plan.first[s + 1];
  if (first == last || plan.term_token == nullptr || plan.term_weight == nullptr) return false;
  const u64 begin = plan.term_begin[first];
  const u64 num_terms = plan.term_end[last - 1] - begin;
  if (num_terms == 0 || num_terms > cache.length(s) || !ranges_move_ahead(plan, s)) return false;
  const u32 count = static_cast<u32>(num_terms);
  const u32* token = plan.term_token + begin;
  u32 end = 0;
  u32 from = cache.frozen;  // the lowest token that may come
  u32 broken = 0;
  for (u64 slot = first; slot < last; ++slot) {
    const u32 next_end = static_cast<u32>(plan.term_end[slot] - begin);
    const u32 anchor = plan.anchor[slot];
    // Where nothing is new, some token is looked at all the same.
    const u32 low = token[std::min(end, count - 1)];
    const u32 high = token[next_end - unsigned{next_end != 0}];
    broken |= unsigned{next_end != end} & (unsigned{low < from} | unsigned{high >= anchor});
    end = next_end;
    from = anchor + 1;
  }
  return broken == 0 && ascends(token, count) && all_finite(plan.term_weight + begin, count) &&
         (plan.term_value_weight == nullptr || all_finite(plan.term_value_weight + begin, count));
}

[[nodiscard]] inline Status check_plan_terms(const CompressionPlan& plan, const CacheView& cache,
                                             u32 s) noexcept {
  if (terms_move_ahead(plan, cache, s) || terms_are_near(plan, cache, s)) return StatusCode::ok;
  AnchorSearch anchors(plan.anchor + plan.first[s], plan.length[s]);
  // Overlapping ranges mostly extend each other, so each term is looked at about once.
  u64 seen_begin = 0;
  u64 seen_end = 0;
  for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
    u64 begin = plan.term_begin[slot];
    const u64 end = plan.term_end[slot];
    if (begin == end) continue;
    if (plan.term_token == nullptr) return StatusCode::invalid_plan;
    if (plan.term_weight == nullptr &&
        (plan.term_value_weight == nullptr || (plan.needs & needs_moved_keys) != 0)) {
      return StatusCode::invalid_plan;
    }
    if (begin >= seen_begin && begin <= seen_end) {
      begin = std::max(begin, seen_end);
      seen_end = std::max(seen_end, end);
    } else {
      seen_begin = begin;
      seen_end = end;
    }
    for (u64 term = begin; term < end; ++term) {
      const u32 token = plan.term_token[term];
      if (token >= cache.length(s)) return StatusCode::invalid_plan;
      if (token < cache.frozen) return StatusCode::frozen_token_changed;
      if (anchors.contains(token)) return StatusCode::invalid_plan;
      if ((plan.term_weight != nullptr && !std::isfinite(plan.term_weight[term])) ||
          (plan.term_value_weight != nullptr && !std::isfinite(plan.term_value_weight[term]))) {
        return StatusCode::invalid_plan;
      }
    }
  }
  return StatusCode::ok;
}

[[nodiscard]] inline Status check_plan_pages(const CompressionPlan& plan, const CacheView& cache,
                                             u32 s) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  for (u32 j = 0; j < plan.length[s];) {
    const u32 begin = anchor[j];
    if (begin % plan.page_tokens != 0) return StatusCode::invalid_plan;
    const u32 tokens = std::min(plan.page_tokens, cache.length(s) - begin);
    // Anchors ascend, so the page is whole when its last token stands where it must.
    if (tokens > plan.length[s] - j || anchor[j + tokens - 1] != begin + tokens - 1) {
      return StatusCode::invalid_plan;
    }
    j += tokens;
  }
  return StatusCode::ok;
}

}  // namespace detail

/// Checks a plan against the cache it is for: every rule of CompressionPlan, that the needs bits
/// say what the arrays do, and that frozen tokens stay as they are. Touches no row and takes no
/// memory. needs_ragged_lengths, needs_log_mass and needs_new_positions must be set exactly when
/// lengths differ or the array is there; needs_moved_keys, needs_changed_values and
/// needs_aligned_terms may be set without need. A next position must lie past every slot's.
///
/// Errors: those of check_cache; frozen_token_changed when a frozen token is dropped, moved,
/// merged, given another position or log mass (an infinite one or NaN stands in a plan as
/// CacheView::finite_mass_bias has it), or there are literal rows; needs_rope
/// (needs_aligned_terms and a cache without a rotation); invalid_plan otherwise.
/// O(slots + terms) when terms come in token order, O(slots + terms * log slots) at worst.
[[nodiscard]] inline Status validate_plan(const CompressionPlan& plan,
                                          const CacheView& cache) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(detail::check_plan_arrays(plan, cache));
  for (u32 s = 0; s < plan.segments; ++s) {
    KVLEAN_RETURN_IF_ERROR(detail::check_plan_slots(plan, cache, s));
    KVLEAN_RETURN_IF_ERROR(detail::check_plan_frozen(plan, cache, s));
    if (plan.has_terms()) KVLEAN_RETURN_IF_ERROR(detail::check_plan_terms(plan, cache, s));
    if (plan.page_tokens != 0) KVLEAN_RETURN_IF_ERROR(detail::check_plan_pages(plan, cache, s));
  }
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
