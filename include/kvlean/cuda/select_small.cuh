// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cluster.cuh"
#include "kvlean/cuda/emit.cuh"

// Selection for short segments in one launch: a block holds the keys of one segment in shared
// memory, a cluster is the heads of one layer of one sequence. The same passes as cut_pass() and
// emit_anchors().

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

inline constexpr u32 small_heads = 8;  // blocks of a cluster that every device allows
// Longer segments are better shared by several blocks, unless there are enough to fill the device.
inline constexpr u32 small_tokens = 16384;
inline constexpr u32 small_tokens_of_many = 49152;
inline constexpr u32 many_segments = 64;

/// Shared memory of a block, followed by the keys of its candidates.
struct SmallShared {
  LimitWork limits;  // of this cluster's heads alone
  u32 arrays[7][small_heads];
  u64 remainder[small_heads];
  CutState entry[small_heads];
  SelectRange range[small_heads];
  CutScratch scratch;
  u32 histogram[cut_bins];
  u32 competing[2][cut_bins];  // one is written while other blocks read the other
  u32 taken_before[TileMarks::runs];
  u32 equal_before[TileMarks::runs];
};
[[nodiscard]] constexpr std::size_t small_shared_bytes(u32 max_tokens) noexcept {
  return sizeof(SmallShared) + std::size_t{max_tokens} * sizeof(u32);
}

/// Whether segments of this length go this way, as far as shapes and the device's shared memory
/// say.
[[nodiscard]] inline bool fits_small(u32 segments, u32 max_tokens) noexcept {
  const u32 most = segments >= many_segments ? small_tokens_of_many : small_tokens;
  return max_tokens <= most && small_shared_bytes(max_tokens) <= most_shared_bytes();
}

/// One pass over the keys in shared memory, and the group's digit where the segment competes.
template <u32 Level>
KVLEAN_DEVICE void small_pass(SmallShared& shared, const u32* keys, u32 count, u32 heads,
                              bool group_competes, CutState& state, u32& digit) noexcept {
  constexpr u32 bins = bins_of(Level);
  constexpr u32 shift = cut_shift(Level);
  constexpr u32 each = bins / cut_threads;
  u32* histogram = shared.histogram;
#pragma unroll
  for (u32 j = 0; j < each; ++j) histogram[j * cut_threads + threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.scratch.digit = no_digit;
  __syncthreads();
  if (state.mode != cut_none) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += cut_threads) {
      const u32 key = keys[i];
      if constexpr (Level == 0) {
        atomicAdd(histogram + (key >> shift), 1u);
      } else {
        constexpr u32 known = cut_shift(Level - 1);
        if (key >> known == state.prefix >> known) {
          atomicAdd(histogram + (key >> shift & (bins - 1)), 1u);
        }
      }
    }
  }
  __syncthreads();
  u32 bin_count[each];
  u32 sum = 0;
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    bin_count[j] = histogram[bins - 1 - (threadIdx.x * each + j)];
    sum += bin_count[j];
  }
  u32 total = 0;
  u32 running = block_scan<cut_threads>(sum, reinterpret_cast<u32*>(shared.scratch.scan), total);
  u32 suffix[each];
#pragma unroll
  for (u32 j = 0; j < each; ++j) {
    const u32 bin = bins - 1 - (threadIdx.x * each + j);
    const u32 higher = running;
    running += bin_count[j];
    suffix[j] = running;
    histogram[bin] = running;
    if (state.remaining != 0 && higher < state.remaining && running >= state.remaining) {
      shared.scratch.digit = bin;
    }
  }
  __syncthreads();
  state.digit = shared.scratch.digit;
  if (group_competes) {
    u32* competing = shared.competing[Level % 2];
#pragma unroll
    for (u32 j = 0; j < each; ++j) {
      const u32 bin = bins - 1 - (threadIdx.x * each + j);
      u32 here = state.mode == cut_joint ? bin_count[j] : 0;
      if (state.digit != no_digit && here != 0) {
        if (bin > state.digit) here = 0;
        if (bin == state.digit) here = suffix[j] - state.remaining;
      }
      competing[bin] = here;
    }
    cluster_sync();
  }
  digit = 0;
  u32 bin = state.digit;
  if (state.mode == cut_joint) {
    u64 rest = 0;
    // Neighbouring threads read neighbouring bins of the other blocks, all heads at once. Nobody
    // reads the other buffer any more.
    u32* in_group = shared.competing[(Level + 1) % 2];
#pragma unroll
    for (u32 j = 0; j < each; ++j) {
      const u32 b = j * cut_threads + threadIdx.x;
      u32 sum_of_heads = 0;
#pragma unroll
      for (u32 h = 0; h < small_heads; ++h) {
        if (h < heads) sum_of_heads += of_rank(shared.competing[Level % 2], h)[b];
      }
      in_group[b] = sum_of_heads;
    }
    __syncthreads();
    find_group_digit<Level>([&](u32 b) { return u64{in_group[b]}; }, state.group_remaining,
                            shared.scratch, digit, rest);
    if (state.digit != no_digit && state.digit < digit) {
      state.mode = cut_own;
    } else {
      bin = digit;
      state.group_remaining = rest;
    }
  }
  if (state.mode != cut_none) {
    const u32 higher = bin + 1 < bins ? histogram[bin + 1] : 0;
    state.remaining = bin == state.digit ? state.remaining - higher : 0;
    state.above += higher;
    state.prefix |= bin << shift;
  }
  state.digit = no_digit;
  __syncthreads();  // the histogram has been read
}

/// Allocation and selection of one layer of one sequence. `limits` describes all of them.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    select_small(const LimitWork limits, const DeviceRagged<const float> scores,
                 const EmitWork out) {
  SmallShared& shared = *dynamic_shared<SmallShared>();
  u32* keys = reinterpret_cast<u32*>(&shared + 1);
  wait_for_previous();
  allow_next();
  const u32 heads = limits.kv_heads;
  const u32 head = cluster_rank();
  const u32 group = blockIdx.x / heads;  // layer * num_sequences + sequence
  const u32 segment = group * heads + head;
  if (threadIdx.x == 0) {
    // The same work as if this layer of this sequence were all there is; every block does it.
    LimitWork& mine = shared.limits;
    mine = limits;
    mine.arrays = {shared.arrays[0], shared.arrays[1], shared.arrays[2], shared.arrays[3],
                   shared.arrays[4], shared.arrays[5], shared.arrays[6], shared.remainder};
    mine.num_layers = 1;
    mine.num_sequences = 1;
    mine.segments += group * heads;
    mine.lengths += group * heads;
    if (limits.limit != nullptr) mine.limit += group * heads;
    mine.compete = limits.compete != nullptr ? shared.entry : nullptr;
    mine.compete_range = shared.range;
    mine.select = shared.entry;
    mine.select_range = shared.range;
  }
  __syncthreads();
  if (threadIdx.x < warp_threads) {
    const LimitWork& mine = shared.limits;
    const GroupWork<WarpTeam> work{WarpTeam{}, mine.arrays, mine.heads_of(0, 0)};
    gather_group(mine, work);
    work.each([&](u32 s) { mine.arrays.value[s] = mine.arrays.nominal[s]; });
    allocate_heads(mine, 0, 0);
  }
  __syncthreads();
  CutState state = shared.entry[head];
  const SelectRange range = shared.range[head];
  // Slots to compete for are the group's, so this is the same in every block of the cluster.
  bool group_competes = false;
  if (limits.compete != nullptr) group_competes = state.group_remaining != 0;
  const float* segment_scores = scores.segment(segment) + range.first;
  for (u32 first = 0; first < range.count; first += cut_tile) {
    float values[cut_each];
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 i = first + j * cut_threads + threadIdx.x;
      if (i < range.count) values[j] = segment_scores[i];
    }
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 i = first + j * cut_threads + threadIdx.x;
      if (i < range.count) keys[i] = device_score_key(values[j]);
    }
  }
  u32 digit = 0;
  small_pass<0>(shared, keys, range.count, heads, group_competes, state, digit);
  small_pass<1>(shared, keys, range.count, heads, group_competes, state, digit);
  small_pass<2>(shared, keys, range.count, heads, group_competes, state, digit);

  FinalCut cut;
  if (state.mode != cut_none) {
    const u32 last = state.prefix & (bins_of(2) - 1);
    cut.key = state.prefix;
    cut.above = state.above;
    cut.ties = state.remaining;
    cut.equal = shared.histogram[last] - (last + 1 < bins_of(2) ? shared.histogram[last + 1] : 0);
    if (state.mode == cut_joint) {
      u64 before = 0;
      for (u32 h = 0; h < head; ++h) before += of_rank(shared.competing[0], h)[digit];
      const u64 left = state.group_remaining > before ? state.group_remaining - before : 0;
      cut.ties += static_cast<u32>(smaller(u64{shared.competing[0][digit]}, left));
    }
  }
  if (group_competes) cluster_sync();  // the others have read this block's memory: it may end

  const bool fits = emit_length(out, segment, range, range.length, cut, true);
  TileCount before;
  for (u32 first = 0; first < range.length; first += cut_tile) {
    TileMarks marks;
    const TileCount tile = marks.mark(
        range, range.length, first, cut, [&](u32, u32 item) { return keys[item - range.first]; },
        shared.taken_before, shared.equal_before, shared.scratch.scan);
    marks.write(out, segment, range, range.length, first, cut, before, shared.taken_before,
                shared.equal_before, fits);
    before.taken += tile.taken;
    before.equal += tile.equal;
    __syncthreads();  // the runs' sums have been read
  }
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
