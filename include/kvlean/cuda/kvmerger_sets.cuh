// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/cuda/load_store.cuh"
#include "kvlean/cuda/merge_tile.cuh"
#include "kvlean/reduce/kvmerger_options.hpp"

// KVMerger's merging sets: reduce/merging_sets.hpp for all segments at once. A set is a maximal run
// of linked neighbours, so a token begins one where the link before it is missing, and its place
// among the sets is the tokens before it less the links and the evicted tokens before it: counts
// that tiles add up as emit_anchors does.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

enum TokenState : u8 {
  token_free = 0,
  token_alone = 1,    ///< never merges
  token_evicted = 2,  ///< its score is NaN and something must go
};

/// What is known of one unit: a segment, or the heads of a layer that share their sets.
struct alignas(16) SetUnit {
  u32 length = 0;
  u32 limit = 0;
  u32 excess = 0;        ///< tokens that must go; 0 where sets need not fit the limit
  u32 limited = 0;       ///< sets above the limit are evicted
  u32 by_threshold = 0;  ///< else the best links are taken
  u32 active = 0;        ///< its sets are to be formed
  u32 protected_front = 0;
  u32 protected_back = 0;
  u32 evicted = 0;  ///< tokens
  u32 alone = 0;    ///< tokens that never merge
  u32 links = 0;
  u32 sets = 0;  ///< before any is evicted
  u32 free_sets = 0;
  u32 gone = 0;  ///< sets that are evicted
};

inline constexpr u32 protected_set = 0x80000000u;

/// Everything the kernels that form sets take, by value.
struct SetWork {
  // Options.
  Protection protection = {};
  KVMergerForm form = KVMergerForm::slots;
  float epsilon = 0.0f;
  bool enforce_limit = true;
  bool is_mass = false;
  bool whole_pages = false;  ///< links above epsilon between tokens that are not protected
  bool again = false;        ///< second run: slot form for units that are not as long as others
  double recent_fraction = -1.0;
  double heavy_fraction = -1.0;
  i64 recent_tokens = -1;
  i64 heavy_tokens = -1;
  // The cache.
  CacheView cache;
  u32 heads_per_unit = 1;
  u32 units = 0;
  u32 tiles = 0;                    ///< of the longest unit
  const u32* limit = nullptr;       ///< [segments]
  DeviceRagged<const float> score;  ///< by unit
  // Per unit.
  SetUnit* unit = nullptr;
  u32* most = nullptr;  ///< second run: [units] sets of the group's largest
  // Per unit and tile, zeroed but for the last two.
  u64* announced_marks = nullptr;
  u64* announced_nan = nullptr;
  u64* announced_links = nullptr;
  u64* announced_sets = nullptr;
  u32* alone_before = nullptr;
  u32* evicted_before = nullptr;
  // Per unit and token.
  u64 stride = 0;
  u8* state = nullptr;
  float* cosine = nullptr;     ///< of a token's key with the next one's, by unit
  float* link = nullptr;       ///< the same where the two may merge, else NaN
  u32* set_begin = nullptr;    ///< first token of each set
  u32* set_links = nullptr;    ///< links before it; one entry more than sets
  u32* set_free = nullptr;     ///< free sets before it; protected_set where it is not free
  u32* pivot = nullptr;        ///< of each set
  float* set_score = nullptr;  ///< of each free set
  // Selections.
  CutArrays heavy;
  CutArrays best_links;
  CutArrays best_sets;
  uint4* zero = nullptr;
  u64 zero_16 = 0;
  u32 unit_blocks = 0;
  ErrorWord error = nullptr;

  [[nodiscard]] KVLEAN_DEVICE u32 segment_of(u32 u) const noexcept { return u * heads_per_unit; }
  [[nodiscard]] KVLEAN_DEVICE u64 at(u32 u, u32 token) const noexcept { return u * stride + token; }
};

/// kvmerger_preset() and KVMergerReducer::soft_protection().
[[nodiscard]] KVLEAN_DEVICE KVMergerCounts device_soft_protection(const SetWork& work, u32 length,
                                                                  u32 limit) noexcept {
  const double kept = __ddiv_rn(static_cast<double>(limit), static_cast<double>(length));
  double recent = 0.17;
  double heavy = 0.12;
  if (!(kept >= 0.5)) {
    if (kept >= 0.35) {
      const double place = __ddiv_rn(__dsub_rn(kept, 0.35), 0.15);
      recent = __dadd_rn(0.08, __dmul_rn(place, 0.09));
      heavy = __dadd_rn(0.02, __dmul_rn(place, 0.10));
    } else {
      const double share = kept > 0.0 ? __ddiv_rn(kept, 0.35) : 0.0;
      recent = __dmul_rn(0.08, share);
      heavy = __dmul_rn(0.02, share);
    }
  }
  const double all = static_cast<double>(length);
  const auto count = [&](i64 tokens, double fraction, double fallback) {
    const double wanted =
        tokens >= 0 ? static_cast<double>(tokens)
                    : floor(__dadd_rn(__dmul_rn(fraction >= 0.0 ? fraction : fallback, all), 1e-9));
    return static_cast<u32>(smaller(wanted, all));
  };
  return {count(work.recent_tokens, work.recent_fraction, recent),
          count(work.heavy_tokens, work.heavy_fraction, heavy)};
}

/// Limits, protected ranges, and what the selection of heavy hitters starts with; other blocks
/// zero.
template <int = 0>
__global__ void __launch_bounds__(256) start_sets(const SetWork work) {
  wait_for_previous();
  allow_next();
  if (blockIdx.x >= work.unit_blocks) {
    const u64 step = u64{gridDim.x - work.unit_blocks} * 256;
    for (u64 i = u64{blockIdx.x - work.unit_blocks} * 256 + threadIdx.x; i < work.zero_16;
         i += step) {
      work.zero[i] = uint4{0, 0, 0, 0};
    }
    return;
  }
  const u32 u = blockIdx.x * 256 + threadIdx.x;
  if (u >= work.units) return;
  SetUnit unit;
  CutState heavy_state;
  SelectRange range;
  const u32 segment = work.segment_of(u);
  const u32 frozen = work.cache.segments[segment].frozen;
  const u32 given_limit = work.limit[segment];
  unit.length = work.cache.lengths[segment];
  for (u32 h = 1; h < work.heads_per_unit; ++h) {
    const u32 other = work.cache.lengths[segment + h];
    if (other != unit.length) report(work.error, StatusCode::shape_mismatch);
    unit.length = smaller(unit.length, other);
  }
  if (work.again) {
    const SetUnit before = work.unit[u];
    const u32 most = work.most[u];
    if (before.sets - before.gone == most) {
      unit = before;
      unit.active = 0;
      work.unit[u] = unit;
      work.heavy.entry[u] = heavy_state;
      work.heavy.range[u] = range;
      work.best_links.entry[u] = heavy_state;
      work.best_links.range[u] = range;
      // Its sets stay as they are: the same selection again.
      range.length = range.count = before.free_sets;
      if (before.gone != 0) heavy_state.remaining = before.free_sets - before.gone;
      heavy_state.mode = heavy_state.remaining != 0 ? cut_own : cut_none;
      work.best_sets.entry[u] = heavy_state;
      work.best_sets.range[u] = range;
      return;
    }
    unit.limit = most;
  } else {
    unit.limit = given_limit;
  }
  unit.active = 1;
  const bool slots = work.form == KVMergerForm::slots || work.again;
  unit.by_threshold = slots && !work.whole_pages ? 0 : 1;
  unit.limited = (slots || work.enforce_limit) && !work.whole_pages ? 1 : 0;
  Protection both = work.protection;
  u32 heavy = 0;
  if (unit.length != 0 && !work.whole_pages) {
    const KVMergerCounts soft = device_soft_protection(work, unit.length, given_limit);
    if (soft.recent > both.recent) {
      const u32 hard = ProtectedRange::of(work.protection, unit.length, frozen).count(unit.length);
      const u32 room = unit.limit > hard ? unit.limit - hard : 0;
      both.recent += smaller(soft.recent - both.recent, room);
    }
    const ProtectedRange marked = ProtectedRange::of(both, unit.length, frozen);
    const u32 total = marked.count(unit.length);
    heavy = smaller(smaller(soft.heavy, marked.candidates()),
                    unit.limit > total ? unit.limit - total : 0);
    if (unit.limited != 0) unit.excess = unit.length - smaller(unit.limit, unit.length);
  }
  const ProtectedRange marked = ProtectedRange::of(both, unit.length, frozen);
  unit.protected_front = marked.front;
  unit.protected_back = marked.back;
  range.first = marked.front;
  range.count = marked.candidates();
  range.length = unit.length;
  heavy_state.remaining = heavy;
  heavy_state.mode = heavy != 0 ? cut_own : cut_none;
  work.unit[u] = unit;
  work.heavy.entry[u] = heavy_state;
  work.heavy.range[u] = range;
}

/// State of each token, and what the selection of links starts with. Selects: heavy hitters were
/// looked for.
template <bool Selects>
__global__ void __launch_bounds__(cut_threads)
    mark_tokens(const CutWork cut_work, const SetWork work) {
  __shared__ CutScratch scratch;
  __shared__ u64 before[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 u = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const u32 first_token = tile * cut_tile;
  const SetUnit unit = work.unit[u];
  if (unit.active == 0 || (tile != 0 && first_token >= unit.length)) return;
  FinalCut cut;
  if constexpr (Selects) cut = finish_cut(cut_work, u, scratch);
  const float* score = work.score.segment(u);
  float values[cut_each];
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    values[j] = token < unit.length ? score[token] : 0.0f;
  }
  TileFlags flags;
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    const bool candidate = token >= unit.protected_front && token < unit.protected_back;
    const u32 key = device_score_key(values[j]);
    flags.set(j, 0, token < unit.length && (!candidate || key > cut.key));
    flags.set(j, 1, candidate && key == cut.key);
    flags.set(j, 2, candidate && key == 0);
    flags.set(j, 3, false);
  }
  const u64 mine = flags.count(before, scratch.scan);
  const u64 tiles_at = static_cast<u64>(u) * work.tiles;
  if (threadIdx.x == 0) {
    announce(work.announced_marks + tiles_at + tile, TileFlags::part(mine, 0),
             TileFlags::part(mine, 1));
    announce(work.announced_nan + tiles_at + tile, 0, TileFlags::part(mine, 2));
  }
  TileCount marks;
  TileCount nan;
  if (tile != 0) {
    marks = sum_announced(work.announced_marks + tiles_at, tile, scratch.scan);
    nan = sum_announced(work.announced_nan + tiles_at, tile, scratch.scan);
  }
  // Of NaN scores the newest are marked, so those that may go are the first ones.
  const u32 may_go = smaller(unit.excess, cut.key == 0 ? skipped_ties(cut) : 0xffffffffu);
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    if (token >= unit.length) continue;
    bool alone = flags.has(j, 0);
    if (flags.has(j, 1)) alone = takes_tie(cut, marks.equal + flags.before(j, 1, before));
    const bool goes = !alone && flags.has(j, 2) && nan.equal + flags.before(j, 2, before) < may_go;
    work.state[work.at(u, token)] = alone ? token_alone : goes ? token_evicted : token_free;
  }
  if (threadIdx.x != 0) return;
  work.alone_before[tiles_at + tile] = marks.taken + ties_before(cut, marks.equal);
  work.evicted_before[tiles_at + tile] = smaller(nan.equal, may_go);
  if (unit.length > first_token + cut_tile) return;
  const u32 alone = marks.taken + TileFlags::part(mine, 0) +
                    ties_before(cut, marks.equal + TileFlags::part(mine, 1));
  const u32 evicted = smaller(nan.equal + TileFlags::part(mine, 2), may_go);
  CutState state;
  SelectRange range;
  range.length = range.count = unit.length != 0 ? unit.length - 1 : 0;
  if (unit.by_threshold == 0) {
    state.remaining = smaller(unit.excess - evicted, range.count);
    state.mode = state.remaining != 0 ? cut_own : cut_none;
  }
  work.best_links.entry[u] = state;
  work.best_links.range[u] = range;
  work.unit[u].alone = alone;
  work.unit[u].evicted = evicted;
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
