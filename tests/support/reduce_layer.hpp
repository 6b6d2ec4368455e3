// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "kvlean/core/concepts.hpp"

// Runs a reducer by itself, with scores given by hand.

namespace kvlean {

/// A plan and the workspace it lives in.
struct Planned {
  Workspace workspace;
  CompressionPlan plan;
  Status status;
};

/// `rank` has the segments' scores one after another; it serves as mass too when has_mass.
template <Reducer R>
void make_plan(const R& reducer, const CacheView& cache, std::vector<float>& rank, bool has_mass,
               std::vector<u32> limit, Planned& out, PlanOptions options = {}) {
  std::vector<u32> lengths;
  std::vector<u64> first{0};
  for (u32 s = 0; s < cache.segments; ++s) {
    lengths.push_back(cache.length(s));
    first.push_back(first.back() + cache.length(s));
  }
  Scores scores;
  scores.segments = cache.segments;
  scores.lengths = lengths.data();
  scores.rank = Ragged<float>(rank.data(), first.data());
  scores.mass = scores.rank;
  scores.has_mass = has_mass;
  Context context{out.workspace, options};
  out.status = reducer.reduce(cache, scores, limit.data(), context, out.plan);
}

/// No sinks; the last `recent` tokens protected.
inline PlanOptions unprotected(u32 recent = 0) {
  PlanOptions options;
  options.protection = {.sinks = 0, .recent = recent};
  return options;
}

inline std::vector<u32> anchors(const CompressionPlan& plan, u32 s = 0) {
  return {plan.anchor + plan.first[s], plan.anchor + plan.first[s] + plan.length[s]};
}

}  // namespace kvlean
