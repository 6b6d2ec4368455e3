// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/limits.cuh"

// The radix selection of allocate/competition.hpp over many blocks: three passes over the scores,
// of 11, 11 and 10 bits of their keys. A segment needs one range of keys refined a pass, whether it
// looks for its own best or competes: where its safe cut lies below the group's cut, none of its
// candidates competes at the cut; where it lies above, the safe cut itself no longer matters. So
// one histogram a segment and pass gives safe cuts, the group's cut and the final cut together.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

inline constexpr u32 cut_threads = 512;
inline constexpr u32 cut_each = 8;
inline constexpr u32 cut_tile = cut_threads * cut_each;
inline constexpr u32 cut_bins = 2048;  // the largest pass
inline constexpr u32 cut_levels = 3;

[[nodiscard]] KVLEAN_HOST_DEVICE constexpr u32 cut_shift(u32 level) noexcept {
  return level == 0 ? 21 : level == 1 ? 10 : 0;
}
[[nodiscard]] KVLEAN_HOST_DEVICE constexpr u32 bins_of(u32 level) noexcept {
  return level == 2 ? 1024 : 2048;
}

/// The last pass's outcome: a segment takes every candidate with a key above `key`, and `ties` of
/// those equal to it, in token order; of NaN the newest.
struct FinalCut {
  u32 key = 0xffffffffu;
  u32 ties = 0;
  u32 above = 0;
  u32 equal = 0;  ///< candidates equal to `key`
};

/// Everything the cut kernels take, by value. `units` are segments, or layers whose heads share
/// their tokens.
struct CutWork {
  DeviceRagged<const float> scores;  ///< by unit and item
  const float* weight = nullptr;     ///< [units] multiplies the scores, or null
  const SelectRange* range = nullptr;
  CutState* entry = nullptr;              ///< [units]
  CutState* states[cut_levels] = {};      ///< [units] after each pass
  u32* histogram[cut_levels] = {};        ///< [units][bins], zeroed; then suffix sums
  u64* group_histogram[cut_levels] = {};  ///< [groups][2048], zeroed; null: no competition
  u32* arrivals[cut_levels] = {};         ///< [units], zeroed
  u32* ties_in_group =
      nullptr;  ///< [entries of all ranks] competing candidates at the cut, or null
  u32 units = 0;
  u32 tiles = 0;  ///< of the longest unit
  // Which units compete with each other: the heads of a layer of a sequence, or of all its layers.
  u32 heads = 0;
  u32 num_sequences = 1;
  u32 num_layers = 1;
  bool across_layers = false;
  u32 all_heads = 0;
  u32 first_head = 0;

  [[nodiscard]] KVLEAN_DEVICE u32 group_of(u32 unit) const noexcept {
    const u32 pair = unit / heads;  // layer * num_sequences + sequence
    return across_layers ? pair % num_sequences : pair;
  }
  [[nodiscard]] KVLEAN_DEVICE float weight_of(u32 unit) const noexcept {
    return weight != nullptr ? weight[unit] : 1.0f;
  }
};

/// Shared memory of a cut kernel besides its histogram.
struct CutScratch {
  u64 scan[warp_threads + 1];
  u64 rest;
  u32 digit;
  u32 is_last;
};

/// The digit of a group's cut, and what is left to take within it. count_of(bin) is how many of the
/// group compete there. The whole block calls.
template <u32 Level, class CountOf>
KVLEAN_DEVICE void find_group_digit(CountOf&& count_of, u64 wanted, CutScratch& scratch, u32& digit,
                                    u64& rest) noexcept {
  constexpr u32 bins = bins_of(Level);
  constexpr u32 each = bins / cut_threads;
  u64 count[each];
  u64 sum = 0;
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    count[j] = count_of(bins - 1 - (threadIdx.x * each + j));
    sum += count[j];
  }
  if (threadIdx.x == 0) {
    scratch.digit = 0;
    scratch.rest = wanted;
  }
  u64 total = 0;
  u64 before = block_scan<cut_threads>(sum, scratch.scan, total);
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    if (before < wanted && before + count[j] >= wanted) {  // true for one bin
      scratch.digit = bins - 1 - (threadIdx.x * each + j);
      scratch.rest = wanted - before;
    }
    before += count[j];
  }
  __syncthreads();
  digit = scratch.digit;
  rest = scratch.rest;
}

/// A unit's state after pass `Level`, from what that pass left and its group's histogram. The whole
/// block calls; all get the same.
template <u32 Level>
[[nodiscard]] KVLEAN_DEVICE CutState advance(const CutWork& work, u32 unit,
                                             CutScratch& scratch) noexcept {
  constexpr u32 bins = bins_of(Level);
  CutState state = work.states[Level][unit];
  if (state.mode == cut_none) return state;
  const u32* suffix = work.histogram[Level] + static_cast<u64>(unit) * bins;
  u32 bin = state.digit;
  if (state.mode == cut_joint) {
    u32 digit = 0;
    u64 rest = 0;
    const u64* group =
        work.group_histogram[Level] + static_cast<u64>(work.group_of(unit)) * cut_bins;
    find_group_digit<Level>([&](u32 b) { return __ldcg(group + b); }, state.group_remaining,
                            scratch, digit, rest);
    if (state.digit != no_digit && state.digit < digit) {
      state.mode = cut_own;
    } else {
      bin = digit;
      state.group_remaining = rest;
    }
  }
  const u32 higher = bin + 1 < bins ? suffix[bin + 1] : 0;
  state.remaining = bin == state.digit ? state.remaining - higher : 0;
  state.above += higher;
  state.prefix |= bin << cut_shift(Level);
  state.digit = no_digit;
  return state;
}

/// One pass: histogram of a tile, and in the block that comes last for a unit its suffix sums, its
/// next digit, and what it adds to its group.
template <u32 Level>
__global__ void __launch_bounds__(cut_threads) cut_pass(const CutWork work) {
  constexpr u32 bins = bins_of(Level);
  constexpr u32 shift = cut_shift(Level);
  constexpr u32 each = bins / cut_threads;
  __shared__ u32 histogram[bins];
  __shared__ CutScratch scratch;
  wait_for_previous();
  allow_next();
  const u32 unit = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const SelectRange range = work.range[unit];
  if (tile != 0 && tile * cut_tile >= range.count) return;
  CutState state;
  if constexpr (Level == 0) {
    state = work.entry[unit];
  } else {
    state = advance<Level - 1>(work, unit, scratch);
  }
  if (state.mode == cut_none) {
    if (tile == 0 && threadIdx.x == 0) work.states[Level][unit] = state;
    return;
  }
#pragma unroll
  for (u32 j = 0; j < each; ++j) histogram[j * cut_threads + threadIdx.x] = 0;
  __syncthreads();

  const float* scores = work.scores.segment(unit) + range.first;
  const float weight = work.weight_of(unit);
  float values[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 i = tile * cut_tile + j * cut_threads + threadIdx.x;
    if (i < range.count) values[j] = scores[i];
  }
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 i = tile * cut_tile + j * cut_threads + threadIdx.x;
    if (i >= range.count) continue;
    const u32 key = device_score_key(__fmul_rn(values[j], weight));
    if constexpr (Level == 0) {
      atomicAdd(histogram + (key >> shift), 1u);
    } else {
      constexpr u32 known = cut_shift(Level - 1);
      if (key >> known == state.prefix >> known) {
        atomicAdd(histogram + (key >> shift & (bins - 1)), 1u);
      }
    }
  }
  __syncthreads();

  u32* shared_histogram = work.histogram[Level] + static_cast<u64>(unit) * bins;
  const u32 tiles = larger(1u, ceil_div(range.count, cut_tile));
  if (tiles > 1) {
#pragma unroll
    for (u32 j = 0; j < each; ++j) {
      const u32 bin = j * cut_threads + threadIdx.x;
      if (histogram[bin] != 0) atomicAdd(shared_histogram + bin, histogram[bin]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      scratch.is_last = atomicAdd(work.arrivals[Level] + unit, 1u) == tiles - 1 ? 1 : 0;
    }
    __syncthreads();
    if (scratch.is_last == 0) return;
    __threadfence();
#pragma unroll
    for (u32 j = 0; j < each; ++j) {
      const u32 bin = j * cut_threads + threadIdx.x;
      histogram[bin] = __ldcg(shared_histogram + bin);
    }
    __syncthreads();
  }

  // Suffix sums, and the digit of the safe or own cut.
  u32 count[each];
  u32 sum = 0;
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    count[j] = histogram[bins - 1 - (threadIdx.x * each + j)];
    sum += count[j];
  }
  if (threadIdx.x == 0) scratch.digit = no_digit;
  u32 total = 0;
  u32 running = block_scan<cut_threads>(sum, reinterpret_cast<u32*>(scratch.scan), total);
  u32 suffix[each];
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    const u32 bin = bins - 1 - (threadIdx.x * each + j);
    const u32 higher = running;
    running += count[j];
    suffix[j] = running;
    shared_histogram[bin] = running;
    if (state.remaining != 0 && higher < state.remaining && running >= state.remaining) {
      scratch.digit = bin;
    }
  }
  __syncthreads();
  state.digit = scratch.digit;
  if (threadIdx.x == 0) work.states[Level][unit] = state;
  if (state.mode != cut_joint) return;
  u64* group = work.group_histogram[Level] + static_cast<u64>(work.group_of(unit)) * cut_bins;
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    const u32 bin = bins - 1 - (threadIdx.x * each + j);
    u32 competing = count[j];
    if (state.digit != no_digit) {
      if (bin > state.digit) competing = 0;
      if (bin == state.digit) competing = suffix[j] - state.remaining;
    }
    if (competing != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(group + bin),
                static_cast<unsigned long long>(competing));
    }
  }
}

/// Competing candidates of a unit whose key is the group's cut `prefix | digit` exactly.
[[nodiscard]] KVLEAN_DEVICE u32 competing_ties(const CutWork& work, u32 unit, u32 digit) noexcept {
  constexpr u32 last = cut_levels - 1;
  constexpr u32 bins = bins_of(last);
  const CutState state = work.states[last][unit];
  if (state.mode != cut_joint) return 0;
  const u32* suffix = work.histogram[last] + static_cast<u64>(unit) * bins;
  const u32 higher = digit + 1 < bins ? suffix[digit + 1] : 0;
  if (state.digit == no_digit || digit < state.digit) return suffix[digit] - higher;
  return digit == state.digit ? suffix[digit] - state.remaining : 0;
}

/// With several ranks: what each segment has at the group's cut, for all ranks to add up. One block
/// a segment.
template <int = 0>
__global__ void __launch_bounds__(cut_threads) count_ties(const CutWork work) {
  __shared__ CutScratch scratch;
  wait_for_previous();
  allow_next();
  const u32 unit = blockIdx.x;
  const CutState before = work.states[cut_levels - 1][unit];
  const CutState state = advance<cut_levels - 1>(work, unit, scratch);
  if (threadIdx.x != 0) return;
  const u32 entry = unit / work.heads * work.all_heads + work.first_head + unit % work.heads;
  const bool joint = before.mode == cut_joint && state.mode == cut_joint;
  work.ties_in_group[entry] = joint ? competing_ties(work, unit, state.prefix & 1023u) : 0;
}

/// The final cut of a unit. The whole block calls; all get the same.
[[nodiscard]] KVLEAN_DEVICE FinalCut finish_cut(const CutWork& work, u32 unit,
                                                CutScratch& scratch) noexcept {
  constexpr u32 last = cut_levels - 1;
  FinalCut cut;
  const CutState state = advance<last>(work, unit, scratch);
  if (state.mode == cut_none) return cut;
  const u32 digit = state.prefix & (bins_of(last) - 1);
  const u32* suffix = work.histogram[last] + static_cast<u64>(unit) * bins_of(last);
  cut.key = state.prefix;
  cut.above = state.above;
  cut.equal = suffix[digit] - (digit + 1 < bins_of(last) ? suffix[digit + 1] : 0);
  cut.ties = state.remaining;
  if (state.mode != cut_joint) return cut;
  // Ties go to the segments of the group in order: layer, then KV head.
  const u32 pair = unit / work.heads;
  const u32 layer = pair / work.num_sequences;
  const u32 sequence = pair % work.num_sequences;
  const u32 head = unit % work.heads;
  u32 first_layer = work.across_layers ? 0 : layer;
  u64 before = 0;
  if (work.ties_in_group != nullptr) {
    const u32 earlier = (layer - first_layer) * work.all_heads + work.first_head + head;
    for (u32 i = threadIdx.x; i < earlier; i += cut_threads) {
      const u32 l = first_layer + i / work.all_heads;
      before += work.ties_in_group[(l * work.num_sequences + sequence) * work.all_heads +
                                   i % work.all_heads];
    }
  } else {
    const u32 earlier = (layer - first_layer) * work.heads + head;
    for (u32 i = threadIdx.x; i < earlier; i += cut_threads) {
      const u32 l = first_layer + i / work.heads;
      const u32 other = (l * work.num_sequences + sequence) * work.heads + i % work.heads;
      // A segment that left the competition at an earlier digit has nothing at the cut.
      before += competing_ties(work, other, digit);
    }
  }
  u64 total = 0;
  static_cast<void>(block_scan<cut_threads>(before, scratch.scan, total));
  const u64 left = state.group_remaining > total ? state.group_remaining - total : 0;
  const u32 mine = competing_ties(work, unit, digit);
  cut.ties += static_cast<u32>(smaller(u64{mine}, left));
  return cut;
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
