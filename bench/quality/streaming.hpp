// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bench/quality/prepared.hpp"
#include "kvlean/core/budget.hpp"
#include "kvlean/core/ragged_kv_cache.hpp"

namespace kvlean::bench {

/// Where the time of a streamed context went.
struct StreamTimes {
  double seconds_plan = 0.0;   ///< observing (the attention of every new query) and planning
  double seconds_apply = 0.0;  ///< merging in place and moving the mass along
};

/// CaM as its authors run it: the context arrives token by token in a cache of `slots` slots a
/// head. Every token's captured query attends to the cache of that moment, which is what the
/// attention mass of its slots sums up; once the cache is full, each new token drops the oldest one
/// that is not a sink, and its value is merged into the next kept ones. Merges cascade, because
/// values are rewritten in place. `cache` is allocated here and holds the result.
[[nodiscard]] Status stream_cam(const PreparedLayer& layer, u32 slots, const PlanOptions& options,
                                Workspace& workspace, RaggedKVCache& cache, StreamTimes& times);

}  // namespace kvlean::bench
