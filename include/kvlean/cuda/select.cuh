// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/communicator.cuh"
#include "kvlean/cuda/emit.cuh"
#include "kvlean/cuda/mix.cuh"
#include "kvlean/cuda/plan.cuh"
#include "kvlean/cuda/select_small.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// Where a selection goes. `plan` takes lengths and ascending anchors (its other arrays are left
/// alone); the rest is optional.
struct Selection {
  PlanView plan;
  u32* limit = nullptr;    ///< [segments] slots that allocation gave
  u8* keep = nullptr;      ///< [segments][token_stride] 1 for kept tokens, 0 for the others
  u32* slot_of = nullptr;  ///< [segments][token_stride] slot of a kept token, 0xffffffff for others
  u64 token_stride = 0;    ///< of keep and slot_of, at least max_tokens
};

namespace detail {

/// Scratch of a selection, taken at once; what must be zero lies together.
struct SelectScratch {
  GroupArrays arrays;
  CutState* compete = nullptr;
  CutState* own = nullptr;
  CutState* select = nullptr;
  SelectRange* compete_range = nullptr;
  SelectRange* select_range = nullptr;
  CutState* states[cut_levels] = {};
  float* weight = nullptr;
  float* mean = nullptr;
  u32* gathered = nullptr;  // lengths, then frozen tokens, of all ranks
  std::size_t gathered_count = 0;
  u32* won = nullptr;
  u32* limit = nullptr;
  u32* histogram[cut_levels] = {};
  u64* group_histogram[cut_levels] = {};
  u32* arrivals[cut_levels] = {};
  u64* announced = nullptr;
  u32* ties_in_group = nullptr;
  void* zero = nullptr;
  std::size_t zero_bytes = 0;
};

/// What of a selection the host knows before it starts.
struct SelectShape {
  u32 segments = 0;
  u32 units = 0;
  u32 entries = 0;  // of all ranks
  u32 groups = 0;
  u32 max_tokens = 0;
  u32 max_items = 0;
  u32 item_tokens = 1;
  u32 all_heads = 0;
  bool several_ranks = false;
  bool competes = false;
  bool weighs = false;
  bool fused = false;  // the competition's cut is the selection's
  bool means = false;

  SelectShape(const CacheView& cache, const SelectOptions& options, const HeadShard& shard,
              bool several, bool emits) noexcept {
    segments = cache.num_segments();
    all_heads = shard.all_heads != 0 ? shard.all_heads : cache.kv_heads;
    several_ranks = several;
    means = options.shares_tokens();
    units = means ? cache.num_layers * cache.num_sequences : segments;
    entries = cache.num_layers * cache.num_sequences * all_heads;
    groups = options.allocator == AllocatorKind::adakv_layers
                 ? cache.num_sequences
                 : cache.num_layers * cache.num_sequences;
    max_tokens = cache.max_tokens;
    if (options.sharing.kind == SharingKind::whole_pages) item_tokens = options.sharing.page_tokens;
    max_items = ceil_div(larger(max_tokens, 1u), item_tokens);
    competes = options.is_adakv();
    const bool normalizes = options.normalize && options.allocator != AllocatorKind::adakv_layers;
    weighs = competes && (options.head_weight != nullptr || normalizes);
    const bool hard = options.allocator == AllocatorKind::adakv_layers ||
                      options.mode == SafeguardMode::hard_floor;
    fused = competes && hard && !weighs && emits && options.recent_share == 0.0f &&
            options.sharing.kind == SharingKind::per_head;
  }
  /// One launch does it all; see select_small.cuh.
  [[nodiscard]] bool is_small(const CacheView& cache, const SelectOptions& options) const noexcept {
    const bool by_layer = options.allocator == AllocatorKind::uniform ||
                          (options.allocator == AllocatorKind::adakv && fused);
    return by_layer && !several_ranks && !means && item_tokens == 1 &&
           cache.kv_heads <= small_heads && (cache.kv_heads & (cache.kv_heads - 1)) == 0 &&
           fits_small(segments, max_tokens) && runs_clusters();
  }
  [[nodiscard]] u32 cut_tiles(u32 items) const noexcept {
    return ceil_div(larger(items, 1u), cut_tile);
  }
};

[[nodiscard]] inline SelectScratch take_scratch(const SelectShape& shape,
                                                Workspace& workspace) noexcept {
  SelectScratch scratch;
  const std::size_t entries = shape.entries;
  scratch.arrays.value = workspace.take<u32>(entries);
  scratch.arrays.low = workspace.take<u32>(entries);
  scratch.arrays.high = workspace.take<u32>(entries);
  scratch.arrays.nominal = workspace.take<u32>(entries);
  scratch.arrays.covered = workspace.take<u32>(entries);
  scratch.arrays.granted = workspace.take<u32>(entries);
  scratch.arrays.wanted = workspace.take<u32>(entries);
  scratch.arrays.remainder = workspace.take<u64>(entries);
  scratch.compete = workspace.take<CutState>(shape.segments);
  scratch.own = workspace.take<CutState>(shape.segments);
  scratch.select = workspace.take<CutState>(shape.units);
  scratch.compete_range = workspace.take<SelectRange>(shape.segments);
  scratch.select_range = workspace.take<SelectRange>(shape.units);
  for (CutState*& states : scratch.states) states = workspace.take<CutState>(shape.segments);
  if (shape.weighs) scratch.weight = workspace.take<float>(shape.segments);
  if (shape.means) scratch.mean = workspace.take<float>(std::size_t{shape.units} * shape.max_items);
  scratch.gathered_count = shape.several_ranks ? 2 * entries : 0;
  if (shape.several_ranks) scratch.gathered = workspace.take<u32>(scratch.gathered_count);
  scratch.limit = workspace.take<u32>(shape.segments);
  const std::size_t begin = workspace.mark();
  for (u32 level = 0; level < cut_levels; ++level) {
    scratch.histogram[level] = workspace.take<u32>(std::size_t{shape.segments} * bins_of(level));
    if (shape.competes) {
      scratch.group_histogram[level] = workspace.take<u64>(std::size_t{shape.groups} * cut_bins);
    }
    scratch.arrivals[level] = workspace.take<u32>(shape.segments);
  }
  scratch.announced =
      workspace.take<u64>(std::size_t{shape.segments} * shape.cut_tiles(shape.max_tokens));
  scratch.ties_in_group = workspace.take<u32>(shape.several_ranks ? entries : 0);
  scratch.won = workspace.take<u32>(entries);
  scratch.zero = scratch.histogram[0];
  scratch.zero_bytes = workspace.mark() - begin;
  return scratch;
}

/// Puts this rank's lengths and frozen tokens among all ranks'; the others' places are zeroed.
template <int = 0>
__global__ void __launch_bounds__(256)
    gather_lengths(const u32* lengths, const Segment* segments, u32 count, u32 heads, u32 all_heads,
                   u32 first_head, u32 entries, u32* gathered) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x * 256 + threadIdx.x;
  if (s >= count) return;
  const u32 entry = s / heads * all_heads + first_head + s % heads;
  gathered[entry] = lengths[s];
  gathered[entries + entry] = segments[s].frozen;
}

/// Entry states for AdaKVAllocator::normalize: each segment's best of its own.
template <int = 0>
__global__ void __launch_bounds__(256) enter_own(const LimitWork work, u32 count, CutState* own) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x * 256 + threadIdx.x;
  if (s >= count) return;
  const u32 entry = s / work.kv_heads * work.all_heads + work.first_head + s % work.kv_heads;
  CutState state;
  state.remaining = work.arrays.value[entry] - work.arrays.covered[entry];
  state.mode = state.remaining != 0 ? cut_own : cut_none;
  own[s] = state;
}

/// What a selection begins with when the limits are given.
template <int = 0>
__global__ void __launch_bounds__(limit_threads)
    enter_limits(const LimitWork work, const u32* given) {
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
  gather_group(work, group);
  group.each([&](u32 s) { work.arrays.value[s] = given[s]; });
  finish_layer(work, layer, sequence, group);
}

/// One selection: its kernels in order. `emits` off: limits only.
template <Communicator C>
class SelectRun {
 public:
  SelectRun(const CacheView& cache, const DeviceRagged<const float>& scores,
            const SelectOptions& options, const Context& context, const Selection& out,
            const C& communicator, const HeadShard& shard, bool emits) noexcept
      : cache_(cache),
        scores_(scores),
        options_(options),
        context_(context),
        out_(out),
        communicator_(communicator),
        shard_(shard),
        emits_(emits),
        shape_(cache, options, shard, several_ranks, emits) {}

  static constexpr bool several_ranks = !std::same_as<C, OneRank>;

  [[nodiscard]] Status run(const u32* given_limits = nullptr) noexcept {
    WorkspaceScope scope(context_.workspace);
    scratch_ = take_scratch(shape_, context_.workspace);
    KVLEAN_RETURN_IF_ERROR(context_.workspace.status());
    if constexpr (several_ranks) KVLEAN_RETURN_IF_ERROR(gather());
    LimitWork limits = limit_work();
    if (emits_ && given_limits == nullptr && shape_.is_small(cache_, options_)) {
      return run_small(limits);
    }
    if (given_limits != nullptr) {
      limits.compete = nullptr;
      KVLEAN_RETURN_IF_ERROR(start(limits, enter_limits<>, given_limits));
      return select();
    }
    KVLEAN_RETURN_IF_ERROR(start_groups(limits));
    if (!shape_.competes) return emits_ ? select() : Status{};
    if (options_.normalize && options_.allocator != AllocatorKind::adakv_layers) {
      KVLEAN_RETURN_IF_ERROR(normalize(limits));
    }
    CutWork cut = cut_work();
    cut.scores = scores_;
    cut.weight = scratch_.weight;
    cut.range = scratch_.compete_range;
    cut.entry = scratch_.compete;
    for (u32 level = 0; level < cut_levels; ++level) {
      cut.group_histogram[level] = scratch_.group_histogram[level];
    }
    KVLEAN_RETURN_IF_ERROR(passes(cut));
    if constexpr (several_ranks) {
      cut.ties_in_group = scratch_.ties_in_group;
      KVLEAN_RETURN_IF_ERROR(launch_blocks(shape_.segments, cut_threads, count_ties<>, cut));
      KVLEAN_RETURN_IF_ERROR(exchange(scratch_.ties_in_group, shape_.entries));
    }
    if (shape_.fused) return emit(cut, out_.limit);
    KVLEAN_RETURN_IF_ERROR(
        launch_blocks(shape_.segments, cut_threads, count_won<>, cut, scratch_.won));
    if constexpr (several_ranks) KVLEAN_RETURN_IF_ERROR(exchange(scratch_.won, shape_.entries));
    limits.compete = nullptr;
    // The counts of what was won are read while the rest is zeroed: they lie behind it.
    limits.zero_16 = (reinterpret_cast<std::size_t>(scratch_.won) -
                      reinterpret_cast<std::size_t>(scratch_.zero)) /
                     16;
    KVLEAN_RETURN_IF_ERROR(start(limits, finish_limits<>, scratch_.won));
    return emits_ ? select() : Status{};
  }

 private:
  [[nodiscard]] LimitWork limit_work() const noexcept {
    LimitWork work;
    work.options = options_;
    work.budget_value = options_.budget.value();
    work.budget_is_fraction = options_.budget.is_fraction();
    work.arrays = scratch_.arrays;
    work.num_layers = cache_.num_layers;
    work.num_sequences = cache_.num_sequences;
    work.all_heads = shape_.all_heads;
    work.first_head = shard_.first_head;
    work.kv_heads = cache_.kv_heads;
    work.segments = cache_.segments;
    work.lengths = cache_.lengths;
    if (several_ranks) {
      work.gathered_lengths = scratch_.gathered;
      work.gathered_frozen = scratch_.gathered + shape_.entries;
    }
    work.limit = shape_.fused ? nullptr : out_.limit;
    work.weight = scratch_.weight;
    work.compete = shape_.competes ? scratch_.compete : nullptr;
    work.compete_range = scratch_.compete_range;
    work.select = emits_ ? scratch_.select : nullptr;
    work.select_range = scratch_.select_range;
    work.fused = shape_.fused;
    work.error = context_.error;
    work.zero = static_cast<uint4*>(scratch_.zero);
    work.zero_16 = scratch_.zero_bytes / 16;
    return work;
  }
  [[nodiscard]] CutWork cut_work() const noexcept {
    CutWork work;
    for (u32 level = 0; level < cut_levels; ++level) {
      work.states[level] = scratch_.states[level];
      work.histogram[level] = scratch_.histogram[level];
      work.arrivals[level] = scratch_.arrivals[level];
    }
    work.units = shape_.segments;
    work.tiles = shape_.cut_tiles(shape_.max_tokens);
    work.heads = cache_.kv_heads;
    work.num_sequences = cache_.num_sequences;
    work.num_layers = cache_.num_layers;
    work.across_layers = options_.allocator == AllocatorKind::adakv_layers;
    work.all_heads = shape_.all_heads;
    work.first_head = shard_.first_head;
    return work;
  }

  [[nodiscard]] Status run_small(const LimitWork& limits) noexcept {
    LaunchShape shape;
    shape.grid = dim3(shape_.segments);
    shape.block = dim3(cut_threads);
    shape.cluster = cache_.kv_heads;
    shape.shared_bytes = small_shared_bytes(shape_.max_tokens);
    shape.overlap = true;
    KVLEAN_RETURN_IF_ERROR(raise_shared_bytes(select_small<>, shape.shared_bytes));
    return launch(context_, shape, select_small<>, limits, scores_,
                  emit_work(shape_.fused ? out_.limit : nullptr));
  }

  template <class... P, class... A>
  [[nodiscard]] Status launch_blocks(u32 blocks, u32 threads, void (*kernel)(P...),
                                     A&&... arguments) noexcept {
    LaunchShape shape;
    shape.grid = dim3(blocks);
    shape.block = dim3(threads);
    shape.overlap = overlap_;
    overlap_ = true;
    return launch(context_, shape, kernel, static_cast<A&&>(arguments)...);
  }
  /// A kernel of warps over layers and sequences, and of blocks that zero.
  template <class... P, class... A>
  [[nodiscard]] Status start(LimitWork& work, void (*kernel)(const LimitWork, P...),
                             A... arguments) noexcept {
    work.group_blocks =
        ceil_div(cache_.num_layers * cache_.num_sequences, limit_threads / warp_threads);
    return start_blocks(work, kernel, arguments...);
  }
  template <class... P, class... A>
  [[nodiscard]] Status start_blocks(const LimitWork& work, void (*kernel)(const LimitWork, P...),
                                    A... arguments) noexcept {
    const u64 zero_blocks = smaller(ceil_div(work.zero_16, u64{4} * limit_threads), u64{256});
    return launch_blocks(work.group_blocks + static_cast<u32>(zero_blocks), limit_threads, kernel,
                         work, arguments...);
  }
  [[nodiscard]] Status start_groups(LimitWork& work) noexcept {
    const bool by_layer =
        options_.allocator == AllocatorKind::uniform || options_.allocator == AllocatorKind::adakv;
    if (by_layer) return start(work, start_limits<>);
    work.group_blocks = cache_.num_sequences;
    return start_blocks(work, start_limits<>);
  }

  template <class T>
  [[nodiscard]] Status exchange(T* data, std::size_t count) noexcept {
    overlap_ = false;  // the exchange is no kernel of ours
    return communicator_.all_reduce_sum(data, count, context_.stream);
  }
  [[nodiscard]] Status gather() noexcept {
    KVLEAN_RETURN_IF_ERROR(status_of(cudaMemsetAsync(
        scratch_.gathered, 0, scratch_.gathered_count * sizeof(u32), context_.stream)));
    KVLEAN_RETURN_IF_ERROR(launch_blocks(ceil_div(shape_.segments, 256u), 256, gather_lengths<>,
                                         cache_.lengths, cache_.segments, shape_.segments,
                                         cache_.kv_heads, shape_.all_heads, shard_.first_head,
                                         shape_.entries, scratch_.gathered));
    return exchange(scratch_.gathered, scratch_.gathered_count);
  }

  template <u32 Level>
  [[nodiscard]] Status pass(const CutWork& cut) noexcept {
    KVLEAN_RETURN_IF_ERROR(launch_blocks(cut.units * cut.tiles, cut_threads, cut_pass<Level>, cut));
    if constexpr (several_ranks) {
      if (cut.group_histogram[Level] != nullptr) {
        return exchange(cut.group_histogram[Level], std::size_t{shape_.groups} * cut_bins);
      }
    }
    return StatusCode::ok;
  }
  [[nodiscard]] Status passes(const CutWork& cut) noexcept {
    KVLEAN_RETURN_IF_ERROR(pass<0>(cut));
    KVLEAN_RETURN_IF_ERROR(pass<1>(cut));
    return pass<2>(cut);
  }

  [[nodiscard]] Status normalize(const LimitWork& limits) noexcept {
    KVLEAN_RETURN_IF_ERROR(launch_blocks(ceil_div(shape_.segments, 256u), 256, enter_own<>, limits,
                                         shape_.segments, scratch_.own));
    CutWork cut = cut_work();
    cut.scores = scores_;
    cut.weight = scratch_.weight;
    cut.range = scratch_.compete_range;
    cut.entry = scratch_.own;
    KVLEAN_RETURN_IF_ERROR(passes(cut));
    KVLEAN_RETURN_IF_ERROR(
        launch_blocks(shape_.segments, cut_threads, normalize_weights<>, cut, scratch_.weight));
    overlap_ = false;
    return status_of(cudaMemsetAsync(scratch_.zero, 0, scratch_.zero_bytes, context_.stream));
  }

  /// Each unit's own best, by limits that are known.
  [[nodiscard]] Status select() noexcept {
    CutWork cut = cut_work();
    cut.scores = scores_;
    cut.range = scratch_.select_range;
    cut.entry = scratch_.select;
    cut.units = shape_.units;
    cut.tiles = shape_.cut_tiles(shape_.max_items);
    if (shape_.means) {
      MeanWork means;
      means.scores = scores_;
      means.lengths = cache_.lengths;
      means.segments = cache_.segments;
      means.has_positions = cache_.has_positions;
      means.heads = cache_.kv_heads;
      means.item_tokens = shape_.item_tokens;
      means.max_items = shape_.max_items;
      means.mean = scratch_.mean;
      means.error = context_.error;
      KVLEAN_RETURN_IF_ERROR(launch_blocks(shape_.units * ceil_div(shape_.max_items, 256u), 256,
                                           mean_scores<>, means));
      cut.scores = {scratch_.mean, shape_.max_items, nullptr};
    }
    KVLEAN_RETURN_IF_ERROR(passes(cut));
    return emit(cut, nullptr);
  }

  [[nodiscard]] EmitWork emit_work(u32* limit) const noexcept {
    EmitWork work;
    work.announced = scratch_.announced;
    work.fan = shape_.means ? cache_.kv_heads : 1;
    work.item_tokens = shape_.item_tokens;
    work.limit = limit;
    work.length = out_.plan.length;
    work.anchor = out_.plan.anchor;
    work.slot_stride = out_.plan.slot_stride;
    work.max_slots = out_.plan.max_slots;
    work.keep = out_.keep;
    work.slot_of = out_.slot_of;
    work.token_stride = out_.token_stride;
    work.error = context_.error;
    return work;
  }
  [[nodiscard]] Status emit(const CutWork& cut, u32* limit) noexcept {
    EmitWork work = emit_work(limit);
    work.tiles = cut.tiles;
    return launch_blocks(cut.units * cut.tiles, cut_threads, emit_anchors<>, cut, work);
  }

  const CacheView& cache_;
  const DeviceRagged<const float>& scores_;
  const SelectOptions& options_;
  const Context& context_;
  const Selection& out_;
  const C& communicator_;
  HeadShard shard_;
  bool emits_;
  SelectShape shape_;
  SelectScratch scratch_;
  bool overlap_ = false;  // not the first kernel: what is before it is not ours
};

[[nodiscard]] inline Status check_selection(const CacheView& cache,
                                            const DeviceRagged<const float>& scores,
                                            const SelectOptions& options, const Selection& out,
                                            const HeadShard& shard, bool several_ranks,
                                            bool emits) noexcept {
  if (cache.segments == nullptr || cache.lengths == nullptr) return StatusCode::null_pointer;
  const u64 segments = u64{cache.num_layers} * cache.num_sequences * cache.kv_heads;
  if (segments == 0) return StatusCode::invalid_shape;
  const u64 tiles = ceil_div(u64{larger(cache.max_tokens, 1u)}, u64{cut_tile});
  if (segments * tiles > 0x7fffffffu) return StatusCode::invalid_shape;
  KVLEAN_RETURN_IF_ERROR(options.check(cache.num_layers));
  const u32 all_heads = shard.all_heads != 0 ? shard.all_heads : cache.kv_heads;
  if (u64{shard.first_head} + cache.kv_heads > all_heads) return StatusCode::shape_mismatch;
  if (!several_ranks && all_heads != cache.kv_heads) return StatusCode::shape_mismatch;
  if (u64{cache.num_layers} * cache.num_sequences * all_heads > 0x7fffffffu) {
    return StatusCode::invalid_shape;
  }
  if (several_ranks && options.shares_tokens()) return StatusCode::invalid_option;
  if ((emits || options.is_adakv()) && !scores && cache.max_tokens != 0) {
    return StatusCode::null_pointer;
  }
  if (!emits) return StatusCode::ok;
  if (out.plan.length == nullptr || (out.plan.anchor == nullptr && out.plan.max_slots != 0)) {
    return StatusCode::null_pointer;
  }
  if (out.plan.segments != segments) return StatusCode::shape_mismatch;
  if ((out.keep != nullptr || out.slot_of != nullptr) && out.token_stride < cache.max_tokens) {
    return StatusCode::destination_too_small;
  }
  return StatusCode::ok;
}

}  // namespace detail

/// Workspace bytes that select(), allocate() and select_kept() need at most, from shapes alone:
/// about 21 KiB a segment and 48 KiB a group of competing segments.
[[nodiscard]] inline std::size_t select_bytes_required(const CacheView& cache,
                                                       const SelectOptions& options,
                                                       bool several_ranks = false,
                                                       const HeadShard& shard = {}) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_scratch(
      detail::SelectShape(cache, options, shard, several_ranks, true), counting));
  return counting.bytes_required();
}

/// Divides the budget over the segments and selects, for all layers and sequences of a step:
/// exactly what the CPU's allocator, select_kept() and plan_kept() decide on the same score bits,
/// ties and NaN included. Writes out.plan's lengths and anchors. `scores` are read in place;
/// out.plan's room (max_slots) may be less than the length where the caller knows a bound.
///
/// One launch for uniform and Ada-KV with the hard floor where segments have at most 16384 tokens
/// (64 segments or more: 49152) and a layer 1, 2, 4 or 8 KV heads (compute capability 9.0).
/// Otherwise five (uniform, PyramidKV, Ada-KV with the hard floor); nine with head weights, mixed
/// safeguards, shared tokens or a recent_share under Ada-KV; O(tokens) reads of the scores, four
/// times. With several ranks each passes its own heads: the limits are those of one rank with all
/// heads, for an exchange of 16 KiB a group of competing heads and pass and of 16 bytes a segment.
///
/// Errors, at once: null_pointer, invalid_shape, shape_mismatch, invalid_option, invalid_budget,
/// destination_too_small, workspace_too_small, launch_failed, exchange_failed. On the device's
/// error word: budget_below_protected (everything is kept then), shape_mismatch (heads that share
/// tokens differ), invalid_option (a head weight), destination_too_small (more slots than the plan
/// has room for; that segment's length is 0 then).
template <Communicator C = OneRank>
[[nodiscard]] Status select(const CacheView& cache, const DeviceRagged<const float>& scores,
                            const SelectOptions& options, const Context& context,
                            const Selection& out, const C& communicator = {},
                            const HeadShard& shard = {}) noexcept {
  constexpr bool several = detail::SelectRun<C>::several_ranks;
  KVLEAN_RETURN_IF_ERROR(
      detail::check_selection(cache, scores, options, out, shard, several, true));
  detail::SelectRun<C> run(cache, scores, options, context, out, communicator, shard, true);
  return run.run();
}

/// The limits alone: `limit` [segments] in device memory. `scores` may be empty for allocators that
/// read none. Errors as for select().
template <Communicator C = OneRank>
[[nodiscard]] Status allocate(const CacheView& cache, const DeviceRagged<const float>& scores,
                              const SelectOptions& options, const Context& context, u32* limit,
                              const C& communicator = {}, const HeadShard& shard = {}) noexcept {
  constexpr bool several = detail::SelectRun<C>::several_ranks;
  Selection out;
  out.limit = limit;
  if (limit == nullptr) return StatusCode::null_pointer;
  KVLEAN_RETURN_IF_ERROR(
      detail::check_selection(cache, scores, options, out, shard, several, false));
  detail::SelectRun<C> run(cache, scores, options, context, out, communicator, shard, false);
  return run.run();
}

/// The best limit[s] tokens of each segment, protected ones among them: select_kept() of the CPU.
/// Of `options` only protection, sharing and recent_share count. Errors as for select().
[[nodiscard]] inline Status select_kept(const CacheView& cache,
                                        const DeviceRagged<const float>& scores, const u32* limit,
                                        const SelectOptions& options, const Context& context,
                                        const Selection& out) noexcept {
  if (limit == nullptr) return StatusCode::null_pointer;
  SelectOptions plain = options;
  plain.allocator = AllocatorKind::uniform;
  KVLEAN_RETURN_IF_ERROR(detail::check_selection(cache, scores, plain, out, {}, false, true));
  const OneRank rank;
  detail::SelectRun<OneRank> run(cache, scores, plain, context, out, rank, {}, true);
  return run.run(limit);
}

KVLEAN_CUDA_NAMESPACE_END
