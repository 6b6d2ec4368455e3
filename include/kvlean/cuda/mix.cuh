// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cut.cuh"

// What Ada-KV does after its competition where the cut alone is not the answer: the safeguards that
// mix with the uniform share, and scores that were scaled for the competition only.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

/// Candidates that each segment won, safe ones included. One block a segment.
template <int = 0>
__global__ void __launch_bounds__(cut_threads) count_won(const CutWork work, u32* won) {
  __shared__ CutScratch scratch;
  wait_for_previous();
  allow_next();
  const u32 unit = blockIdx.x;
  const FinalCut cut = finish_cut(work, unit, scratch);
  if (threadIdx.x == 0) {
    won[unit / work.heads * work.all_heads + work.first_head + unit % work.heads] =
        cut.above + cut.ties;
  }
}

/// The authors_mix(), exact_mix() and hard_floor() of allocate/, with `won` by entry of all ranks.
template <class Team>
KVLEAN_DEVICE void mix_group(const LimitWork& work, const GroupWork<Team>& group,
                             const u32* won) noexcept {
  const GroupArrays& a = work.arrays;
  const SelectOptions& options = work.options;
  const bool hard =
      options.allocator == AllocatorKind::adakv_layers || options.mode == SafeguardMode::hard_floor;
  if (hard) {
    group.each([&](u32 s) { a.value[s] = a.covered[s] + won[s]; });
    return;
  }
  const auto competing = [&](u32 s) { return a.value[s] - a.covered[s]; };
  const u64 slots = group.sum_of([&](u32 s) { return u64{competing(s)}; });
  const u64 candidates = group.sum_of([&](u32 s) { return u64{a.high[s] - a.covered[s]}; });
  if (slots == candidates) return;  // everything is kept
  if (options.mode == SafeguardMode::authors_mix) {
    group.each([&](u32 s) {
      const float adaptive = __fmul_rn(__uint2float_rn(won[s]), __fsub_rn(1.0f, options.safeguard));
      const float mix = __fadd_rn(
          adaptive, __uint2float_rn(device_scaled_slots(competing(s), options.safeguard)));
      const float whole = floorf(mix);
      u32 kept = static_cast<u32>(whole);
      const float rest = __fsub_rn(mix, whole);
      if (rest > 0.5f || (rest == 0.5f && kept % 2 == 1)) ++kept;
      kept += a.covered[s];
      a.value[s] = larger(a.low[s], smaller(kept, a.high[s]));
    });
    return;
  }
  constexpr u64 one = u64{1} << 30;
  const u64 part =
      static_cast<u64>(__dmul_rn(static_cast<double>(options.safeguard), static_cast<double>(one)));
  const u64 uniform = options.mode == SafeguardMode::exact_mix ? part : one - part;
  const u64 total = group.total();
  u64 whole = 0;
  for (u32 i = group.team.rank(); i < group.scope.count; i += group.team.size()) {
    const u32 s = group.scope.at(i);
    const u64 quota = (one - uniform) * won[s] + uniform * competing(s);
    a.remainder[s] = quota % one;
    a.value[s] = a.covered[s] + static_cast<u32>(quota / one);
    whole += quota / one;
  }
  whole = group.team.sum(whole);
  group.team.sync();
  group.serve_remainders(slots - whole, true);
  group.fit_total(total);
}

/// Limits after a competition, and what the selection starts with. A warp works on a layer of a
/// sequence: no safeguard spans layers but the hard floor, which is of each segment.
template <int = 0>
__global__ void __launch_bounds__(limit_threads)
    finish_limits(const LimitWork work, const u32* won) {
  wait_for_previous();
  allow_next();
  if (blockIdx.x >= work.group_blocks) {
    const u64 step = u64{gridDim.x - work.group_blocks} * limit_threads;
    for (u64 i = u64{blockIdx.x - work.group_blocks} * limit_threads + threadIdx.x;
         i < work.zero_16; i += step) {
      work.zero[i] = uint4{0, 0, 0, 0};
    }
    return;
  }
  const u32 pair = blockIdx.x * (limit_threads / warp_threads) + threadIdx.x / warp_threads;
  if (pair >= work.num_layers * work.num_sequences) return;
  const u32 layer = pair / work.num_sequences;
  const u32 sequence = pair % work.num_sequences;
  const GroupWork<WarpTeam> group{WarpTeam{}, work.arrays, work.heads_of(layer, sequence)};
  mix_group(work, group, won);
  finish_layer(work, layer, sequence, group);
}

/// AdaKVAllocator::normalize: a head's weight times the share of its sum that its best hold. The
/// sums run in token order in double, as on the CPU, by one thread of each block while the others
/// fetch: the same bits, at a few nanoseconds a token. One block a segment.
template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    normalize_weights(const CutWork work, float* weight) {
  __shared__ CutScratch scratch;
  __shared__ float tile[cut_tile];
  wait_for_previous();
  allow_next();
  const u32 unit = blockIdx.x;
  const FinalCut cut = finish_cut(work, unit, scratch);
  const SelectRange range = work.range[unit];
  const float* scores = work.scores.segment(unit) + range.first;
  const float factor = work.weight_of(unit);
  double best = 0.0;
  double sum = 0.0;
  u32 ties = cut.ties;
  for (u32 begin = 0; begin < range.count; begin += cut_tile) {
    const u32 count = smaller(cut_tile, range.count - begin);
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += cut_threads) tile[i] = scores[begin + i];
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (u32 i = 0; i < count; ++i) {
      const float score = tile[i];
      if (!(score == score)) continue;
      sum += static_cast<double>(score);
      const u32 key = device_score_key(__fmul_rn(score, factor));
      const bool tied = key == cut.key && ties > 0;
      if (tied) --ties;
      if (tied || key > cut.key) best += static_cast<double>(score);
    }
  }
  if (threadIdx.x != 0) return;
  const bool finite = sum > 0.0 && sum <= 1.7976931348623157e308;
  if (finite && best >= 0.0) {
    weight[unit] = __fmul_rn(factor, static_cast<float>(__ddiv_rn(best, sum)));
  }
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
