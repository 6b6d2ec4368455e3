// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/emit.cuh"
#include "kvlean/cuda/plan.cuh"

// What the merging reducers share: the attention that a merge goes by, and tiles of cut_tile items
// of which up to four things are counted.

KVLEAN_CUDA_NAMESPACE_BEGIN

/// What a merging reducer reads of the scorer: kvlean::Scores in device memory.
struct MergeScores {
  DeviceRagged<const float> rank;     ///< order only
  DeviceRagged<const float> mass;     ///< attention received, >= 0; empty: the scorer has none
  DeviceRagged<const u32> observers;  ///< queries that saw each token; empty: not known
};

namespace detail {

/// Up to four flags of each item of a tile, and how many items before each one have them. An item
/// is number j * cut_threads + threadIdx.x of its tile; 32 in a row are a run.
struct TileFlags {
  static constexpr u32 warps = cut_threads / warp_threads;
  static constexpr u32 runs = cut_each * warps;
  static constexpr u32 kinds = 4;

  u32 mask[cut_each][kinds];  ///< a bit for each lane of the run

  KVLEAN_DEVICE void set(u32 j, u32 kind, bool flag) noexcept {
    mask[j][kind] = __ballot_sync(full_warp, flag);
  }
  [[nodiscard]] KVLEAN_DEVICE bool has(u32 j, u32 kind) const noexcept {
    return (mask[j][kind] >> (threadIdx.x % warp_threads) & 1) != 0;
  }
  [[nodiscard]] static KVLEAN_DEVICE u32 run(u32 j) noexcept {
    return j * warps + threadIdx.x / warp_threads;
  }
  /// Adds up the runs once all flags are set. `before` [runs] is shared memory. Returns the tile's
  /// counts. The whole block calls.
  [[nodiscard]] KVLEAN_DEVICE u64 count(u64* before, u64* scan) noexcept {
#pragma unroll
    for (u32 j = 0; j < cut_each; ++j) {
      u64 packed = 0;
#pragma unroll
      for (u32 kind = 0; kind < kinds; ++kind) {
        packed |= static_cast<u64>(__popc(mask[j][kind])) << (16 * kind);
      }
      if (threadIdx.x % warp_threads == 0) before[run(j)] = packed;
    }
    __syncthreads();
    static_assert(runs <= cut_threads);
    const bool has_run = threadIdx.x < runs;
    const u64 mine = has_run ? before[threadIdx.x] : 0;
    u64 total = 0;
    const u64 earlier = block_scan<cut_threads>(mine, scan, total);
    if (has_run) before[threadIdx.x] = earlier;
    __syncthreads();
    return total;
  }
  [[nodiscard]] static KVLEAN_DEVICE u32 part(u64 packed, u32 kind) noexcept {
    return static_cast<u32>(packed >> (16 * kind)) & 0xffffu;
  }
  /// Items of the tile before this thread's j-th that have the flag.
  [[nodiscard]] KVLEAN_DEVICE u32 before(u32 j, u32 kind, const u64* before) const noexcept {
    const u32 lanes_before = (1u << threadIdx.x % warp_threads) - 1;
    return part(before[run(j)], kind) + __popc(mask[j][kind] & lanes_before);
  }
};
static_assert(cut_tile < 0x10000);

/// A tile's two counts for the tiles behind it; the word is zero before.
KVLEAN_DEVICE void announce(u64* announced, u32 first, u32 second) noexcept {
  *reinterpret_cast<volatile u64*>(announced) =
      u64{1} << 63 | static_cast<u64>(first) << 32 | second;
}

/// Of candidates equal to the cut, those that are skipped: of NaN the oldest go.
[[nodiscard]] KVLEAN_DEVICE u32 skipped_ties(const FinalCut& cut) noexcept {
  return cut.key == 0 ? cut.equal - cut.ties : 0;
}
/// Ties taken among the first `equal_rank` candidates that are equal to the cut.
[[nodiscard]] KVLEAN_DEVICE u32 ties_before(const FinalCut& cut, u32 equal_rank) noexcept {
  const u32 skipped = skipped_ties(cut);
  return equal_rank < skipped ? 0 : smaller(equal_rank - skipped, cut.ties);
}
/// Whether candidate number `equal_rank` of those equal to the cut is taken.
[[nodiscard]] KVLEAN_DEVICE bool takes_tie(const FinalCut& cut, u32 equal_rank) noexcept {
  return equal_rank - skipped_ties(cut) < cut.ties;  // wraps for those skipped
}

/// Histograms, states and ranges of one selection; see CutWork.
struct CutArrays {
  CutState* entry = nullptr;
  SelectRange* range = nullptr;
  CutState* states[cut_levels] = {};
  u32* histogram[cut_levels] = {};  // zeroed
  u32* arrivals[cut_levels] = {};   // zeroed

  void take(u32 units, Workspace& workspace) noexcept {
    entry = workspace.take<CutState>(units);
    range = workspace.take<SelectRange>(units);
    for (CutState*& state : states) state = workspace.take<CutState>(units);
  }
  void take_zeroed(u32 units, Workspace& workspace) noexcept {
    for (u32 level = 0; level < cut_levels; ++level) {
      histogram[level] = workspace.take<u32>(std::size_t{units} * bins_of(level));
      arrivals[level] = workspace.take<u32>(units);
    }
  }
  [[nodiscard]] CutWork work(DeviceRagged<const float> scores, u32 units,
                             u32 tiles) const noexcept {
    CutWork cut;
    cut.scores = scores;
    cut.range = range;
    cut.entry = entry;
    for (u32 level = 0; level < cut_levels; ++level) {
      cut.states[level] = states[level];
      cut.histogram[level] = histogram[level];
      cut.arrivals[level] = arrivals[level];
    }
    cut.units = units;
    cut.tiles = tiles;
    cut.heads = 1;
    cut.all_heads = 1;
    return cut;
  }
};

/// Launches one kernel after the other, each allowed to start while the one before it drains.
class KernelChain {
 public:
  explicit KernelChain(const Context& context) noexcept : context_(context) {}
  template <class... P, class... A>
  [[nodiscard]] Status run(u64 blocks, u32 threads, void (*kernel)(P...),
                           A&&... arguments) noexcept {
    return run_shared(blocks, threads, 0, kernel, static_cast<A&&>(arguments)...);
  }
  /// With `bytes` of dynamic shared memory.
  template <class... P, class... A>
  [[nodiscard]] Status run_shared(u64 blocks, u32 threads, std::size_t bytes, void (*kernel)(P...),
                                  A&&... arguments) noexcept {
    if (blocks > 0x7fffffffu) return StatusCode::invalid_shape;
    LaunchShape shape;
    shape.shared_bytes = bytes;
    shape.grid = dim3(static_cast<u32>(blocks));
    shape.block = dim3(threads);
    shape.overlap = overlap_;
    overlap_ = true;
    return launch(context_, shape, kernel, static_cast<A&&>(arguments)...);
  }
  [[nodiscard]] Status passes(const CutWork& cut) noexcept {
    const u64 blocks = u64{cut.units} * cut.tiles;
    KVLEAN_RETURN_IF_ERROR(run(blocks, cut_threads, cut_pass<0>, cut));
    KVLEAN_RETURN_IF_ERROR(run(blocks, cut_threads, cut_pass<1>, cut));
    return run(blocks, cut_threads, cut_pass<2>, cut);
  }
  /// The next kernel follows work that is not this chain's.
  void interrupt() noexcept { overlap_ = false; }

 private:
  const Context& context_;
  bool overlap_ = false;
};

/// What every merging reducer checks of its arguments.
[[nodiscard]] inline Status check_merge(const CacheView& cache, const MergeScores& scores,
                                        const u32* limit, const SelectOptions& options,
                                        const PlanView& plan) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(options.check(cache.num_layers));
  if (limit == nullptr || plan.length == nullptr) return StatusCode::null_pointer;
  if (!scores.rank && cache.max_tokens != 0) return StatusCode::null_pointer;
  if (plan.anchor == nullptr && plan.max_slots != 0) return StatusCode::null_pointer;
  if (plan.segments != cache.num_segments()) return StatusCode::shape_mismatch;
  if (plan.has_terms() && plan.term_stride < cache.max_tokens) {
    return StatusCode::destination_too_small;
  }
  return StatusCode::ok;
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
