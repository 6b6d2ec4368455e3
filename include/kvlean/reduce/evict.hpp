// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/reduce/plan_slots.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Plain eviction: the best limit[s] tokens of each segment stay, unchanged, in position order.
/// With StreamingLLM, H2O, SnapKV, TOVA or any other scorer this is that paper's method. Costs 4
/// bytes of plan a slot; O(tokens).
struct EvictReducer {
  /// Share of each head's slots given to the newest tokens whatever their score: H2O splits its
  /// budget into heavy hitters and a recent window, half and half in the paper. In [0, 1].
  float recent_share = 0.0f;

  [[nodiscard]] Status reduce(const CacheView& cache, const Scores& scores, const u32* limit,
                              Context& context, CompressionPlan& plan) const noexcept {
    if (!(recent_share >= 0.0f && recent_share <= 1.0f)) return StatusCode::invalid_option;
    KeptTokens kept;
    KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores, limit, recent_share, context, kept));
    return plan_kept(cache, kept, context, plan);
  }
};
static_assert(Reducer<EvictReducer>);

KVLEAN_NAMESPACE_END
