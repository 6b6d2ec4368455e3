// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/massfold.cuh"
#include "kvlean/cuda/merge_weights.cuh"
#include "kvlean/reduce/d2o.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// Room for the plan of a D2OReducer with at most `max_slots` slots a segment.
[[nodiscard]] inline PlanShape plan_shape(const CacheView& cache, const D2OReducer&,
                                          u32 max_slots) noexcept {
  PlanShape shape;
  shape.segments = cache.num_segments();
  shape.max_slots = max_slots;
  shape.max_terms = cache.max_tokens;
  shape.log_mass = cache.has_log_mass;
  return shape;
}

namespace detail {

/// The running threshold of each segment. One block a segment.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    follow_threshold(const NearestWork work, const float* threshold, float* next, float momentum,
                     float* bar) {
  __shared__ u64 scratch[warp_threads + 1];
  __shared__ double sums[cut_threads / warp_threads];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x;
  const u32 count = work.num_dropped[s];
  double sum = 0.0;
  u64 mine = 0;
  for (u32 i = threadIdx.x; i < count; i += cut_threads) {
    const u64 at = s * work.stride + i;
    if (work.nearest[at] == no_slot) continue;
    sum += static_cast<double>(work.cosine[at]);
    ++mine;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % warp_threads == 0) sums[threadIdx.x / warp_threads] = sum;
  u64 usable = 0;
  static_cast<void>(block_scan<cut_threads>(mine, scratch, usable));
  if (threadIdx.x != 0) return;
  double all = 0.0;
  for (const double part : sums) all += part;
  const float before = threshold != nullptr ? threshold[s] : __int_as_float(0x7fc00000);
  float value = before;
  if (usable != 0) {
    const float mean = static_cast<float>(all / static_cast<double>(usable));
    value = before == before
                ? __fadd_rn(__fmul_rn(momentum, before), __fmul_rn(1.0f - momentum, mean))
                : mean;
  }
  bar[s] = value;
  if (next != nullptr) next[s] = value;
}

KVLEAN_DEVICE void blend_slot(const PlanView& plan, const Segment& segment, bool soft, u32 s,
                              u32 slot, const MemberSums& team) noexcept {
  const u64 entry = plan.slot(s, slot);
  const u32 anchor = plan.anchor[entry];
  const u32 begin = plan.term_begin[entry];
  const u32 terms = plan.term_end[entry] - begin;
  const u32* token = plan.term_token + plan.term(s, begin);
  float* weight = plan.term_weight + plan.term(s, begin);
  const float bias = segment.finite_mass_bias(anchor);
  const double own = soft ? 2.718281828459045 : 1.0;
  double total = 0.0;
  float largest = bias;
  for (u32 i = team.lane; i < terms; i += team.step) {
    if (soft) {
      weight[i] = expf(weight[i]);
      total += static_cast<double>(weight[i]);
    }
    largest = larger(largest, segment.finite_mass_bias(token[i]));
  }
  total = soft ? own + team.sum(total) : 1.0 + static_cast<double>(terms);
  largest = team.most(largest);
  DeviceMassSum mass{static_cast<double>(largest), 0.0, 0.0, 0.0};
  const bool sums = plan.log_mass != nullptr && terms != 0;
  for (u32 i = team.lane; i < terms; i += team.step) {
    weight[i] = static_cast<float>(static_cast<double>(weight[i]) / total);
    if (sums) mass.add(weight[i], segment.finite_mass_bias(token[i]));
  }
  if (sums) {
    mass.weighted = team.sum(mass.weighted);
    mass.entropy = team.sum(mass.entropy);
  }
  if (team.lane != 0) return;
  const float self = terms == 0 ? 1.0f : static_cast<float>(own / total);
  plan.self_weight[entry] = self;
  if (plan.log_mass == nullptr) return;
  mass.add(self, bias);
  plan.log_mass[entry] = terms != 0 ? mass.value(LogMass::none) : bias;
}

/// D2O's weights, from the cosines in term_weight.
template <int = 0>
__global__ void __launch_bounds__(128)
    blend_slots(const CacheView cache, const PlanView plan, bool soft, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 length = plan.length[s];
  if (blockIdx.x % blocks * 128 >= length) return;
  const Segment segment = cache.segments[s];
  const u32 slot = blockIdx.x % blocks * 128 + threadIdx.x;
  const u32 lane = threadIdx.x % warp_threads;
  u32 terms = 0;
  if (slot < length) {
    const u64 entry = plan.slot(s, slot);
    terms = plan.term_end[entry] - plan.term_begin[entry];
    if (terms < long_set) blend_slot(plan, segment, soft, s, slot, MemberSums{0, 1});
  }
  u32 pending = __ballot_sync(full_warp, terms >= long_set);
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    blend_slot(plan, segment, soft, s, slot - lane + owner, MemberSums{lane, warp_threads});
  }
}

}  // namespace detail

/// Workspace bytes that reduce() with a D2OReducer needs at most.
[[nodiscard]] inline std::size_t bytes_required(const CacheView& cache, const D2OReducer&,
                                                const SelectOptions& options) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_nearest_scratch(cache, counting));
  static_cast<void>(counting.take<float>(cache.num_segments()));
  return counting.bytes_required() + select_bytes_required(cache, options);
}

/// D2OReducer::reduce() for all layers and sequences of a step; receivers as for MassFoldReducer.
/// The reducer's `threshold` and `next_threshold` are DEVICE memory here, [segments] in the cache's
/// order, or null; threshold_stride is not read.
///
/// Errors as for MassFoldReducer, and needs_rope.
[[nodiscard]] inline Status reduce(const Context& context, const CacheView& cache,
                                   const D2OReducer& reducer, const MergeScores& scores,
                                   const u32* limit, const SelectOptions& options,
                                   PlanView& plan) noexcept {
  if (!(reducer.momentum >= 0.0f && reducer.momentum <= 1.0f)) return StatusCode::invalid_option;
  if (reducer.keys == MergedKeys::aligned && cache.rope == nullptr) return StatusCode::needs_rope;
  KVLEAN_RETURN_IF_ERROR(detail::check_merge(cache, scores, limit, options, plan));
  if (!plan.has_terms()) return StatusCode::null_pointer;
  if (cache.has_log_mass && plan.log_mass == nullptr) return StatusCode::needs_log_mass;
  PlanView out = plan;
  out.self_value_weight = out.term_value_weight = nullptr;
  WorkspaceScope scope(context.workspace);
  detail::NearestScratch scratch = detail::take_nearest_scratch(cache, context.workspace);
  float* bar = context.workspace.take<float>(cache.num_segments());
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  detail::NearestWork& work = scratch.work;
  work.plan = out;
  work.protection = options.protection;
  work.spare_protected = true;
  work.bar = bar;
  detail::KernelChain chain(context);
  KVLEAN_RETURN_IF_ERROR(detail::find_nearest(context, scores, limit, options, scratch, chain));
  const u64 segments = cache.num_segments();
  KVLEAN_RETURN_IF_ERROR(chain.run(segments, detail::cut_threads, detail::follow_threshold<>, work,
                                   reducer.threshold, reducer.next_threshold, reducer.momentum,
                                   bar));
  const u32 token_blocks = ceil_div(larger(cache.max_tokens, 1u), 256u);
  KVLEAN_RETURN_IF_ERROR(
      chain.run(segments * token_blocks, 256, detail::count_accepted<>, work, token_blocks));
  KVLEAN_RETURN_IF_ERROR(detail::group_terms(work, chain));
  const u32 blocks = ceil_div(larger(smaller(plan.max_slots, cache.max_tokens), 1u), 128u);
  KVLEAN_RETURN_IF_ERROR(chain.run(segments * blocks, 128, detail::blend_slots<>, cache, out,
                                   reducer.weights == D2OWeights::paper, blocks));
  out.needs |= needs_changed_values | kvlean::detail::key_needs(reducer.keys);
  if (out.log_mass != nullptr) out.needs |= needs_log_mass;
  if (options.sharing.kind == SharingKind::whole_pages) {
    out.page_tokens = options.sharing.page_tokens;
  }
  plan = out;
  return StatusCode::ok;
}

KVLEAN_CUDA_NAMESPACE_END
