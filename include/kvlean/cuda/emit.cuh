// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cut.cuh"

// From a cut to ascending anchors, in one pass: every block says how many of its tile it takes, and
// adds up what the blocks before it in the same segment have said.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {

/// Everything emit_anchors takes besides the cut, by value.
struct EmitWork {
  u64* announced = nullptr;  ///< [units][tiles], zeroed
  u32 tiles = 0;             ///< of cut_tile items, protected ones included, of the longest unit
  u32 fan = 1;               ///< segments a unit stands for
  u32 item_tokens = 1;       ///< tokens of an item: 1, or of a page
  u32* limit = nullptr;      ///< [segments] written where the competition's cut is the selection's
  u32* length = nullptr;     ///< [segments] of the plan
  u32* anchor = nullptr;
  u64 slot_stride = 0;
  u32 max_slots = 0;
  u8* keep = nullptr;  ///< [segments][token_stride] 1 for kept tokens, or null
  u32* slot_of =
      nullptr;  ///< [segments][token_stride] slot of a kept token, else 0xffffffff, or null
  u64 token_stride = 0;
  ErrorWord error = nullptr;
};

/// Sums over one or more tiles of a unit.
struct TileCount {
  u32 taken = 0;  ///< protected, or above the cut
  u32 equal = 0;  ///< at the cut
};

/// Waits for what the earlier tiles of a unit announce. They are blocks of lower index, which the
/// hardware starts first. The whole block calls.
[[nodiscard]] KVLEAN_DEVICE TileCount sum_announced(const u64* announced, u32 tiles,
                                                    u64* scan) noexcept {
  u64 sum = 0;
  for (u32 i = threadIdx.x; i < tiles; i += cut_threads) {
    const volatile u64* place = announced + i;
    u64 word = *place;
    while (word == 0) word = *place;
    sum += word & 0x7fffffffffffffffull;
  }
  u64 total = 0;
  static_cast<void>(block_scan<cut_threads>(sum, scan, total));
  return {static_cast<u32>(total >> 32), static_cast<u32>(total)};
}

/// One tile of a unit, in a block's registers and shared memory.
struct TileMarks {
  static constexpr u32 warps = cut_threads / warp_threads;
  static constexpr u32 runs = cut_each * warps;  ///< of 32 items

  u32 taken_mask[cut_each];  ///< protected, or above the cut; a bit for each lane
  u32 equal_mask[cut_each];  ///< at the cut

  /// Marks the items [first_item, + cut_tile) and leaves in `taken_before` and `equal_before`
  /// [runs] (shared memory) what the tile has before each run. key_of(j, item) is asked for
  /// candidates only. Returns the tile's sums. The whole block calls.
  template <class KeyOf>
  [[nodiscard]] KVLEAN_DEVICE TileCount mark(const SelectRange& range, u32 items, u32 first_item,
                                             const FinalCut& cut, KeyOf&& key_of, u32* taken_before,
                                             u32* equal_before, u64* scan) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 warp = threadIdx.x / warp_threads;
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 item = first_item + j * cut_threads + threadIdx.x;
      bool taken = item < items;
      bool equal = false;
      if (item - range.first < range.count) {
        const u32 key = key_of(j, item);
        taken = key > cut.key;
        equal = key == cut.key;
      }
      taken_mask[j] = __ballot_sync(full_warp, taken);
      equal_mask[j] = __ballot_sync(full_warp, equal);
      if (lane == 0) {
        taken_before[j * warps + warp] = __popc(taken_mask[j]);
        equal_before[j * warps + warp] = __popc(equal_mask[j]);
      }
    }
    __syncthreads();
    static_assert(runs <= cut_threads);
    const bool has_run = threadIdx.x < runs;
    const u64 pair =
        has_run ? static_cast<u64>(taken_before[threadIdx.x]) << 32 | equal_before[threadIdx.x] : 0;
    u64 total = 0;
    const u64 earlier = block_scan<cut_threads>(pair, scan, total);
    if (has_run) {
      taken_before[threadIdx.x] = static_cast<u32>(earlier >> 32);
      equal_before[threadIdx.x] = static_cast<u32>(earlier);
    }
    __syncthreads();
    return {static_cast<u32>(total >> 32), static_cast<u32>(total)};
  }

  /// Writes what the tile keeps. `before`: what the tiles before it have.
  KVLEAN_DEVICE void write(const EmitWork& out, u32 unit, const SelectRange& range, u32 items,
                           u32 first_item, const FinalCut& cut, const TileCount& before,
                           const u32* taken_before, const u32* equal_before,
                           bool fits) const noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 warp = threadIdx.x / warp_threads;
    const u32 lanes_before = (1u << lane) - 1;
    const u32 skipped_ties = cut.key == 0 ? cut.equal - cut.ties : 0;  // of NaN, the oldest go
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      const u32 item = first_item + j * cut_threads + threadIdx.x;
      if (item >= items) continue;
      const u32 run = j * warps + warp;
      const u32 taken_rank =
          before.taken + taken_before[run] + __popc(taken_mask[j] & lanes_before);
      const u32 equal_rank =
          before.equal + equal_before[run] + __popc(equal_mask[j] & lanes_before);
      const u32 tie = equal_rank - skipped_ties;  // wraps for those skipped
      const bool taken =
          (taken_mask[j] >> lane & 1) != 0 || ((equal_mask[j] >> lane & 1) != 0 && tie < cut.ties);
      const u32 ties_before = equal_rank < skipped_ties ? 0 : smaller(tie, cut.ties);
      const u32 first_token = item * out.item_tokens;
      const u32 tokens = smaller(out.item_tokens, range.length - first_token);
      const u32 first_slot = (taken_rank + ties_before) * out.item_tokens;
      for (u32 f = 0; f < out.fan; ++f) {
        const u64 segment = static_cast<u64>(unit) * out.fan + f;
        u32* anchor = out.anchor + segment * out.slot_stride + first_slot;
        for (u32 t = 0; t < tokens; ++t) {
          if (taken && fits) anchor[t] = first_token + t;
          const u64 place = segment * out.token_stride + first_token + t;
          if (out.keep != nullptr) out.keep[place] = taken ? 1 : 0;
          if (out.slot_of != nullptr) out.slot_of[place] = taken ? first_slot + t : 0xffffffffu;
        }
      }
    }
  }
};

/// Writes a unit's count to its segments; false where the plan has no room for it. The whole block
/// calls; `writes` for one block of a unit.
KVLEAN_DEVICE bool emit_length(const EmitWork& out, u32 unit, const SelectRange& range, u32 items,
                               const FinalCut& cut, bool writes) noexcept {
  u32 kept = (items - range.count + cut.above + cut.ties) * out.item_tokens;
  if (out.item_tokens > 1 && items != 0) {
    kept -= items * out.item_tokens - range.length;  // a partly filled last page is protected
  }
  const bool fits = kept <= out.max_slots;
  if (writes) {
    if (threadIdx.x == 0 && !fits) report(out.error, StatusCode::destination_too_small);
    for (u32 f = threadIdx.x; f < out.fan; f += cut_threads) {
      out.length[unit * out.fan + f] = fits ? kept : 0;
      if (out.limit != nullptr) out.limit[unit * out.fan + f] = kept;
    }
  }
  return fits;
}

template <int = 0>
__global__ void __launch_bounds__(cut_threads)
    emit_anchors(const CutWork work, const EmitWork out) {
  __shared__ CutScratch scratch;
  __shared__ u32 taken_before[TileMarks::runs];
  __shared__ u32 equal_before[TileMarks::runs];
  wait_for_previous();
  allow_next();
  const u32 unit = blockIdx.x / out.tiles;
  const u32 tile = blockIdx.x % out.tiles;
  const u32 first_item = tile * cut_tile;
  const SelectRange range = work.range[unit];
  const u32 items = ceil_div(range.length, out.item_tokens);
  if (tile != 0 && first_item >= items) return;
  const FinalCut cut = finish_cut(work, unit, scratch);
  const float* scores = work.scores.segment(unit);
  const float weight = work.weight_of(unit);
  float values[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 item = first_item + j * cut_threads + threadIdx.x;
    if (item - range.first < range.count) values[j] = scores[item];
  }
  TileMarks marks;
  const TileCount mine = marks.mark(
      range, items, first_item, cut,
      [&](u32 j, u32) { return device_score_key(__fmul_rn(values[j], weight)); }, taken_before,
      equal_before, scratch.scan);
  u64* announced = out.announced + static_cast<u64>(unit) * out.tiles;
  if (items > cut_tile && threadIdx.x == 0) {
    *reinterpret_cast<volatile u64*>(announced + tile) =
        u64{1} << 63 | static_cast<u64>(mine.taken) << 32 | mine.equal;
  }
  TileCount before;
  if (tile != 0) before = sum_announced(announced, tile, scratch.scan);
  const bool fits = emit_length(out, unit, range, items, cut, tile == 0);
  marks.write(out, unit, range, items, first_item, cut, before, taken_before, equal_before, fits);
}

/// Scores that the heads of a layer share: per item the mean over the heads, NaN heads left out,
/// and over a whole page the mean of that. As mean_over_heads() and select_pages() of
/// reduce/selection.hpp: the same sums in the same order. Reports shape_mismatch where heads don't
/// hold the same tokens.
struct MeanWork {
  DeviceRagged<const float> scores;  ///< by segment
  const u32* lengths = nullptr;
  const Segment* segments = nullptr;
  bool has_positions = false;
  u32 heads = 0;
  u32 item_tokens = 1;
  u32 max_items = 0;
  float* mean = nullptr;  ///< [units][max_items]
  ErrorWord error = nullptr;
};

template <int = 0>
__global__ void __launch_bounds__(256) mean_scores(const MeanWork work) {
  wait_for_previous();
  allow_next();
  const u32 blocks = ceil_div(work.max_items, 256u);
  const u32 unit = blockIdx.x / blocks;
  const u32 item = blockIdx.x % blocks * 256 + threadIdx.x;
  const u32 first = unit * work.heads;
  u32 length = work.lengths[first];
  for (u32 h = 1; h < work.heads; ++h) length = smaller(length, work.lengths[first + h]);
  const u32 begin = item * work.item_tokens;
  if (item >= work.max_items || begin >= length) return;
  const u32 tokens = smaller(work.item_tokens, length - begin);
  bool same = true;
  double sum = 0.0;
  float mean = 0.0f;
  for (u32 t = begin; t < begin + tokens; ++t) {
    double heads_sum = 0.0;
    u32 usable = 0;
    for (u32 h = 0; h < work.heads; ++h) {
      const float value = work.scores.segment(first + h)[t];
      if (value == value) {
        heads_sum += static_cast<double>(value);
        ++usable;
      }
      if (work.has_positions && h != 0) {
        same = same && work.segments[first].position(t) == work.segments[first + h].position(t);
      }
    }
    mean = usable != 0 ? static_cast<float>(heads_sum / static_cast<double>(usable))
                       : __int_as_float(0x7fc00000);
    sum += static_cast<double>(mean);
  }
  if (work.item_tokens > 1) mean = static_cast<float>(sum / static_cast<double>(work.item_tokens));
  work.mean[static_cast<u64>(unit) * work.max_items + item] = mean;
  if (!same) report(work.error, StatusCode::shape_mismatch);
}

}  // namespace detail

KVLEAN_CUDA_NAMESPACE_END
