// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_sets.cuh"

// From link scores to sets: where each begins, its pivot and its score.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// Where sets begin, from the cut of the links, and what the eviction of sets starts with. Selects:
/// the best links were looked for.
template <bool Selects>
__global__ void __launch_bounds__(cut_threads)
    form_sets(const CutWork cut_work, const SetWork work) {
  __shared__ CutScratch scratch;
  __shared__ u64 before[TileFlags::runs];
  __shared__ u32 linked[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const u32 first_token = tile * cut_tile;
  const SetUnit unit = work.unit[u];
  if (unit.active == 0 || (tile != 0 && first_token >= unit.length)) return;
  FinalCut cut;
  if constexpr (Selects) cut = finish_cut(cut_work, u, scratch);
  if (cut.key == 0) cut.ties = 0;  // NaN: these may not merge, whatever the need
  const float* link = work.link + work.at(u, 0);
  const u8* state = work.state + work.at(u, 0);
  const auto is_above = [&](float value) {
    return unit.by_threshold != 0 ? value > work.epsilon
                                  : Selects && device_score_key(value) > cut.key;
  };
  const auto is_equal = [&](float value) {
    return unit.by_threshold == 0 && cut.ties != 0 && device_score_key(value) == cut.key;
  };
  TileFlags flags;
  float values[cut_each];
  u8 states[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    values[j] = token + 1 < unit.length ? link[token] : __int_as_float(0x7fc00000);
    states[j] = token < unit.length ? state[token] : u8{token_free};
  }
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    flags.set(j, 0, is_above(values[j]));
    flags.set(j, 1, is_equal(values[j]));
    flags.set(j, 2, states[j] == token_evicted);
    flags.set(j, 3, states[j] == token_alone);
  }
  const u64 mine = flags.count(before, scratch.scan);
  const u64 tiles_at = static_cast<u64>(u) * work.tiles;
  if (threadIdx.x == 0) {
    announce(work.announced_links + tiles_at + tile, TileFlags::part(mine, 0),
             TileFlags::part(mine, 1));
  }
  TileCount earlier;
  bool last_linked = false;  // the link into this tile
  if (tile != 0) {
    earlier = sum_announced(work.announced_links + tiles_at, tile, scratch.scan);
    const float value = link[first_token - 1];
    last_linked = is_above(value) || (is_equal(value) && earlier.equal - 1 < cut.ties);
  }
  u32 linked_mask[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const bool is_linked =
        flags.has(j, 0) ||
        (flags.has(j, 1) && earlier.equal + flags.before(j, 1, before) < cut.ties);
    linked_mask[j] = __ballot_sync(full_warp, is_linked);
    if (threadIdx.x % warp_threads == 0) linked[TileFlags::run(j)] = linked_mask[j];
  }
  __syncthreads();
  const u32 alone_before = work.alone_before[tiles_at + tile];
  const u32 evicted_before = work.evicted_before[tiles_at + tile];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    if (token >= unit.length || states[j] == token_evicted) continue;
    const u32 lane = threadIdx.x % warp_threads;
    const u32 run = TileFlags::run(j);
    bool joined = last_linked;
    if (lane != 0) {
      joined = (linked_mask[j] >> (lane - 1) & 1) != 0;
    } else if (run != 0) {
      joined = linked[run - 1] >> 31 != 0;
    }
    if (joined) continue;
    const u32 equal = earlier.equal + flags.before(j, 1, before);
    const u32 links = earlier.taken + flags.before(j, 0, before) + smaller(equal, cut.ties);
    const u32 set = token - links - evicted_before - flags.before(j, 2, before);
    const u32 alone = alone_before + flags.before(j, 3, before);
    const u64 place = work.at(u, set);
    work.set_begin[place] = token;
    work.set_links[place] = links;
    work.set_free[place] = (set - alone) | (states[j] == token_alone ? protected_set : 0u);
  }
  if (threadIdx.x != 0 || unit.length > first_token + cut_tile) return;
  const u32 links = earlier.taken + TileFlags::part(mine, 0) +
                    smaller(earlier.equal + TileFlags::part(mine, 1), cut.ties);
  const u32 sets = unit.length - links - unit.evicted;
  const u32 free_sets = sets - unit.alone;
  const u32 gone =
      unit.limited != 0 && sets > unit.limit ? smaller(sets - unit.limit, free_sets) : 0;
  work.set_links[work.at(u, sets)] = links;
  work.unit[u].links = links;
  work.unit[u].sets = sets;
  work.unit[u].free_sets = free_sets;
  work.unit[u].gone = gone;
  CutState best;
  SelectRange range;
  range.length = range.count = free_sets;
  best.remaining = gone != 0 ? free_sets - gone : 0;
  best.mode = best.remaining != 0 ? cut_own : cut_none;
  work.best_sets.entry[u] = best;
  work.best_sets.range[u] = range;
}

inline constexpr u32 set_threads = 128;
inline constexpr u32 long_set = 48;  ///< tokens from which on a whole warp works on a set

/// Pivot of each set, its first token with the best score, and the score of each free set: the sum
/// where scores are mass, added in order as the CPU does, else the best.
template <int = 0>
__global__ void __launch_bounds__(set_threads) score_sets(const SetWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / blocks;
  const SetUnit unit = work.unit[u];
  const u32 first_set = blockIdx.x % blocks * set_threads;
  if (unit.active == 0 || first_set >= unit.sets) return;
  const float* score = work.score.segment(u);
  const u32 j = first_set + threadIdx.x;
  const u32 lane = threadIdx.x % warp_threads;
  const bool fine = j < unit.sets;
  const u64 place = work.at(u, fine ? j : first_set);
  const u32 begin = work.set_begin[place];
  const u32 size = fine ? 1 + work.set_links[place + 1] - work.set_links[place] : 0;
  u32 pivot = begin;
  float best = 0.0f;
  double sum = 0.0;
  if (fine && size < long_set) {
    best = score[begin];
    u32 best_key = device_score_key(best);
    sum = static_cast<double>(best);
    for (u32 t = begin + 1; t < begin + size; ++t) {
      const float value = score[t];
      sum += static_cast<double>(value);
      const u32 key = device_score_key(value);
      if (key > best_key) {
        best_key = key;
        best = value;
        pivot = t;
      }
    }
  }
  u32 pending = __ballot_sync(full_warp, size >= long_set);
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    const u32 from = __shfl_sync(full_warp, begin, owner);
    const u32 to = from + __shfl_sync(full_warp, size, owner);
    double all = 0.0;
    u64 best_of_all = 0;
    for (u32 at = from; at < to; at += warp_threads) {
      const float value = at + lane < to ? score[at + lane] : 0.0f;
      if (at + lane < to) {
        best_of_all =
            larger(best_of_all, static_cast<u64>(device_score_key(value)) << 32 | ~(at + lane));
      }
      const u32 count = smaller(warp_threads, to - at);
      for (u32 i = 0; i < count; ++i) {
        const float next = __shfl_sync(full_warp, value, i);
        all = at == from && i == 0 ? static_cast<double>(next) : all + static_cast<double>(next);
      }
    }
    best_of_all = max_lanes<warp_threads>(best_of_all);
    if (lane == owner) {
      sum = all;
      pivot = ~static_cast<u32>(best_of_all);
      best = score[pivot];
    }
  }
  if (!fine) return;
  work.pivot[place] = pivot;
  const u32 free_before = work.set_free[place];
  if (free_before < protected_set) {
    work.set_score[work.at(u, free_before)] = work.is_mass ? static_cast<float>(sum) : best;
  }
}

/// Second run: the sets that each unit of a layer of a sequence is to have.
template <int = 0>
__global__ void __launch_bounds__(256) equalise_sets(const SetWork work, u32* most) {
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x * 256 + threadIdx.x;
  if (u >= work.units) return;
  const u32 first = u - u % work.cache.kv_heads;
  u32 count = 0;
  u32 shortest = 0xffffffffu;
  for (u32 h = 0; h < work.cache.kv_heads; ++h) {
    const SetUnit unit = work.unit[first + h];
    count = larger(count, unit.sets - unit.gone);
    shortest = smaller(shortest, unit.length);
  }
  most[u] = smaller(count, shortest);
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
