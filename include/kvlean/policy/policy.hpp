// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/apply.hpp"
#include "kvlean/policy/pipeline.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Gives a cache the lengths that in-place work left in its view. An array of lengths is the
/// cache's own and up to date already.
inline void adopt_compressed(CacheView& cache, const CacheView& view) noexcept { cache = view; }
inline void adopt_compressed(RaggedKVCache&, const CacheView&) noexcept {}
template <Tensor K, Tensor V>
void adopt_compressed(KVCache<K, V>& cache, const CacheView& view) noexcept {
  adopt_length(cache, view);
}

}  // namespace detail

/// What every policy can do, given `PolicyStages stages() const noexcept` in the derived class.
/// All calls are const: a policy is a value, state lives in the caches and arrays it is given.
template <class Derived>
class PolicyInterface {
 public:
  /// Plans one layer. `plan` points into `workspace` afterwards. See plan_layers for the errors.
  template <Cache C>
  [[nodiscard]] Status plan(const C& cache, const Observation& seen, const Budget& budget,
                            Workspace& workspace, CompressionPlan& plan,
                            const PlanOptions& options = {}) const noexcept {
    const CacheView view = view_of(cache);
    return plan_layers(self().stages(), std::span<const CacheView>(&view, 1),
                       std::span<const Observation>(&seen, 1), budget, workspace,
                       std::span<CompressionPlan>(&plan, 1), options);
  }

  /// Plans several layers of one sequence together: layer schedules and allocators over all layers
  /// see the whole. One observation and one plan a layer.
  [[nodiscard]] Status plan(std::span<const CacheView> layers, std::span<const Observation> seen,
                            const Budget& budget, Workspace& workspace,
                            std::span<CompressionPlan> plans,
                            const PlanOptions& options = {}) const noexcept {
    return plan_layers(self().stages(), layers, seen, budget, workspace, plans, options);
  }

  /// Plans one layer of a batch: every sequence by itself, with the same budget and options.
  [[nodiscard]] Status plan_batch(std::span<const CacheView> sequences,
                                  std::span<const Observation> seen, const Budget& budget,
                                  Workspace& workspace, std::span<CompressionPlan> plans,
                                  const PlanOptions& options = {}) const noexcept {
    if (sequences.size() != seen.size() || sequences.size() != plans.size()) {
      return StatusCode::shape_mismatch;
    }
    const Workspace::Mark mark = workspace.mark();
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const Status status = plan(sequences[i], seen[i], budget, workspace, plans[i], options);
      if (!status) {
        workspace.rewind(mark);
        return status;
      }
    }
    return StatusCode::ok;
  }

  /// Plan and apply in one call, in place. The workspace is left as it was found. Where the reducer
  /// is a FusedReducer that can, both happen in one pass, with the same bits.
  template <class C>
  [[nodiscard]] Status compress(C& cache, const Observation& seen, const Budget& budget,
                                Workspace& workspace,
                                const PlanOptions& options = {}) const noexcept {
    WorkspaceScope scope(workspace);
    CompressionPlan made;
    if constexpr (requires(CacheView & view) { detail::adopt_compressed(cache, view); }) {
      CacheView view = view_of(cache);
      bool done = false;
      KVLEAN_RETURN_IF_ERROR(
          plan_or_compress(self().stages(), view, seen, budget, workspace, made, options, done));
      if (done) {
        detail::adopt_compressed(cache, view);
        return StatusCode::ok;
      }
    } else {
      KVLEAN_RETURN_IF_ERROR(plan(cache, seen, budget, workspace, made, options));
    }
    return apply(made, cache, in_place, options.executor);
  }

  /// Plan and apply in one call, into a ragged cache.
  template <Cache C>
  [[nodiscard]] Status compress(const C& cache, RaggedKVCache& destination, const Observation& seen,
                                const Budget& budget, Workspace& workspace,
                                const PlanOptions& options = {}) const noexcept {
    WorkspaceScope scope(workspace);
    CompressionPlan made;
    KVLEAN_RETURN_IF_ERROR(plan(cache, seen, budget, workspace, made, options));
    return apply(made, cache, destination, options.executor);
  }

 private:
  [[nodiscard]] const Derived& self() const noexcept { return static_cast<const Derived&>(*this); }
};

/// A scorer, an allocator and a reducer, made by compose().
template <Scorer S, Allocator A, Reducer R>
class Policy : public PolicyInterface<Policy<S, A, R>> {
 public:
  constexpr Policy(S scorer_stage, A allocator_stage, R reducer_stage) noexcept
      : scorer(scorer_stage), allocator(allocator_stage), reducer(reducer_stage) {}
  [[nodiscard]] PolicyStages stages() const noexcept {
    return stages_of(scorer, allocator, reducer);
  }

  S scorer;
  A allocator;
  R reducer;
};

/// Composes any scorer, allocator and reducer: `compose(SnapKVScorer{}, AdaKVAllocator{}, ...)`.
template <Scorer S, Allocator A, Reducer R>
[[nodiscard]] constexpr Policy<S, A, R> compose(S scorer, A allocator, R reducer) noexcept {
  return Policy<S, A, R>(scorer, allocator, reducer);
}

KVLEAN_NAMESPACE_END
