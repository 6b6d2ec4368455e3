// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/allocate/shares.hpp"
#include "kvlean/core/order.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Per-head constants that multiply a head's scores when heads compete, e.g. the bound's constants
/// C_i = max_j ||V_j W_O||_1 that Ada-KV drops, or LAVa's max_j ||V_j||_1. Finite and >= 0; meant
/// for scores >= 0, a larger weight lowers negative ones. Selection within a head is not affected.
struct HeadWeights {
  const float* data = nullptr;  ///< null: all 1
  u32 layer_stride = 0;         ///< layer l of the model starts at l * stride; 0: one row for all

  [[nodiscard]] float of(u32 layer, u32 segment) const noexcept {
    if (data == nullptr) return 1.0f;
    return data[static_cast<u64>(layer) * layer_stride + segment];
  }
};

namespace detail::allocation {

/// The best so-and-so many of a set of score keys: all above `key`, and `ties` of those equal to
/// it. By default none (no score has this key).
struct KeyCut {
  u32 key = 0xffffffffu;
  u64 ties = 0;
};

inline constexpr u32 histogram_bins = 2048;

/// The cut of the `wanted` best keys. `for_each(add)` must call add(key, count) for all keys; a
/// count may be minus something as long as the sum of a key's counts is not. `wanted` is at most
/// the sum of all counts. A radix selection, three passes of 11, 11 and 10 bits: no copy of the
/// keys, O(keys) whatever the data, and ranks that hold parts of the keys need only add their
/// histograms.
template <class ForEach>
[[nodiscard]] KeyCut find_cut(u64 wanted, u64* histogram, ForEach&& for_each) noexcept {
  if (wanted == 0) return {};
  constexpr u32 shifts[] = {21, 10, 0};
  u32 prefix = 0;
  u32 known = 0;  // the bits of `prefix` that are decided
  for (const u32 shift : shifts) {
    const u32 digits = ~known >> shift;  // what this pass decides, shifted down
    std::fill_n(histogram, histogram_bins, u64{0});
    for_each([=](u32 key, u64 count) noexcept {
      if ((key & known) == prefix) histogram[(key >> shift) & digits] += count;
    });
    u32 digit = digits;
    while (digit > 0 && histogram[digit] < wanted) wanted -= histogram[digit--];
    prefix |= digit << shift;
    known |= digits << shift;
  }
  return {prefix, wanted};
}

/// One segment in a competition: its unprotected tokens, which are one run.
struct Entrant {
  const float* scores = nullptr;  ///< [count] the candidates
  u32 count = 0;
  u32 safe = 0;         ///< this many of the best do not compete: they are granted beforehand
  float weight = 1.0f;  ///< multiplies the scores
  KeyCut safe_cut;      ///< the safe ones, once find_safe() was called

  [[nodiscard]] u32 key(u32 candidate) const noexcept {
    return score_key(scores[candidate] * weight);
  }
  void find_safe(u64* histogram) noexcept { safe_cut = cut_of(safe, histogram); }
  /// The cut of this segment's `wanted` best candidates, safe ones included.
  [[nodiscard]] KeyCut cut_of(u32 wanted, u64* histogram) const noexcept {
    return find_cut(wanted, histogram, [this](auto&& add) noexcept {
      for (u32 i = 0; i < count; ++i) add(key(i), u64{1});
    });
  }
  /// add(key, count) for every candidate; the counts of those that do not compete add up to zero.
  template <class Add>
  void for_each_competing(Add&& add) const noexcept {
    for (u32 i = 0; i < count; ++i) {
      const u32 k = key(i);
      add(k, static_cast<u64>(k <= safe_cut.key));  // a branch would be mispredicted half the time
    }
    if (safe_cut.ties != 0) add(safe_cut.key, u64{0} - safe_cut.ties);
  }
};

/// Fills entrants[s] for a layer's segments. Errors: null_pointer without scores; shape_mismatch
/// when scores and cache disagree; invalid_option for a weight that is negative, infinite or NaN.
[[nodiscard]] inline Status enter(const Scores* scores, const CacheView& cache,
                                  const Protection& protection, const HeadWeights& weights,
                                  u32 layer, Entrant* entrants) noexcept {
  if (scores == nullptr || scores->lengths == nullptr) return StatusCode::null_pointer;
  if (scores->segments != cache.segments) return StatusCode::shape_mismatch;
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    if (scores->length(s) != length) return StatusCode::shape_mismatch;
    if (length != 0 && !scores->rank) return StatusCode::null_pointer;
    const u32 covered = protection.count(length, cache.frozen);
    const u32 front = std::max(protection.sinks, cache.frozen);
    Entrant& entrant = entrants[s];
    entrant = {};
    entrant.count = length - covered;
    if (entrant.count != 0) entrant.scores = scores->rank.segment(s) + front;
    entrant.weight = weights.of(layer, s);
    if (!(entrant.weight >= 0.0f) || !std::isfinite(entrant.weight)) {
      return StatusCode::invalid_option;
    }
  }
  return StatusCode::ok;
}

/// Flattens the layers into one group and enters every segment's scores, [group.count] entrants
/// taken from the workspace. Errors: those of gather() and enter(), workspace_too_small,
/// out_of_memory.
[[nodiscard]] inline Status enter_layers(std::span<const LayerLimits> layers, Context& context,
                                         const HeadWeights& weights, Group& group,
                                         Entrant*& entrants) noexcept {
  KVLEAN_RETURN_IF_ERROR(gather(layers, context, group));
  entrants = context.workspace.take<Entrant>(group.count);
  if (entrants == nullptr) return context.workspace.exhausted();
  u32 first = 0;
  u32 place = context.layer;
  for (const LayerLimits& layer : layers) {
    KVLEAN_RETURN_IF_ERROR(enter(layer.scores, *layer.cache, context.options.protection, weights,
                                 place++, entrants + first));
    first += layer.cache->segments;
  }
  return StatusCode::ok;
}

/// The global top-`slots` over all entrants' competing candidates: won[s] of them are segment s's.
/// Order: score descending, then entrant, NaN last; which tokens of a segment win is decided by the
/// same order when tokens are selected, so counts need no token index. `slots` is at most the
/// number of competing candidates. O(candidates); scratch 16 KiB, whatever the length. Errors:
/// workspace_too_small, out_of_memory.
[[nodiscard]] inline Status compete(std::span<Entrant> entrants, u64 slots, u32* won,
                                    Workspace& workspace) noexcept {
  WorkspaceScope scope(workspace);
  u64* histogram = workspace.take<u64>(histogram_bins);
  if (histogram == nullptr) return workspace.exhausted();
  for (Entrant& entrant : entrants) entrant.find_safe(histogram);
  const KeyCut cut = find_cut(slots, histogram, [entrants](auto&& add) noexcept {
    for (const Entrant& entrant : entrants) entrant.for_each_competing(add);
  });
  u64 ties_left = cut.ties;
  for (std::size_t s = 0; s < entrants.size(); ++s) {
    u64 above = 0;
    u64 equal = 0;
    entrants[s].for_each_competing([&](u32 key, u64 count) noexcept {
      above += static_cast<u64>(key > cut.key) * count;
      equal += static_cast<u64>(key == cut.key) * count;
    });
    const u64 ties = std::min(equal, ties_left);
    ties_left -= ties;
    won[s] = static_cast<u32>(above + ties);
  }
  return StatusCode::ok;
}

/// The hard floor (kvpress, DefensiveKV): every segment's best `max(low, int(nominal * safeguard))`
/// slots are safe, at most its length, protected tokens first; one global cut over the rest. The
/// total is exact and the retained score the largest possible under those floors. `group` has been
/// raised to its floors; a segment that paid for others' floors counts with what is left to it.
[[nodiscard]] inline Status hard_floor(const Group& group, Entrant* entrants, float safeguard,
                                       Workspace& workspace) noexcept {
  WorkspaceScope scope(workspace);
  u32* won = workspace.take<u32>(group.count);
  if (won == nullptr) return workspace.exhausted();
  u64 slots = group.total();
  for (u32 i = 0; i < group.count; ++i) {
    const bool paid = group.value[i] < std::min(group.nominal[i], group.high[i]);
    const u32 share = scaled_slots(paid ? group.value[i] : group.nominal[i], safeguard);
    const u32 granted = std::max(group.low[i], std::min(share, group.value[i]));
    entrants[i].safe = granted - (group.high[i] - entrants[i].count);
    slots -= granted;
  }
  KVLEAN_RETURN_IF_ERROR(compete({entrants, group.count}, slots, won, workspace));
  for (u32 i = 0; i < group.count; ++i) {
    group.value[i] = group.high[i] - entrants[i].count + entrants[i].safe + won[i];
  }
  return StatusCode::ok;
}

}  // namespace detail::allocation

KVLEAN_NAMESPACE_END
