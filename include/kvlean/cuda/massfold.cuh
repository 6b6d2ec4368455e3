// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/merge_nearest.cuh"
#include "kvlean/cuda/merge_search.cuh"
#include "kvlean/reduce/massfold.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// Room for the plan of a MassFoldReducer with at most `max_slots` slots a segment.
[[nodiscard]] inline PlanShape plan_shape(const CacheView& cache, const MassFoldReducer& reducer,
                                          u32 max_slots) noexcept {
  PlanShape shape;
  shape.segments = cache.num_segments();
  shape.max_slots = max_slots;
  shape.max_terms = cache.max_tokens;
  shape.log_mass = reducer.log_mass;
  return shape;
}

namespace detail {

struct NearestScratch {
  NearestWork work;
  u8* keep = nullptr;
  void* zero = nullptr;
  std::size_t zero_bytes = 0;
};
[[nodiscard]] inline NearestScratch take_nearest_scratch(const CacheView& cache,
                                                         Workspace& workspace) noexcept {
  NearestScratch scratch;
  NearestWork& work = scratch.work;
  const u32 segments = cache.num_segments();
  work.cache = cache;
  work.stride = cache.max_tokens;
  work.tiles = ceil_div(larger(cache.max_tokens, 1u), cut_tile);
  const std::size_t all = segments * work.stride;
  scratch.keep = workspace.take<u8>(all);
  work.keep = scratch.keep;
  work.dropped = workspace.take<u32>(all);
  work.num_dropped = workspace.take<u32>(segments);
  work.inverse_norm = workspace.take<float>(all);
  work.nearest = workspace.take<u32>(all);
  work.cosine = workspace.take<float>(all);
  const std::size_t begin = workspace.mark();
  work.cursor = workspace.take<u32>(all);
  work.announced = workspace.take<u64>(std::size_t{segments} * work.tiles);
  work.has_extreme = workspace.take<u32>(segments);
  work.num_unsettled = workspace.take<u32>(segments);
  scratch.zero = work.cursor;
  scratch.zero_bytes = workspace.mark() - begin;
  return scratch;
}

/// Selects, and finds for each dropped token its slot.
[[nodiscard]] inline Status find_nearest(const Context& context, const MergeScores& scores,
                                         const u32* limit, const SelectOptions& options,
                                         NearestScratch& scratch, KernelChain& chain) noexcept {
  NearestWork& work = scratch.work;
  const CacheView& cache = work.cache;
  Selection selection;
  selection.plan = work.plan;
  selection.keep = scratch.keep;
  selection.token_stride = work.stride;
  KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores.rank, limit, options, context, selection));
  KVLEAN_RETURN_IF_ERROR(
      status_of(cudaMemsetAsync(scratch.zero, 0, scratch.zero_bytes, context.stream)));
  const u64 segments = cache.num_segments();
  const u32 tokens = larger(cache.max_tokens, 1u);
  KVLEAN_RETURN_IF_ERROR(chain.run(segments * work.tiles, cut_threads, number_dropped<>, work));
  return with_dtype(cache.key_dtype, [&](auto dtype) -> Status {
    constexpr DType D = decltype(dtype)::value;
    const u32 norm_blocks = ceil_div(tokens, 256 / norm_lanes<D>);
    KVLEAN_RETURN_IF_ERROR(
        chain.run(segments * norm_blocks, 256, invert_norms<D>, work, norm_blocks));
    const u32 blocks = ceil_div(tokens, search_rows);
    if constexpr (D != DType::f32) {
      if (has_tile_search(D, cache.key_width)) {
        KVLEAN_RETURN_IF_ERROR(run_tile_search<D>(chain, work));
        // Few are left as a rule: blocks enough to fill a device, which take turns.
        const u32 enough = ceil_div(2048u, larger(cache.num_segments(), 1u));
        const u32 few = smaller(blocks, enough);
        return chain.run(segments * few, search_threads, search_nearest<D>, work, few, true);
      }
    }
    return chain.run(segments * blocks, search_threads, search_nearest<D>, work, blocks, false);
  });
}
/// Sorts what was accepted into terms; term_weight gets the cosines.
[[nodiscard]] inline Status group_terms(const NearestWork& work, KernelChain& chain) noexcept {
  const u64 segments = work.cache.num_segments();
  const u32 tokens = larger(work.cache.max_tokens, 1u);
  const u32 blocks = ceil_div(tokens, 256u);
  const u32 slot_blocks = ceil_div(larger(smaller(work.plan.max_slots, tokens), 1u), 128u);
  KVLEAN_RETURN_IF_ERROR(chain.run(segments * work.tiles, cut_threads, range_terms<>, work));
  KVLEAN_RETURN_IF_ERROR(chain.run(segments * blocks, 256, place_terms<>, work, blocks));
  return chain.run(segments * slot_blocks, 128, sort_terms<>, work, slot_blocks);
}

/// What MassFold's weights need, by value.
struct FoldWork {
  CacheView cache;
  PlanView plan;
  DeviceRagged<const float> mass;
  DeviceRagged<const u32> observers;
  float max_ratio = 0.0f;
  bool log_mass = false;

  [[nodiscard]] KVLEAN_DEVICE float mass_of(u32 s, u32 token) const noexcept {
    const float own = mass.segment(s)[token];
    if (observers.data == nullptr) return own;
    const u32 seen_by = observers.segment(s)[token];
    return __fdiv_rn(own, static_cast<float>(seen_by != 0 ? seen_by : 1));
  }
  [[nodiscard]] KVLEAN_DEVICE float ratio(const Segment& segment, u32 s, u32 dropped,
                                          u32 receiver) const noexcept {
    float ratio = 0.0f;
    if (mass.data != nullptr) {
      const float own = mass_of(s, receiver);
      const float other = mass_of(s, dropped);
      ratio = other == 0.0f ? 0.0f : __fdiv_rn(other, own);
    } else {
      ratio = expf(segment.finite_mass_bias(dropped) - segment.finite_mass_bias(receiver));
    }
    if (!(ratio > 0.0f)) return 0.0f;
    return smaller(ratio, max_ratio);
  }
};

KVLEAN_DEVICE void fold_slot(const FoldWork& work, const Segment& segment, u32 s, u32 slot,
                             u32 lane, u32 step) noexcept {
  const PlanView& plan = work.plan;
  const u64 entry = plan.slot(s, slot);
  const u32 anchor = plan.anchor[entry];
  const u32 begin = plan.term_begin[entry];
  const u32 terms = plan.term_end[entry] - begin;
  const u32* token = plan.term_token + plan.term(s, begin);
  float* weight = plan.term_weight + plan.term(s, begin);
  double total = 0.0;
  for (u32 i = lane; i < terms; i += step) {
    const float ratio = work.ratio(segment, s, token[i], anchor);
    weight[i] = ratio;
    total += static_cast<double>(ratio);
  }
  if (step != 1) total = warp_sum(total);
  total += 1.0;
  for (u32 i = lane; i < terms; i += step) {
    weight[i] = static_cast<float>(static_cast<double>(weight[i]) / total);
  }
  if (lane != 0) return;
  plan.self_weight[entry] = static_cast<float>(1.0 / total);
  if (work.log_mass) {
    plan.log_mass[entry] = segment.finite_mass_bias(anchor) + static_cast<float>(log(total));
  }
}

/// MassFold's weights and log mass: a thread a slot, a warp where many tokens fold into it.
template <int = 0>
__global__ void __launch_bounds__(128) fold_weights(const FoldWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = work.plan.length[s];
  if (blockIdx.x % blocks * 128 >= length) return;
  const Segment segment = work.cache.segments[s];
  const u32 slot = blockIdx.x % blocks * 128 + threadIdx.x;
  const u32 lane = threadIdx.x % warp_threads;
  u32 terms = 0;
  if (slot < length) {
    const u64 entry = work.plan.slot(s, slot);
    terms = work.plan.term_end[entry] - work.plan.term_begin[entry];
    if (terms < 48) fold_slot(work, segment, s, slot, 0, 1);
  }
  u32 pending = __ballot_sync(full_warp, terms >= 48);
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    fold_slot(work, segment, s, slot - lane + owner, lane, warp_threads);
  }
}

}  // namespace detail

/// Workspace bytes that reduce() with a MassFoldReducer needs at most: about 21 bytes a token, and
/// what a selection needs.
[[nodiscard]] inline std::size_t bytes_required(const CacheView& cache, const MassFoldReducer&,
                                                const SelectOptions& options) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_nearest_scratch(cache, counting));
  return counting.bytes_required() + select_bytes_required(cache, options);
}

/// MassFoldReducer::reduce() for all layers and sequences of a step: from the same score bits the
/// CPU's slots and receivers, ties included, as what decides is computed in the CPU's order of
/// additions. `scores.observers` serves per_observer. Of 16-bit keys 64, 96, 128 or 256 wide tensor
/// cores find the few slots that may be nearest. Others, and tokens with many slots equally near,
/// are compared by plain arithmetic, some thirty times slower. O(dropped * kept * d).
///
/// Errors, at once: invalid_option, null_pointer, invalid_shape, shape_mismatch, needs_log_mass
/// (the plan has no room for it), destination_too_small, workspace_too_small, launch_failed; on the
/// error word those of select_kept().
[[nodiscard]] inline Status reduce(const Context& context, const CacheView& cache,
                                   const MassFoldReducer& reducer, const MergeScores& scores,
                                   const u32* limit, const SelectOptions& options,
                                   PlanView& plan) noexcept {
  const float ratio = reducer.max_ratio;
  if (!(reducer.min_cosine <= 1.0f) || !(ratio > 0.0f) || !std::isfinite(ratio)) {
    return StatusCode::invalid_option;
  }
  KVLEAN_RETURN_IF_ERROR(detail::check_merge(cache, scores, limit, options, plan));
  if (!plan.has_terms()) return StatusCode::null_pointer;
  if (reducer.log_mass && plan.log_mass == nullptr) return StatusCode::needs_log_mass;
  PlanView out = plan;
  out.self_value_weight = out.term_value_weight = nullptr;
  if (!reducer.log_mass) {
    out.log_mass = nullptr;
    out.needs &= ~static_cast<u32>(needs_log_mass);
  }
  WorkspaceScope scope(context.workspace);
  detail::NearestScratch scratch = detail::take_nearest_scratch(cache, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  scratch.work.plan = out;
  scratch.work.protection = options.protection;
  scratch.work.min_cosine = reducer.min_cosine;
  detail::KernelChain chain(context);
  KVLEAN_RETURN_IF_ERROR(detail::find_nearest(context, scores, limit, options, scratch, chain));
  KVLEAN_RETURN_IF_ERROR(detail::group_terms(scratch.work, chain));
  detail::FoldWork fold;
  fold.cache = cache;
  fold.plan = out;
  fold.mass = scores.mass;
  if (reducer.per_observer) fold.observers = scores.observers;
  fold.max_ratio = ratio;
  fold.log_mass = reducer.log_mass;
  const u32 blocks = ceil_div(larger(smaller(plan.max_slots, cache.max_tokens), 1u), 128u);
  KVLEAN_RETURN_IF_ERROR(
      chain.run(u64{cache.num_segments()} * blocks, 128, detail::fold_weights<>, fold, blocks));
  out.needs |= needs_changed_values;
  if (reducer.log_mass) out.needs |= needs_log_mass;
  if (options.sharing.kind == SharingKind::whole_pages) {
    out.page_tokens = options.sharing.page_tokens;
  }
  plan = out;
  return StatusCode::ok;
}

KVLEAN_CUDA_NAMESPACE_END
