// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kvlean/allocate/shares.hpp"
#include "kvlean/core/score_cut.hpp"

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

/// One segment in a competition: its unprotected tokens, which are one run. Its safe ones are
/// granted beforehand.
using Entrant = ScoreRun;

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
/// number of competing candidates. O(candidates); scratch 4 KiB, half a byte a candidate and 48
/// bytes an entrant. Errors: workspace_too_small, out_of_memory.
[[nodiscard]] inline Status compete(std::span<const Entrant> entrants, u64 slots, u32* won,
                                    Workspace& workspace) noexcept {
  WorkspaceScope scope(workspace);
  u64 candidates = 0;
  for (const Entrant& entrant : entrants) candidates += entrant.count;
  CutScratch scratch;
  KVLEAN_RETURN_IF_ERROR(scratch.take(entrants.size(), candidates, workspace));
  CutSearch search(entrants, slots, scratch);
  u64 ties_left = search.find().ties;
  for (std::size_t s = 0; s < entrants.size(); ++s) {
    const u64 above = search.above_cut(s);
    const u64 ties = std::min(search.reaching_cut(s) - above, ties_left);
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
    group.value[i] =
        group.high[i] - entrants[i].count + static_cast<u32>(entrants[i].safe) + won[i];
  }
  return StatusCode::ok;
}

}  // namespace detail::allocation

KVLEAN_NAMESPACE_END
