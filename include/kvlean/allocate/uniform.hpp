// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/allocate/shares.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Every segment gets its nominal slots, at most its length: the rule of SnapKV, H2O, StreamingLLM
/// and most others. What a segment shorter than its nominal leaves over is not handed on: no head
/// keeps more than the budget. In a ragged layer a short segment's nominal (of a fraction) may lie
/// below its floor; it is then lifted to the floor and the other segments of the same layer pay for
/// it in proportion to what they have above theirs (largest remainder, ties to the lower head), so
/// a layer's total is exact. Reads no scores.
///
/// Errors: budget_below_protected when a layer's nominals sum to less than its floors;
/// null_pointer; workspace_too_small, out_of_memory. On an error the limits are unchanged.
/// O(segments).
struct UniformAllocator {
  Status allocate(std::span<LayerLimits> layers, Context& context) const noexcept {
    WorkspaceScope scope(context.workspace);
    detail::allocation::Group group;
    KVLEAN_RETURN_IF_ERROR(detail::allocation::gather(layers, context, group));
    u32 first = 0;
    for (const LayerLimits& layer : layers) {
      const u32 segments = layer.cache->segments;
      const detail::allocation::Group heads = group.slice(first, segments);
      KVLEAN_RETURN_IF_ERROR(
          detail::allocation::raise_to_floors(heads, heads.total(), context.workspace));
      first += segments;
    }
    detail::allocation::scatter(group, layers);
    return StatusCode::ok;
  }
};

static_assert(Allocator<UniformAllocator>);

KVLEAN_NAMESPACE_END
