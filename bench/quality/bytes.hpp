// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/core/plan.hpp"

namespace kvlean::bench {

/// How the bytes of a layer's cache are counted.
struct LayerBytes {
  u64 row_bytes = 0;  ///< key and value of one token
  u64 segments = 0;   ///< KV heads
  u64 tokens = 0;     ///< of all heads, before

  /// The layer as the engine holds it.
  [[nodiscard]] u64 before() const { return tokens * row_bytes; }
  /// A compressed layer: 4 bytes of position a slot, 4 of log mass where used, 8 a head for its
  /// offset and length.
  [[nodiscard]] u64 after(u64 slots, bool log_mass) const {
    return slots * (row_bytes + 4 + (log_mass ? 4u : 0u)) + 8 * segments;
  }
  [[nodiscard]] u64 after(const CompressionPlan& plan) const {
    return after(plan.num_slots(), plan.log_mass != nullptr);
  }
};

/// If the plans use log mass: plans again with fewer slots until the bytes, log mass included, are
/// at most those of plain eviction to `slots` slots a head. `plan_again(slots)` rewrites `plans`
/// and returns a Status.
template <class PlanAgain>
[[nodiscard]] Status plan_equal_bytes(std::span<const LayerBytes> layers, u32 slots,
                                      std::span<const CompressionPlan> plans,
                                      PlanAgain&& plan_again) {
  const auto uses_log_mass = [&] {
    return std::any_of(plans.begin(), plans.end(),
                       [](const CompressionPlan& plan) { return plan.log_mass != nullptr; });
  };
  u64 allowed = 0;
  for (const LayerBytes& layer : layers) allowed += layer.after(slots * layer.segments, false);
  const auto used = [&] {
    u64 bytes = 0;
    for (std::size_t l = 0; l < layers.size(); ++l) bytes += layers[l].after(plans[l]);
    return bytes;
  };
  const u64 plain = layers.front().row_bytes + 4;
  u32 next = static_cast<u32>(slots * plain / (plain + 4));
  while (uses_log_mass() && used() > allowed && slots > 0) {
    slots = std::min(next, slots - 1);
    next = slots;
    KVLEAN_RETURN_IF_ERROR(plan_again(slots));
  }
  return StatusCode::ok;
}

}  // namespace kvlean::bench
