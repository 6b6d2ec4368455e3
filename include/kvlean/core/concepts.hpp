// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <span>

#include "kvlean/core/budget.hpp"
#include "kvlean/core/plan.hpp"
#include "kvlean/core/scores.hpp"
#include "kvlean/core/workspace.hpp"
#include "kvlean/observe/observation.hpp"

KVLEAN_NAMESPACE_BEGIN

/// What every stage may use: scratch, the caller's threads, protection, the random counters, and
/// its place in the model.
struct Context {
  Workspace& workspace;
  const PlanOptions& options;
  u32 layer = 0;
  u32 num_layers = 1;
};

/// Limits of one layer's segments: at most limit[s] slots, chosen by an allocator.
struct LayerLimits {
  const Scores* scores = nullptr;
  const CacheView* cache = nullptr;
  u32* limit = nullptr;        ///< [segments], in: nominal slots of each segment; out: its limit
  const u32* floor = nullptr;  ///< [segments] slots that must be granted (protected and frozen)
};

/// Fills scores.rank, and scores.mass with has_mass where the score is attention received.
template <class S>
concept Scorer = requires(const S& scorer, const CacheView& cache, const Observation& seen,
                          Context& context, Scores& scores) {
  { scorer.score(cache, seen, context, scores) }
  noexcept->std::same_as<Status>;
};

/// Distributes the slots of a group of segments: reads the nominal limits, writes the final ones.
/// The sum never grows, but where a mode says so (the authors' roundings; a layer schedule planned
/// one layer at a time gives that layer's share). No limit falls below its floor or exceeds its
/// length.
template <class A>
concept Allocator = requires(const A& allocator, std::span<LayerLimits> layers, Context& context) {
  { allocator.allocate(layers, context) }
  noexcept->std::same_as<Status>;
};

/// Writes one layer's plan into the workspace: at most limit[s] slots for segment s.
template <class R>
concept Reducer = requires(const R& reducer, const CacheView& cache, const Scores& scores,
                           const u32* limit, Context& context, CompressionPlan& plan) {
  { reducer.reduce(cache, scores, limit, context, plan) }
  noexcept->std::same_as<Status>;
};

KVLEAN_NAMESPACE_END
