// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>

#include "kvlean/core/concepts.hpp"

KVLEAN_NAMESPACE_BEGIN

namespace detail::allocation {

/// What is left of entry `index` after rounding down, in units that all entries share.
struct Remainder {
  u64 part;
  u32 index;
};

/// Brings the `units` entries with the largest remainders to the front; among equals the lowest
/// index wins. O(count) on average.
inline void rank_remainders(Remainder* remainder, u32 count, u64 units) noexcept {
  if (units == 0 || units >= count) return;
  std::nth_element(remainder, remainder + (units - 1), remainder + count,
                   [](const Remainder& a, const Remainder& b) {
                     return a.part != b.part ? a.part > b.part : a.index < b.index;
                   });
}

/// floor(slots * factor) in binary32, factor in [0, 1]: 0.7f of 10 is 7, as in the papers'
/// decimals, though the nearest float lies below 0.7.
[[nodiscard]] inline u32 scaled_slots(u32 slots, float factor) noexcept {
  const float scaled = static_cast<float>(slots) * factor;
  return scaled >= static_cast<float>(slots) ? slots : static_cast<u32>(scaled);
}

/// Clamps value[i] to [low[i], high[i]] and makes the sum `total`: what is missing or too much is
/// shared in proportion to each entry's room to its bound, rounded by largest remainder (ties:
/// lowest index). Integers throughout. Needs low <= high, sum(low) <= total <= sum(high) and, for
/// exact products, less than 2^32 slots to move. O(count); scratch only when something moves.
[[nodiscard]] inline Status fit_total(u32* value, const u32* low, const u32* high, u32 count,
                                      u64 total, Workspace& workspace) noexcept {
  u64 sum = 0;
  for (u32 i = 0; i < count; ++i) {
    value[i] = std::clamp(value[i], low[i], high[i]);
    sum += value[i];
  }
  if (sum == total) return StatusCode::ok;
  WorkspaceScope scope(workspace);
  Remainder* remainder = workspace.take<Remainder>(count);
  if (remainder == nullptr) return workspace.exhausted();
  const bool grow = sum < total;
  const u64 amount = grow ? total - sum : sum - total;
  const auto room = [&](u32 i) noexcept -> u64 {
    return grow ? high[i] - value[i] : value[i] - low[i];
  };
  const auto move = [&](u32 i, u32 slots) noexcept {
    value[i] = grow ? value[i] + slots : value[i] - slots;
  };
  u64 space = 0;
  for (u32 i = 0; i < count; ++i) space += room(i);
  KVLEAN_ASSERT(amount <= space);
  u64 left = amount;
  for (u32 i = 0; i < count; ++i) {
    const u64 product = amount * room(i);
    const u32 share = static_cast<u32>(product / space);
    remainder[i] = {product % space, i};
    move(i, share);
    left -= share;
  }
  rank_remainders(remainder, count, left);
  // Every entry served here has a remainder above zero, so its bound is at least one slot away.
  for (u64 i = 0; i < left; ++i) move(remainder[i].index, 1);
  return StatusCode::ok;
}

/// The segments of a span of layers in order, as flat arrays in the workspace.
struct Group {
  u32 count = 0;
  u32* value = nullptr;    ///< in: nominal slots, at most the length; out: the limit
  u32* low = nullptr;      ///< slots that must be granted
  u32* high = nullptr;     ///< length
  u32* nominal = nullptr;  ///< as given, also above the length

  [[nodiscard]] Group slice(u32 first, u32 segments) const noexcept {
    return {segments, value + first, low + first, high + first, nominal + first};
  }
  [[nodiscard]] u64 total() const noexcept {
    u64 sum = 0;
    for (u32 i = 0; i < count; ++i) sum += value[i];
    return sum;
  }
  /// The slots that sharing has to give away: all nominals, as far as there are tokens.
  [[nodiscard]] u64 shared_total() const noexcept {
    u64 slots = 0;
    u64 tokens = 0;
    for (u32 i = 0; i < count; ++i) {
      slots += nominal[i];
      tokens += high[i];
    }
    return std::min(slots, tokens);
  }
};

/// Copies shapes, nominals and floors into a Group. A floor below the protected count is raised to
/// it; values and floors above the length count as the length.
/// Errors: null_pointer, workspace_too_small, out_of_memory.
[[nodiscard]] inline Status gather(std::span<const LayerLimits> layers, Context& context,
                                   Group& group) noexcept {
  group = {};
  for (const LayerLimits& layer : layers) {
    if (layer.cache == nullptr || layer.limit == nullptr || layer.floor == nullptr) {
      return StatusCode::null_pointer;
    }
    group.count += layer.cache->segments;
  }
  group.value = context.workspace.take<u32>(group.count);
  group.low = context.workspace.take<u32>(group.count);
  group.high = context.workspace.take<u32>(group.count);
  group.nominal = context.workspace.take<u32>(group.count);
  if (group.value == nullptr || group.low == nullptr || group.high == nullptr ||
      group.nominal == nullptr) {
    return context.workspace.exhausted();
  }
  u32 i = 0;
  for (const LayerLimits& layer : layers) {
    for (u32 s = 0; s < layer.cache->segments; ++s, ++i) {
      const u32 length = layer.cache->length(s);
      const u32 covered = context.options.protection.count(length, layer.cache->frozen);
      group.high[i] = length;
      group.nominal[i] = layer.limit[s];
      group.value[i] = std::min(layer.limit[s], length);
      group.low[i] = std::min(std::max(layer.floor[s], covered), length);
    }
  }
  return StatusCode::ok;
}

/// Writes the values of a Group back to the layers' limits.
inline void scatter(const Group& group, std::span<LayerLimits> layers) noexcept {
  u32 i = 0;
  for (LayerLimits& layer : layers) {
    for (u32 s = 0; s < layer.cache->segments; ++s) layer.limit[s] = group.value[i++];
  }
}

/// Lifts every value to its floor and makes their sum `total`, which the other values of the group
/// pay for, or gain from. Errors: budget_below_protected when the floors exceed the total;
/// workspace_too_small, out_of_memory.
[[nodiscard]] inline Status raise_to_floors(const Group& group, u64 total,
                                            Workspace& workspace) noexcept {
  u64 floors = 0;
  for (u32 i = 0; i < group.count; ++i) floors += group.low[i];
  if (total < floors) return StatusCode::budget_below_protected;
  return fit_total(group.value, group.low, group.high, group.count, total, workspace);
}

/// Whether all nominals of some segments cover all of their tokens, whoever keeps them.
[[nodiscard]] inline bool all_fit(std::span<const LayerLimits> layers) noexcept {
  u64 slots = 0;
  u64 tokens = 0;
  for (const LayerLimits& layer : layers) {
    for (u32 s = 0; s < layer.cache->segments; ++s) slots += layer.limit[s];
    tokens += layer.cache->total_length();
  }
  return tokens <= slots;
}

/// Whether every segment's nominal covers its tokens.
[[nodiscard]] inline bool each_fits(std::span<const LayerLimits> layers) noexcept {
  for (const LayerLimits& layer : layers) {
    for (u32 s = 0; s < layer.cache->segments; ++s) {
      if (layer.limit[s] < layer.cache->length(s)) return false;
    }
  }
  return true;
}

}  // namespace detail::allocation

KVLEAN_NAMESPACE_END
