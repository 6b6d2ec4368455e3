// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "kvlean/core/concepts.hpp"
#include "tests/golden/golden_case.hpp"

namespace kvlean::golden {

/// Throws CaseFailed when the library refuses.
inline void check(Status status, const std::string& what) {
  if (!status) throw CaseFailed{what + ": " + status.message()};
}

/// The stages of a policy, one by one, over one layer. Policies protect sinks and recent tokens and
/// never empty a head; the published codes do neither, so floors are zero and the protection is the
/// case's own.
class Run {
 public:
  explicit Run(const CacheView& view, Protection protection = {0, 0})
      : view_(view),
        lengths_(view.segments),
        limits_(view.segments),
        floors_(view.segments, 0),
        rank_(std::size_t{view.segments} * view.capacity),
        mass_(rank_.size()) {
    options_.protection = protection;
    for (u32 s = 0; s < view.segments; ++s) lengths_[s] = limits_[s] = view.length(s);
    scores_.segments = view.segments;
    scores_.lengths = lengths_.data();
    scores_.rank = Ragged<float>(rank_.data(), u64{view.capacity});
    scores_.mass = Ragged<float>(mass_.data(), u64{view.capacity});
  }

  template <Scorer S>
  void score(const S& scorer, const Observation& seen) {
    Context context{workspace_, options_};
    check(scorer.score(view_, seen, context, scores_), "scorer");
  }
  /// Every head starts from `nominal` slots.
  template <Allocator A>
  void allocate(const A& allocator, u32 nominal) {
    set_limits(nominal);
    LayerLimits layer{&scores_, &view_, limits_.data(), floors_.data()};
    Context context{workspace_, options_};
    check(allocator.allocate(std::span<LayerLimits>(&layer, 1), context), "allocator");
  }
  template <Reducer R>
  void reduce(const R& reducer) {
    Context context{workspace_, options_};
    check(reducer.reduce(view_, scores_, limits_.data(), context, plan), "reducer");
  }
  /// Carries out the plan into a cache of its own.
  [[nodiscard]] RaggedKVCache apply_plan() const {
    RaggedKVCache result;
    check(result.allocate(ragged_shape(plan, view_)), "allocate");
    check(apply(plan, view_, result), "apply");
    return result;
  }

  void set_limits(u32 each) {
    for (u32 s = 0; s < view_.segments; ++s) limits_[s] = std::min(each, view_.length(s));
  }
  [[nodiscard]] std::vector<u32>& limits() { return limits_; }
  [[nodiscard]] float& rank(u32 head, u32 token) { return scores_.rank(head, token); }
  [[nodiscard]] float& mass(u32 head, u32 token) { return scores_.mass(head, token); }
  [[nodiscard]] const std::vector<float>& ranks() const { return rank_; }
  [[nodiscard]] const CacheView& view() const { return view_; }
  [[nodiscard]] Workspace& workspace() { return workspace_; }
  /// [kv_heads][tokens] 1 where the plan keeps the token.
  [[nodiscard]] std::vector<u8> kept() const {
    std::vector<u8> result(rank_.size(), u8{0});
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u64 slot = plan.first[s]; slot < plan.first[s + 1]; ++slot) {
        result[std::size_t{s} * view_.capacity + plan.anchor[slot]] = 1;
      }
    }
    return result;
  }

  CompressionPlan plan;

 private:
  CacheView view_;
  PlanOptions options_;
  Workspace workspace_;
  Scores scores_;
  std::vector<u32> lengths_;
  std::vector<u32> limits_;
  std::vector<u32> floors_;
  std::vector<float> rank_;
  std::vector<float> mass_;
};

/// The whole prefill was seen; window scorers read its newest queries.
[[nodiscard]] inline Observation observe_layer(const Layer& layer) {
  Observation seen;
  seen.reference = layer.queries();
  return seen;
}

}  // namespace kvlean::golden
