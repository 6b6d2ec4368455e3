// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_runs.cuh"
#include "kvlean/cuda/plan.cuh"

// Who merges into whom: slots and terms of the sets that stay, without their weights.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// What the kernels from sets to a plan take besides SetWork, by value.
struct WeightWork {
  PlanView plan;
  u32* term_pivot = nullptr;  ///< [segments][stride]: the token each term merges into, or no_token
  Sigma sigma = Sigma::mean_distance;
  float fixed_sigma = 0.0f;
  bool scaled = false;  ///< values times the set's size
  LogMass log_mass = LogMass::none;
  // Whole pages: kept tokens are given.
  const u8* keep = nullptr;
  const u32* slot_of = nullptr;
};
inline constexpr u32 no_token = 0xffffffffu;

/// One slot a set, without its weights.
KVLEAN_DEVICE void write_slot(const SetWork& work, const WeightWork& out, u32 u, u32 slot,
                              u32 pivot, u32 first_term, u32 terms) noexcept {
  const PlanView& plan = out.plan;
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    const u64 entry = plan.slot(work.segment_of(u) + h, slot);
    plan.anchor[entry] = pivot;
    if (plan.has_terms()) {
      plan.term_begin[entry] = first_term;
      plan.term_end[entry] = first_term + terms;
    }
  }
}
/// Term `i` of a unit's segments.
KVLEAN_DEVICE void write_term(const SetWork& work, const WeightWork& out, u32 u, u32 i, u32 token,
                              u32 pivot) noexcept {
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    const u32 s = work.segment_of(u) + h;
    out.plan.term_token[out.plan.term(s, i)] = token;
    out.term_pivot[s * work.stride + i] = pivot;
  }
}

/// Slots and terms of the sets that stay. Blocks take tiles of sets; those of evicted sets leave
/// their room for terms empty.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    write_sets(const CutWork cut_work, const SetWork work, const WeightWork out) {
  __shared__ CutScratch scratch;
  __shared__ u64 before[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const SetUnit unit = work.unit[u];
  // There are fewer sets than tokens: they are spread over all blocks.
  const u32 rounds = larger(1u, ceil_div(unit.sets, work.tiles * cut_threads));
  const u32 first_set = tile * rounds * cut_threads;
  if (tile != 0 && first_set >= unit.sets) return;
  const u32 kept_sets = unit.sets - unit.gone;
  const bool fits = kept_sets <= out.plan.max_slots;
  if (tile == 0) {
    if (threadIdx.x == 0 && !fits) report(work.error, StatusCode::destination_too_small);
    for (u32 h = threadIdx.x; h < work.heads_per_unit; h += cut_threads) {
      const u32 s = work.segment_of(u) + h;
      out.plan.length[s] = fits ? kept_sets : 0;
      if (out.plan.slots_evicted != nullptr) out.plan.slots_evicted[s] = unit.evicted + unit.gone;
    }
  }
  FinalCut cut;
  TileCount earlier;
  TileFlags flags;
  if (unit.gone != 0) {
    cut = finish_cut(cut_work, u, scratch);
    const float* score = work.set_score + work.at(u, 0);
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 set = j < rounds ? first_set + j * cut_threads + threadIdx.x : unit.sets;
      const u32 free_before = set < unit.sets ? work.set_free[work.at(u, set)] : protected_set;
      const u32 key = free_before < protected_set ? device_score_key(score[free_before]) : 0;
      const bool is_free = free_before < protected_set;
      flags.set(j, 0, set < unit.sets && (!is_free || key > cut.key));
      flags.set(j, 1, is_free && key == cut.key);
      flags.set(j, 2, false);
      flags.set(j, 3, false);
    }
    const u64 mine = flags.count(before, scratch.scan);
    u64* announced = work.announced_sets + static_cast<u64>(u) * work.tiles;
    if (threadIdx.x == 0) {
      announce(announced + tile, TileFlags::part(mine, 0), TileFlags::part(mine, 1));
    }
    if (tile != 0) earlier = sum_announced(announced, tile, scratch.scan);
  }
  const u32 lane = threadIdx.x % warp_threads;
#pragma unroll 1
  for (u32 j = 0; j < rounds; ++j) {
    const u32 set = first_set + j * cut_threads + threadIdx.x;
    if (first_set + j * cut_threads >= unit.sets) break;
    const bool fine = set < unit.sets;
    u32 slot = set;
    bool stays = fine && fits;
    if (unit.gone != 0) {
      // The registers of a flag are indexed by j: this loop is not unrolled, so ask shared memory
      // and the scores again instead.
      const u32 free_before = fine ? work.set_free[work.at(u, set)] : protected_set;
      const bool is_free = free_before < protected_set;
      const u32 key = is_free ? device_score_key(work.set_score[work.at(u, free_before)]) : 0;
      const bool taken = fine && (!is_free || key > cut.key);
      const bool equal = is_free && key == cut.key;
      const u32 lanes_before = (1u << lane) - 1;
      const u64 packed = before[TileFlags::run(j)];
      const u32 equal_rank = earlier.equal + TileFlags::part(packed, 1) +
                             __popc(__ballot_sync(full_warp, equal) & lanes_before);
      const u32 taken_rank = earlier.taken + TileFlags::part(packed, 0) +
                             __popc(__ballot_sync(full_warp, taken) & lanes_before);
      slot = taken_rank + ties_before(cut, equal_rank);
      stays = stays && (taken || (equal && takes_tie(cut, equal_rank)));
    }
    const u64 place = work.at(u, fine ? set : first_set);
    const u32 begin = work.set_begin[place];
    const u32 first_term = work.set_links[place];
    const u32 terms = fine ? work.set_links[place + 1] - first_term : 0;
    const u32 pivot = work.pivot[place];
    if (stays) write_slot(work, out, u, slot, pivot, first_term, terms);
    if (!out.plan.has_terms()) continue;
    if (terms < long_set) {
      for (u32 i = 0; i < terms; ++i) {
        const u32 token = begin + i + (begin + i >= pivot ? 1 : 0);
        write_term(work, out, u, first_term + i, token, stays ? pivot : no_token);
      }
    }
    u32 pending = __ballot_sync(full_warp, terms >= long_set);
    while (pending != 0) {
      const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
      pending &= pending - 1;
      const u32 from = __shfl_sync(full_warp, begin, owner);
      const u32 term = __shfl_sync(full_warp, first_term, owner);
      const u32 count = __shfl_sync(full_warp, terms, owner);
      const u32 anchor = __shfl_sync(full_warp, pivot, owner);
      const bool merges = __shfl_sync(full_warp, stays ? 1u : 0u, owner) != 0;
      for (u32 i = lane; i < count; i += warp_threads) {
        const u32 token = from + i + (from + i >= anchor ? 1 : 0);
        write_term(work, out, u, term + i, token, merges ? anchor : no_token);
      }
    }
  }
}

/// The same where whole pages were selected: every kept token is a slot, the best kept one of a set
/// receives the set's dropped tokens. A thread takes a set; sets are rarely long.
template <int = 0>
__global__ void __launch_bounds__(set_threads)
    write_page_sets(const SetWork work, const WeightWork out, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / blocks;
  const SetUnit unit = work.unit[u];
  const u32 set = blockIdx.x % blocks * set_threads + threadIdx.x;
  if (set >= unit.sets) return;
  const u64 row = work.segment_of(u) * work.stride;  // all heads of the unit keep the same tokens
  const u8* keep = out.keep + row;
  const u32* slot_of = out.slot_of + row;
  const float* score = work.score.segment(u);
  const u64 place = work.at(u, set);
  const u32 begin = work.set_begin[place];
  const u32 first_term = work.set_links[place];
  const u32 room = work.set_links[place + 1] - first_term;
  const u32 end = begin + 1 + room;
  u32 pivot = no_token;
  u32 best = 0;
  u32 dropped = 0;
  for (u32 t = begin; t < end; ++t) {
    if (keep[t] == 0) {
      ++dropped;
      continue;
    }
    const u32 key = device_score_key(score[t]);
    if (pivot == no_token || key > best) {
      pivot = t;
      best = key;
    }
  }
  const u32 terms = pivot != no_token && out.plan.has_terms() ? dropped : 0;
  const bool fits = out.plan.length[work.segment_of(u)] != 0;
  for (u32 t = begin; t < end; ++t) {
    if (keep[t] != 0 && fits) {
      write_slot(work, out, u, slot_of[t], t, first_term, t == pivot ? terms : 0);
    }
  }
  if (out.plan.has_terms()) {
    u32 i = 0;
    for (u32 t = begin; t < end && pivot != no_token; ++t) {
      if (keep[t] == 0) write_term(work, out, u, first_term + i++, t, fits ? pivot : no_token);
    }
    for (; i < room; ++i) write_term(work, out, u, first_term + i, 0, no_token);
  }
  if (out.plan.slots_evicted == nullptr || pivot != no_token) return;
  for (u32 h = 0; h < work.heads_per_unit; ++h) {
    atomicAdd(out.plan.slots_evicted + work.segment_of(u) + h, dropped);
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
