// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/draw.cuh"
#include "kvlean/cuda/merge_tile.cuh"
#include "kvlean/cuda/plan.cuh"
#include "kvlean/cuda/select.cuh"
#include "kvlean/reduce/cam.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// What random draws depend on besides the token: kvlean::PlanOptions of the same names.
struct MergeDraws {
  u64 seed = 0;
  u32 step = 0;
};

/// Room for the plan of a CaMReducer with at most `max_slots` slots a segment.
[[nodiscard]] inline PlanShape plan_shape(const CacheView& cache, const CaMReducer&,
                                          u32 max_slots) noexcept {
  PlanShape shape;
  shape.segments = cache.num_segments();
  shape.max_slots = max_slots;
  shape.max_terms = cache.max_tokens;
  return shape;
}

namespace detail {

/// Everything CaM's kernels take, by value.
struct CaMWork {
  CacheView cache;
  PlanView plan;
  DeviceRagged<const float> mass;
  u32 receivers = 0;
  bool samples = false;
  u64 seed = 0;
  u32 step = 0;
  u32 tiles = 0;
  u64 stride = 0;
  const u8* keep = nullptr;  ///< [segments][stride]
  float* mean = nullptr;     ///< [segments][stride] of the receivers from each slot on
  u64* announced = nullptr;  ///< [segments][tiles], zeroed
};

/// Mean mass of the receivers from each slot on, added in order as the CPU does.
template <int = 0>
__global__ void __launch_bounds__(128) average_receivers(const CaMWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 slots = work.plan.length[s];
  const u32 slot = blockIdx.x % blocks * 128 + threadIdx.x;
  if (slot >= slots) return;
  const float* mass = work.mass.segment(s);
  const u32* anchor = work.plan.anchor + work.plan.slot(s, 0);
  const u32 count = smaller(work.receivers, slots - slot);
  double sum = 0.0;
  for (u32 r = slot; r < slot + count; ++r) sum += static_cast<double>(mass[anchor[r]]);
  work.mean[s * work.stride + slot] = static_cast<float>(sum / static_cast<double>(count));
}

/// Terms, in token order, and at each slot how many lie before it.
template <int = 0>
__global__ void __launch_bounds__(cut_threads) write_cam_terms(const CaMWork work) {
  __shared__ u64 scan[warp_threads + 1];
  __shared__ u64 before[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const u32 first_token = tile * cut_tile;
  const u32 length = work.cache.lengths[s];
  const u32 slots = work.plan.length[s];
  if (first_token >= length || slots == 0) return;
  const Segment segment = work.cache.segments[s];
  const u8* keep = work.keep + s * work.stride;
  const float* mass = work.mass.segment(s);
  const u32* anchor = work.plan.anchor + work.plan.slot(s, 0);
  u32 low = 0;  // slots before the tile
  for (u32 high = slots; low < high;) {
    const u32 middle = (low + high) / 2;
    if (anchor[middle] < first_token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  TileFlags flags;
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    flags.set(j, 0, token < length && keep[token] != 0);
    flags.set(j, 1, false);
    flags.set(j, 2, false);
    flags.set(j, 3, false);
  }
  static_cast<void>(flags.count(before, scan));
  u32 slot[cut_each];
  float share[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    slot[j] = low + flags.before(j, 0, before);
    share[j] = 0.0f;
    // Tokens behind the last slot have no receiver.
    const u32 begin = larger(slot[j], smaller(segment.frozen, slots));
    if (token < length && !flags.has(j, 0) && begin < slots) {
      const float ratio = __fdiv_rn(mass[token], work.mean[s * work.stride + begin]);
      const float probability = !(ratio > 0.0f) ? 0.0f : ratio < 1.0f ? ratio : 1.0f;
      share[j] = probability;
      if (work.samples) {
        const float uniform = device_draw(work.seed, segment.layer, segment.kv_head,
                                          segment.position(token), work.step);
        share[j] = uniform < probability ? 1.0f : 0.0f;
      }
    }
  }
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) flags.set(j, 1, share[j] != 0.0f);
  __syncthreads();  // `before` has been read
  const u64 mine = flags.count(before, scan);
  u64* announced = work.announced + static_cast<u64>(s) * work.tiles;
  if (threadIdx.x == 0) announce(announced + tile, 0, TileFlags::part(mine, 1));
  TileCount earlier;
  if (tile != 0) earlier = sum_announced(announced, tile, scan);
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    if (token >= length) continue;
    const u32 terms = earlier.equal + flags.before(j, 1, before);
    if (flags.has(j, 0)) {
      work.plan.term_end[work.plan.slot(s, slot[j])] = terms;
    } else if (flags.has(j, 1)) {
      const u64 at = work.plan.term(s, terms);
      work.plan.term_token[at] = token;
      const u32 begin = larger(slot[j], smaller(segment.frozen, slots));
      work.plan.term_weight[at] =
          __fdiv_rn(share[j], static_cast<float>(smaller(work.receivers, slots - begin)));
    }
  }
}

/// A slot's terms begin where those end that reach no further than the slot before.
template <int = 0>
__global__ void __launch_bounds__(128) begin_cam_terms(const CaMWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 slot = blockIdx.x % blocks * 128 + threadIdx.x;
  if (slot >= work.plan.length[s]) return;
  const u32 frozen = work.cache.segments[s].frozen;
  const u64 first = work.plan.slot(s, 0);
  u32 begin = 0;
  if (slot < frozen) {
    begin = work.plan.term_end[first + slot];
  } else if (slot - frozen >= work.receivers) {
    begin = work.plan.term_end[first + slot - work.receivers];
  }
  work.plan.term_begin[first + slot] = begin;
}

struct CaMScratch {
  u8* keep = nullptr;
  float* mean = nullptr;
  u64* announced = nullptr;
  std::size_t announced_bytes = 0;
};
[[nodiscard]] inline CaMScratch take_cam_scratch(const CacheView& cache,
                                                 Workspace& workspace) noexcept {
  CaMScratch scratch;
  const std::size_t all = std::size_t{cache.num_segments()} * cache.max_tokens;
  scratch.keep = workspace.take<u8>(all);
  scratch.mean = workspace.take<float>(all);
  const std::size_t tiles =
      std::size_t{cache.num_segments()} * ceil_div(larger(cache.max_tokens, 1u), cut_tile);
  scratch.announced = workspace.take<u64>(tiles);
  scratch.announced_bytes = tiles * sizeof(u64);
  return scratch;
}

}  // namespace detail

/// Workspace bytes that reduce() with a CaMReducer needs at most.
[[nodiscard]] inline std::size_t bytes_required(const CacheView& cache, const CaMReducer&,
                                                const SelectOptions& options) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_cam_scratch(cache, counting));
  return counting.bytes_required() + select_bytes_required(cache, options);
}

/// CaMReducer::reduce() for all layers and sequences of a step, over a prefill or one token above
/// the budget: from the same score and mass bits the CPU's plan to the bit. `limit` [segments] lies
/// in device memory; of `options` only protection and sharing count. The returned plan has no
/// self_weight: a receiver's own value keeps weight 1. O(tokens + slots * receivers).
///
/// Errors, at once: invalid_option, missing_observation (no mass), null_pointer, invalid_shape,
/// shape_mismatch, destination_too_small, workspace_too_small, launch_failed; on the error word
/// those of select_kept().
[[nodiscard]] inline Status reduce(const Context& context, const CacheView& cache,
                                   const CaMReducer& reducer, const MergeScores& scores,
                                   const u32* limit, const SelectOptions& options, PlanView& plan,
                                   const MergeDraws& draws = {}) noexcept {
  if (reducer.receivers == 0 || reducer.mode > CaMMode::sampled) return StatusCode::invalid_option;
  if (!scores.mass) return StatusCode::missing_observation;
  KVLEAN_RETURN_IF_ERROR(detail::check_merge(cache, scores, limit, options, plan));
  if (!plan.has_terms()) return StatusCode::null_pointer;
  WorkspaceScope scope(context.workspace);
  const detail::CaMScratch scratch = detail::take_cam_scratch(cache, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  Selection selection;
  selection.plan = plan;
  selection.keep = scratch.keep;
  selection.token_stride = cache.max_tokens;
  KVLEAN_RETURN_IF_ERROR(select_kept(cache, scores.rank, limit, options, context, selection));
  KVLEAN_RETURN_IF_ERROR(
      status_of(cudaMemsetAsync(scratch.announced, 0, scratch.announced_bytes, context.stream)));
  detail::CaMWork work;
  work.cache = cache;
  work.plan = plan;
  work.mass = scores.mass;
  work.receivers = reducer.receivers;
  work.samples = reducer.mode == CaMMode::sampled;
  work.seed = draws.seed ^ 0xca3ca3ca3ca3ca3dull;  // CaMReducer's salt
  work.step = draws.step;
  work.tiles = ceil_div(larger(cache.max_tokens, 1u), detail::cut_tile);
  work.stride = cache.max_tokens;
  work.keep = scratch.keep;
  work.mean = scratch.mean;
  work.announced = scratch.announced;
  const u32 blocks = ceil_div(larger(smaller(plan.max_slots, cache.max_tokens), 1u), 128u);
  const u64 segments = cache.num_segments();
  detail::KernelChain chain(context);
  KVLEAN_RETURN_IF_ERROR(
      chain.run(segments * blocks, 128, detail::average_receivers<>, work, blocks));
  KVLEAN_RETURN_IF_ERROR(
      chain.run(segments * work.tiles, detail::cut_threads, detail::write_cam_terms<>, work));
  KVLEAN_RETURN_IF_ERROR(
      chain.run(segments * blocks, 128, detail::begin_cam_terms<>, work, blocks));
  plan.self_weight = nullptr;
  plan.self_value_weight = plan.term_value_weight = nullptr;
  plan.log_mass = nullptr;
  plan.needs |= needs_changed_values;
  plan.needs &= ~static_cast<u32>(needs_log_mass);
  if (options.sharing.kind == SharingKind::whole_pages) {
    plan.page_tokens = options.sharing.page_tokens;
  }
  return StatusCode::ok;
}

KVLEAN_CUDA_NAMESPACE_END
