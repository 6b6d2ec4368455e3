// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cluster.cuh"
#include "kvlean/cuda/emit.cuh"

// Selection for short segments in one launch: a block holds the keys of one segment in shared
// memory, a cluster is the heads of one layer of one sequence. As cut_pass() and emit_anchors(),
// but in four passes of 8 bits, each decided by one warp: few barriers, and little to read in the
// other blocks' memory.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

inline constexpr u32 small_heads = 8;  // blocks of a cluster that every device allows
// Longer segments are better shared by several blocks, unless there are enough to fill the device.
inline constexpr u32 small_tokens = 16384;
inline constexpr u32 small_tokens_of_many = 49152;
inline constexpr u32 many_segments = 64;

inline constexpr u32 small_levels = 4;
inline constexpr u32 small_bins = 256;
inline constexpr u32 small_each = small_bins / warp_threads;  // bins of a lane, the highest first

/// Shared memory of a block, followed by the keys of its tokens.
struct SmallShared {
  LimitWork limits;  // of this cluster's heads alone
  u32 arrays[7][small_heads];
  u64 remainder[small_heads];
  CutState entry[small_heads];
  SelectRange range[small_heads];
  CutState state;
  FinalCut cut;
  u32 partial[2][cut_threads / warp_threads];
  alignas(16) u32 histogram[small_levels][small_bins];
  alignas(16) u32 competing[2][small_bins];  // one is written while other blocks read the other
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

/// A lane's bins of a histogram in shared memory, the highest first.
KVLEAN_DEVICE void load_bins(const u32* histogram, u32 (&count)[small_each]) noexcept {
  static_assert(small_each == 8);
  const uint4* from = reinterpret_cast<const uint4*>(
      histogram + (small_bins - small_each * (threadIdx.x % warp_threads + 1)));
  const uint4 low = from[0];
  const uint4 high = from[1];
  const u32 words[small_each] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
#pragma unroll
  for (u32 j = 0; j < small_each; ++j) count[j] = words[j];
}

/// Where a running sum over the bins, from the highest, reaches `wanted`: the same in all lanes.
struct ReachedBin {
  bool found = false;
  u32 bin = 0;
  u32 higher = 0;  ///< sum of the bins above
  u32 here = 0;    ///< of the bin
};
[[nodiscard]] KVLEAN_DEVICE ReachedBin reach(const u32 (&count)[small_each], u64 wanted) noexcept {
  u32 sum = 0;
#pragma unroll
  for (u32 j = 0; j < small_each; ++j) sum += count[j];
  const u32 lane = threadIdx.x % warp_threads;
  u32 running = warp_scan(sum) - sum;
  ReachedBin mine;
#pragma unroll
  for (u32 j = 0; j < small_each; ++j) {
    if (running < wanted && u64{running} + count[j] >= wanted) {
      mine = {true, small_bins - 1 - lane * small_each - j, running, count[j]};
    }
    running += count[j];
  }
  const u32 owners = __ballot_sync(full_warp, mine.found);
  const u32 owner = owners != 0 ? static_cast<u32>(__ffs(owners)) - 1 : 0;
  return {owners != 0, __shfl_sync(full_warp, mine.bin, owner),
          __shfl_sync(full_warp, mine.higher, owner), __shfl_sync(full_warp, mine.here, owner)};
}

/// One pass over the candidates' keys in shared memory. Leaves the new state in shared memory,
/// after the last pass the cut. The histogram is zero before.
template <u32 Level>
KVLEAN_DEVICE void small_pass(SmallShared& shared, const u32* keys, u32 count, u32 heads, u32 head,
                              bool group_competes, CutState& state) noexcept {
  constexpr u32 shift = 24 - 8 * Level;
  u32* histogram = shared.histogram[Level];
  if (state.mode != cut_none) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += cut_threads) {
      const u32 key = keys[i];
      // Above the digit: what is decided.
      if (Level == 0 || (key ^ state.prefix) >> (shift + 7) >> 1 == 0) {
        atomicAdd(histogram + (key >> shift & (small_bins - 1)), 1u);
      }
    }
  }
  __syncthreads();
  const bool decides = threadIdx.x < warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  u32 mine[small_each];
  ReachedBin own;
  u32* competing = shared.competing[Level % 2];
  if (decides) {
    load_bins(histogram, mine);
    if (state.mode != cut_none && state.remaining != 0) own = reach(mine, state.remaining);
    if (group_competes) {
#pragma unroll
      for (u32 j = 0; j < small_each; ++j) {
        const u32 bin = small_bins - 1 - lane * small_each - j;
        u32 here = state.mode == cut_joint ? mine[j] : 0;
        if (own.found && bin > own.bin) here = 0;
        if (own.found && bin == own.bin && here != 0) {
          here = own.higher + own.here - state.remaining;
        }
        competing[bin] = here;
      }
    }
  }
  if (group_competes) cluster_sync();
  if (decides && state.mode != cut_none) {
    ReachedBin at = own;  // the segment's cut in this pass
    if (state.mode == cut_joint) {
      u32 of_group[small_each] = {};
#pragma unroll
      for (u32 h = 0; h < small_heads; ++h) {
        if (h >= heads) continue;
        u32 other[small_each];
        load_bins(of_rank(competing, h), other);
#pragma unroll
        for (u32 j = 0; j < small_each; ++j) of_group[j] += other[j];
      }
      const ReachedBin group = reach(of_group, state.group_remaining);
      const u32 digit = group.found ? group.bin : 0;
      if (own.found && own.bin < digit) {
        state.mode = cut_own;
      } else {
        if (group.found) state.group_remaining -= group.higher;
        // What the segment has above the group's digit, and there.
        u32 higher = 0;
        u32 here = 0;
#pragma unroll
        for (u32 j = 0; j < small_each; ++j) {
          const u32 bin = small_bins - 1 - lane * small_each - j;
          higher += bin > digit ? mine[j] : 0;
          here += bin == digit ? mine[j] : 0;
        }
        at = {true, digit, warp_sum(higher), warp_sum(here)};
      }
    }
    state.remaining = own.found && at.bin == own.bin ? state.remaining - at.higher : 0;
    state.above += at.higher;
    state.prefix |= at.bin << shift;
    if constexpr (Level == small_levels - 1) {
      u32 ties = state.remaining;
      if (state.mode == cut_joint) {
        // Ties go to the heads in order.
        const u32 there = lane <= head ? of_rank(competing, lane)[at.bin] : 0;
        const u64 before = warp_sum(lane < head ? there : 0);
        const u64 left = state.group_remaining > before ? state.group_remaining - before : 0;
        ties += static_cast<u32>(smaller(u64{__shfl_sync(full_warp, there, head)}, left));
      }
      if (lane == 0) shared.cut = FinalCut{state.prefix, ties, state.above, at.here};
    }
    if (lane == 0) shared.state = state;
  }
  __syncthreads();
  if (state.mode != cut_none) state = shared.state;
}

/// Writes a segment's anchors: as TileMarks, with neighbouring items in a thread.
KVLEAN_DEVICE void emit_small(SmallShared& shared, const EmitWork& out, u32 segment,
                              const SelectRange& range, const FinalCut& cut, const u32* keys,
                              bool fits) noexcept {
  constexpr u32 warps = cut_threads / warp_threads;
  static_assert(warps <= warp_threads && cut_each == 8);
  const u32 lane = threadIdx.x % warp_threads;
  const u32 warp = threadIdx.x / warp_threads;
  const u32 skipped_ties = cut.key == 0 ? cut.equal - cut.ties : 0;  // of NaN, the oldest go
  u32* anchor = out.anchor + u64{segment} * out.slot_stride;
  const u64 row = u64{segment} * out.token_stride;
  u32 all_taken = 0;
  u32 all_equal = 0;
  for (u32 first = 0; first < range.length; first += cut_tile) {
    const u32 begin = first + threadIdx.x * cut_each;
    u32 taken = 0;
    u32 equal = 0;
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 item = begin + j;
      if (item >= range.length) continue;
      const bool competes = item - range.first < range.count;
      const u32 key = keys[item];
      if (!competes || key > cut.key) taken |= 1u << j;
      if (competes && key == cut.key) equal |= 1u << j;
    }
    // Both counts of a tile fit 16 bits.
    static_assert(cut_tile < 0x10000);
    const u32 own = static_cast<u32>(__popc(taken)) << 16 | static_cast<u32>(__popc(equal));
    const u32 inclusive = warp_scan(own);
    u32* partial = shared.partial[first / cut_tile % 2];
    if (lane == warp_threads - 1) partial[warp] = inclusive;
    __syncthreads();
    const u32 part = warp_scan(lane < warps ? partial[lane] : 0);
    const u32 total = __shfl_sync(full_warp, part, warps - 1);
    const u32 earlier = __shfl_sync(full_warp, part, warp != 0 ? warp - 1 : 0);
    const u32 before = (warp != 0 ? earlier : 0) + inclusive - own;
    u32 taken_rank = all_taken + (before >> 16);
    u32 equal_rank = all_equal + (before & 0xffffu);
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 item = begin + j;
      if (item >= range.length) continue;
      const u32 tie = equal_rank - skipped_ties;  // wraps for those skipped
      const bool is_equal = (equal >> j & 1) != 0;
      const bool takes = (taken >> j & 1) != 0 || (is_equal && tie < cut.ties);
      const u32 slot = taken_rank + (equal_rank < skipped_ties ? 0 : smaller(tie, cut.ties));
      if (takes && fits) anchor[slot] = item;
      if (out.keep != nullptr) out.keep[row + item] = takes ? 1 : 0;
      if (out.slot_of != nullptr) out.slot_of[row + item] = takes ? slot : 0xffffffffu;
      taken_rank += taken >> j & 1;
      equal_rank += equal >> j & 1;
    }
    all_taken += total >> 16;
    all_equal += total & 0xffffu;
  }
}

/// Allocation and selection of one layer of one sequence. `limits` describes all of them.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    select_small(const LimitWork limits, const DeviceRagged<const float> scores,
                 const EmitWork out) {
  SmallShared& shared = *dynamic_shared<SmallShared>();
  u32* keys = reinterpret_cast<u32*>(&shared + 1);
  const u32 heads = limits.kv_heads;
  const u32 head = cluster_rank();
  const u32 group = blockIdx.x / heads;  // layer * num_sequences + sequence
  const u32 segment = group * heads + head;
  u32* histograms = &shared.histogram[0][0];
#pragma unroll
  for (u32 i = threadIdx.x; i < small_levels * small_bins; i += cut_threads) histograms[i] = 0;
  wait_for_previous();
  allow_next();
  if (threadIdx.x < warp_threads) {
    LimitWork& mine = shared.limits;
    if (threadIdx.x == 0) {
      // The same work as if this layer of this sequence were all there is; every block does it.
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
    __syncwarp();
    const GroupWork<WarpTeam> work{WarpTeam{}, mine.arrays, mine.heads_of(0, 0)};
    gather_group(mine, work);
    work.each([&](u32 s) { mine.arrays.value[s] = mine.arrays.nominal[s]; });
    allocate_heads(mine, 0, 0);
  } else {
    // Meanwhile the other warps read the scores.
    constexpr u32 readers = cut_threads - warp_threads;
    const u32 length = limits.lengths[segment];
    const float* segment_scores = scores.segment(segment);
    for (u32 first = threadIdx.x - warp_threads; first < length; first += readers * cut_each) {
      float values[cut_each];
#pragma unroll
      for (u32 j = 0; j < cut_each; ++j) {
        const u32 i = first + j * readers;
        if (i < length) values[j] = segment_scores[i];
      }
#pragma unroll
      for (u32 j = 0; j < cut_each; ++j) {
        const u32 i = first + j * readers;
        if (i < length) keys[i] = device_score_key(values[j]);
      }
    }
  }
  __syncthreads();
  CutState state = shared.entry[head];
  const SelectRange range = shared.range[head];
  // Slots to compete for are the group's, so this is the same in every block of the cluster.
  bool group_competes = false;
  if (limits.compete != nullptr) group_competes = state.group_remaining != 0;
  const u32* candidates = keys + range.first;
  small_pass<0>(shared, candidates, range.count, heads, head, group_competes, state);
  small_pass<1>(shared, candidates, range.count, heads, head, group_competes, state);
  small_pass<2>(shared, candidates, range.count, heads, head, group_competes, state);
  small_pass<3>(shared, candidates, range.count, heads, head, group_competes, state);
  const FinalCut cut = state.mode != cut_none ? shared.cut : FinalCut{};
  const bool fits = emit_length(out, segment, range, range.length, cut, true);
  emit_small(shared, out, segment, range, cut, keys, fits);
  if (group_competes) cluster_sync();  // the others have read this block's memory: it may end
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
