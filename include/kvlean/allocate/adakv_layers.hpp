// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/competition.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Ada-KV's competition over the heads of all layers given, with the hard floor: each segment's
/// best int(nominal * safeguard) slots are safe (at least its floor), then one global cut by the
/// total order: score descending, layer, KV head, token ascending, NaN last. The total over all
/// layers is exact: all nominals, as far as there are tokens, whoever keeps them. Scores must be
/// comparable across layers (attention mass is). Ada-KV's theory is per layer (arXiv 2407.11550);
/// the layer-wide form is LayerDefensiveKV's (arXiv 2510.13334). Needs all layers at once;
/// LayerLedger gives the same limits with layers arriving one by one.
///
/// Errors: budget_below_protected when all nominals sum to less than all floors; invalid_option for
/// a safeguard outside [0, 1] or a bad weight; null_pointer, shape_mismatch; workspace_too_small,
/// out_of_memory. On an error the limits are unchanged. O(tokens); scratch 5 KiB, half a byte a
/// token and 92 bytes a segment.
struct AdaKVLayersAllocator {
  float safeguard = 0.2f;
  const float* head_weight = nullptr;  ///< see HeadWeights; null: all 1
  u32 head_weight_stride = 0;          ///< of one layer to the next; 0: one row for all layers

  static constexpr bool shares_slots = true;
  [[nodiscard]] bool everything_fits(std::span<const LayerLimits> layers,
                                     const Context& /*context*/) const noexcept {
    return detail::allocation::all_fit(layers);
  }

  Status allocate(std::span<LayerLimits> layers, Context& context) const noexcept {
    namespace allocation = detail::allocation;
    if (!(safeguard >= 0.0f && safeguard <= 1.0f)) return StatusCode::invalid_option;
    Workspace& workspace = context.workspace;
    WorkspaceScope scope(workspace);
    allocation::Group group;
    allocation::Entrant* entrants = nullptr;
    KVLEAN_RETURN_IF_ERROR(allocation::enter_layers(
        layers, context, HeadWeights{head_weight, head_weight_stride}, group, entrants));
    KVLEAN_RETURN_IF_ERROR(allocation::raise_to_floors(group, group.shared_total(), workspace));
    KVLEAN_RETURN_IF_ERROR(allocation::hard_floor(group, entrants, safeguard, workspace));
    allocation::scatter(group, layers);
    return StatusCode::ok;
  }
};

static_assert(Allocator<AdaKVLayersAllocator>);

KVLEAN_NAMESPACE_END
