// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>

#include "kvlean/allocate/shares.hpp"
#include "kvlean/core/concepts.hpp"
#include "kvlean/reduce/fused_reducer.hpp"
#include "kvlean/score/observed_mass.hpp"

KVLEAN_NAMESPACE_BEGIN

/// A policy's three stages behind plain function pointers, so that the steps between them exist
/// once and not per combination. Points at the caller's structs.
struct PolicyStages {
  const void* scorer = nullptr;
  const void* allocator = nullptr;
  const void* reducer = nullptr;
  Status (*score)(const void* self, const CacheView& cache, const Observation& seen,
                  Context& context, Scores& scores) noexcept = nullptr;
  Status (*allocate)(const void* self, std::span<LayerLimits> layers,
                     Context& context) noexcept = nullptr;
  /// Whether the allocator would let every segment keep all of its tokens, told by nominals and
  /// lengths alone; null: when each nominal covers its segment.
  bool (*everything_fits)(const void* self, std::span<const LayerLimits> layers,
                          const Context& context) noexcept = nullptr;
  Status (*reduce)(const void* self, const CacheView& cache, const Scores& scores, const u32* limit,
                   Context& context, CompressionPlan& plan) noexcept = nullptr;
  /// A FusedReducer's reduce_in_place; null: the reducer has none.
  Status (*reduce_in_place)(const void* self, CacheView& cache, const Scores& scores,
                            const u32* limit, Context& context, bool& done) noexcept = nullptr;
  bool wants_mass = false;                ///< the reducer reads attention mass: accumulated, if the
                                          ///< scorer has none
  bool prefers_accumulated_mass = false;  ///< accumulated even if the scorer has mass of its own
  bool identity_at_full_budget = true;    ///< nothing to do when every token fits
  bool keeps_everything = false;          ///< the full cache, whatever the budget
};

/// Looks up a reducer's optional traits: `static constexpr bool wants_mass`,
/// `static constexpr bool prefers_accumulated_mass` and `bool identity_at_full_budget() const`.
template <Reducer R>
void read_reducer_traits(const R& reducer, PolicyStages& stages) noexcept {
  if constexpr (requires { R::wants_mass; }) stages.wants_mass = R::wants_mass;
  if constexpr (requires { R::prefers_accumulated_mass; }) {
    stages.prefers_accumulated_mass = R::prefers_accumulated_mass;
  }
  if constexpr (requires { reducer.identity_at_full_budget(); }) {
    stages.identity_at_full_budget = reducer.identity_at_full_budget();
  }
}

/// Whether an allocator lets every segment keep all of its tokens. Asks its optional
/// `bool everything_fits(std::span<const LayerLimits>, const Context&) const noexcept`, which reads
/// no scores: for those that share slots among segments. Without it each nominal must cover its
/// segment.
template <Allocator A>
[[nodiscard]] bool everything_fits(const A& allocator, std::span<const LayerLimits> layers,
                                   const Context& context) noexcept {
  if constexpr (requires { allocator.everything_fits(layers, context); }) {
    return allocator.everything_fits(layers, context);
  } else {
    return detail::allocation::each_fits(layers);
  }
}

/// Points at three stage structs, which must outlive the result.
template <Scorer S, Allocator A, Reducer R>
[[nodiscard]] PolicyStages stages_of(const S& scorer, const A& allocator,
                                     const R& reducer) noexcept {
  PolicyStages stages;
  stages.scorer = &scorer;
  stages.allocator = &allocator;
  stages.reducer = &reducer;
  stages.score = [](const void* self, const CacheView& cache, const Observation& seen,
                    Context& context, Scores& scores) noexcept {
    return static_cast<const S*>(self)->score(cache, seen, context, scores);
  };
  stages.allocate = [](const void* self, std::span<LayerLimits> layers, Context& context) noexcept {
    return static_cast<const A*>(self)->allocate(layers, context);
  };
  stages.everything_fits = [](const void* self, std::span<const LayerLimits> layers,
                              const Context& context) noexcept {
    return everything_fits(*static_cast<const A*>(self), layers, context);
  };
  stages.reduce = [](const void* self, const CacheView& cache, const Scores& scores,
                     const u32* limit, Context& context, CompressionPlan& plan) noexcept {
    return static_cast<const R*>(self)->reduce(cache, scores, limit, context, plan);
  };
  if constexpr (FusedReducer<R>) {
    stages.reduce_in_place = [](const void* self, CacheView& cache, const Scores& scores,
                                const u32* limit, Context& context, bool& done) noexcept {
      return static_cast<const R*>(self)->reduce_in_place(cache, scores, limit, context, done);
    };
  }
  read_reducer_traits(reducer, stages);
  return stages;
}

namespace detail {

struct LayerWork {
  Scores scores;
  u32* limit = nullptr;
  u32* floor = nullptr;
};

// Nominal slots and floors of one layer. `alike` becomes false when its heads can't keep everything
// and share counts or tokens.
inline Status start_layer(const CacheView& cache, const Budget& budget, const PlanOptions& options,
                          Workspace& workspace, LayerWork& work, bool& alike) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  if (options.sharing.kind == SharingKind::whole_pages && options.sharing.page_tokens == 0) {
    return StatusCode::invalid_option;
  }
  work.limit = workspace.take<u32>(cache.segments);
  work.floor = workspace.take<u32>(cache.segments);
  if (work.limit == nullptr || work.floor == nullptr) return workspace.exhausted();
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    work.limit[s] = budget.nominal_for(length);
    work.floor[s] = std::min(length, std::max(1u, options.protection.count(length, cache.frozen)));
    alike = alike && (options.sharing.kind == SharingKind::per_head || length == cache.length(0));
  }
  return StatusCode::ok;
}

inline Status score_layer(const PolicyStages& stages, const CacheView& cache,
                          const Observation& seen, Context& context, Scores& scores) noexcept {
  Workspace& workspace = context.workspace;
  u32* lengths = workspace.take<u32>(cache.segments);
  u64* first = workspace.take<u64>(cache.segments + std::size_t{1});
  if (lengths == nullptr || first == nullptr) return workspace.exhausted();
  first[0] = 0;
  for (u32 s = 0; s < cache.segments; ++s) {
    lengths[s] = cache.length(s);
    first[s + 1] = first[s] + lengths[s];
  }
  scores.segments = cache.segments;
  scores.lengths = lengths;
  scores.rank = Ragged<float>(workspace.take_zeroed<float>(first[cache.segments]), first);
  scores.mass = Ragged<float>(workspace.take_zeroed<float>(first[cache.segments]), first);
  scores.observers = Ragged<u32>(workspace.take<u32>(first[cache.segments]), first);
  if (!scores.rank || !scores.mass || !scores.observers) return workspace.exhausted();
  KVLEAN_RETURN_IF_ERROR(stages.score(stages.scorer, cache, seen, context, scores));
  const bool enough =
      scores.has_mass && (scores.mass_is_accumulated || !stages.prefers_accumulated_mass);
  if (!stages.wants_mass || enough) return StatusCode::ok;
  if (seen.mass || seen.reference) {
    return observe_mass_into(cache, seen, GroupReduction::mean, context, scores);
  }
  return StatusCode::ok;
}

// No limit exceeds its segment, whatever the allocator. Whether all limits allow all tokens.
inline bool clamp_limits(std::span<LayerLimits> layers) noexcept {
  bool everything = true;
  for (const LayerLimits& layer : layers) {
    for (u32 s = 0; s < layer.cache->segments; ++s) {
      const u32 length = layer.cache->length(s);
      everything = everything && layer.limit[s] >= length;
      layer.limit[s] = std::min(layer.limit[s], length);
    }
  }
  return everything;
}

// Sharing forms other than per_head give every head of a layer the same limit.
inline Status equalise_limits(const CacheView& cache, const LayerWork& work) noexcept {
  u64 total = 0;
  u32 least = std::numeric_limits<u32>::max();
  u32 floor = 0;
  for (u32 s = 0; s < cache.segments; ++s) {
    total += work.limit[s];
    least = std::min(least, cache.length(s));
    floor = std::max(floor, work.floor[s]);
  }
  const u32 each = std::min(static_cast<u32>(total / cache.segments), least);
  if (each < floor) return StatusCode::budget_below_protected;
  std::fill_n(work.limit, cache.segments, each);
  return StatusCode::ok;
}

inline Status identity_plan(const CacheView& cache, const Sharing& sharing, Workspace& workspace,
                            CompressionPlan& plan) noexcept {
  plan = CompressionPlan{};
  plan.segments = cache.segments;
  if (sharing.kind == SharingKind::whole_pages) plan.page_tokens = sharing.page_tokens;
  plan.length = workspace.take<u32>(cache.segments);
  plan.first = workspace.take<u64>(cache.segments + std::size_t{1});
  plan.anchor = workspace.take<u32>(cache.total_length());
  if (plan.length == nullptr || plan.first == nullptr || plan.anchor == nullptr) {
    return workspace.exhausted();
  }
  plan.first[0] = 0;
  for (u32 s = 0; s < cache.segments; ++s) {
    plan.length[s] = cache.length(s);
    plan.first[s + 1] = plan.first[s] + plan.length[s];
    for (u32 token = 0; token < plan.length[s]; ++token) plan.anchor[plan.first[s] + token] = token;
    if (plan.length[s] != plan.length[0]) plan.needs |= needs_ragged_lengths;
  }
  return StatusCode::ok;
}

}  // namespace detail

namespace detail {

// Calls reduce(l, scores, limits, context) for each layer once it is scored and its limits are
// known, unless every token stays.
template <class Reduce>
[[nodiscard]] Status plan_layers_from(const PolicyStages& stages, std::span<const CacheView> layers,
                                      std::span<const Observation> seen, const Budget& budget,
                                      Workspace& workspace, std::span<CompressionPlan> plans,
                                      const PlanOptions& options, Reduce&& reduce) noexcept {
  if (layers.size() != seen.size() || layers.size() != plans.size()) {
    return StatusCode::shape_mismatch;
  }
  if (layers.empty()) return StatusCode::invalid_shape;
  KVLEAN_RETURN_IF_ERROR(budget.check());
  const u32 count = static_cast<u32>(layers.size());
  const u32 num_layers = std::max(options.num_layers, options.layer + count);
  LayerWork* work = workspace.take<LayerWork>(count);
  LayerLimits* limits = workspace.take<LayerLimits>(count);
  if (work == nullptr || limits == nullptr) return workspace.exhausted();
  const auto keep_everything = [&]() noexcept -> Status {
    for (u32 l = 0; l < count; ++l) {
      KVLEAN_RETURN_IF_ERROR(identity_plan(layers[l], options.sharing, workspace, plans[l]));
    }
    return StatusCode::ok;
  };
  bool alike = true;
  for (u32 l = 0; l < count; ++l) {
    work[l] = LayerWork{};
    KVLEAN_RETURN_IF_ERROR(start_layer(layers[l], budget, options, workspace, work[l], alike));
    limits[l] = LayerLimits{&work[l].scores, &layers[l], work[l].limit, work[l].floor};
  }
  const std::span<LayerLimits> all(limits, count);
  Context context{workspace, options, options.layer, num_layers};
  const bool may_be_identity = alike && stages.identity_at_full_budget;
  const bool everything_fits = stages.everything_fits != nullptr
                                   ? stages.everything_fits(stages.allocator, all, context)
                                   : allocation::each_fits(all);
  if (stages.keeps_everything || (everything_fits && may_be_identity)) return keep_everything();
  for (u32 l = 0; l < count; ++l) {
    context.layer = options.layer + l;
    KVLEAN_RETURN_IF_ERROR(score_layer(stages, layers[l], seen[l], context, work[l].scores));
  }
  context.layer = options.layer;
  KVLEAN_RETURN_IF_ERROR(stages.allocate(stages.allocator, all, context));
  if (clamp_limits(all) && may_be_identity) return keep_everything();
  for (u32 l = 0; l < count; ++l) {
    if (options.sharing.kind != SharingKind::per_head) {
      KVLEAN_RETURN_IF_ERROR(equalise_limits(layers[l], work[l]));
    }
    context.layer = options.layer + l;
    KVLEAN_RETURN_IF_ERROR(reduce(l, work[l].scores, work[l].limit, context));
  }
  return StatusCode::ok;
}

}  // namespace detail

/// Runs a policy over the layers of one sequence: scores each, divides the budget over all, and
/// writes a plan per layer into the workspace. `layers`, `seen` and `plans` have one entry a layer.
/// When every token fits, the plans are the identity and nothing is scored. On an error no plan is
/// valid, no cache was touched and the workspace is as it was. Errors: those of the stages,
/// shape_mismatch for spans of different sizes, invalid_budget, budget_below_protected,
/// workspace_too_small.
[[nodiscard]] inline Status plan_layers(const PolicyStages& stages,
                                        std::span<const CacheView> layers,
                                        std::span<const Observation> seen, const Budget& budget,
                                        Workspace& workspace, std::span<CompressionPlan> plans,
                                        const PlanOptions& options) noexcept {
  const Workspace::Mark mark = workspace.mark();
  const Status status = detail::plan_layers_from(
      stages, layers, seen, budget, workspace, plans, options,
      [&](u32 l, const Scores& scores, const u32* limit, Context& context) noexcept {
        return stages.reduce(stages.reducer, layers[l], scores, limit, context, plans[l]);
      });
  if (!status) workspace.rewind(mark);
  return status;
}

/// Plans one layer for in-place work, or compresses it at once where the reducer is a FusedReducer
/// that can: then `done` is true, `cache` is compressed and there is no plan. Errors: those of
/// plan_layers, and those that apply() would give; the cache is then as it was.
[[nodiscard]] inline Status plan_or_compress(const PolicyStages& stages, CacheView& cache,
                                             const Observation& seen, const Budget& budget,
                                             Workspace& workspace, CompressionPlan& plan,
                                             const PlanOptions& options, bool& done) noexcept {
  done = false;
  const Workspace::Mark mark = workspace.mark();
  const Status status = detail::plan_layers_from(
      stages, std::span<const CacheView>(&cache, 1), std::span<const Observation>(&seen, 1), budget,
      workspace, std::span<CompressionPlan>(&plan, 1), options,
      [&](u32, const Scores& scores, const u32* limit, Context& context) noexcept -> Status {
        if (stages.reduce_in_place != nullptr) {
          const WorkspaceScope scope(workspace);
          KVLEAN_RETURN_IF_ERROR(
              stages.reduce_in_place(stages.reducer, cache, scores, limit, context, done));
        }
        if (done) return StatusCode::ok;
        return stages.reduce(stages.reducer, cache, scores, limit, context, plan);
      });
  if (!status) workspace.rewind(mark);
  return status;
}

KVLEAN_NAMESPACE_END
