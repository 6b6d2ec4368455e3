// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/kvmerger_cosines.cuh"
#include "kvlean/cuda/kvmerger_distances.cuh"
#include "kvlean/cuda/merge_weights.cuh"
#include "kvlean/cuda/select.cuh"
#include "kvlean/reduce/kvmerger.hpp"

KVLEAN_CUDA_NAMESPACE_BEGIN

/// Room for the plan of a KVMergerReducer: up to `max_slots` slots a segment, which is the most
/// that its limits can be, or max_tokens where sets need not fit the limit.
[[nodiscard]] inline PlanShape plan_shape(const CacheView& cache, const KVMergerReducer& reducer,
                                          u32 max_slots) noexcept {
  PlanShape shape;
  shape.segments = cache.num_segments();
  shape.max_slots = max_slots;
  shape.max_terms = cache.max_tokens;
  shape.log_mass = cache.has_log_mass || reducer.log_mass != LogMass::none;
  shape.values_differ = reducer.values == ValueScale::paper_set_size;
  shape.slots_evicted = true;
  return shape;
}

namespace detail {

/// What of a KVMerger call the host knows before it starts.
struct MergerShape {
  u32 segments = 0;
  u32 units = 0;
  u32 tiles = 0;
  u64 stride = 0;
  bool shares = false;
  bool pages = false;
  bool equal = false;
  MergerShape(const CacheView& cache, const SelectOptions& options) noexcept {
    segments = cache.num_segments();
    shares = options.shares_tokens();
    pages = options.sharing.kind == SharingKind::whole_pages;
    equal = options.sharing.kind == SharingKind::equal_count;
    units = shares ? cache.num_layers * cache.num_sequences : segments;
    tiles = ceil_div(larger(cache.max_tokens, 1u), cut_tile);
    stride = ceil_div(u64{cache.max_tokens} + 1, u64{8}) * 8;
  }
};

/// Scratch of a KVMerger call, taken at once; what must be zero lies together.
struct MergerScratch {
  SetWork sets;
  u32* term_pivot = nullptr;
  float* cosine = nullptr;  // by segment
  float* mean = nullptr;
  u8* keep = nullptr;
  u32* slot_of = nullptr;
  u32* most = nullptr;
};

[[nodiscard]] inline MergerScratch take_scratch(const MergerShape& shape,
                                                Workspace& workspace) noexcept {
  MergerScratch scratch;
  SetWork& sets = scratch.sets;
  const std::size_t all = shape.units * shape.stride;
  const std::size_t tiles = std::size_t{shape.units} * shape.tiles;
  sets.unit = workspace.take<SetUnit>(shape.units);
  sets.alone_before = workspace.take<u32>(tiles);
  sets.evicted_before = workspace.take<u32>(tiles);
  sets.state = workspace.take<u8>(all);
  sets.link = workspace.take<float>(all);
  sets.set_begin = workspace.take<u32>(all);
  sets.set_links = workspace.take<u32>(all);
  sets.set_free = workspace.take<u32>(all);
  sets.pivot = workspace.take<u32>(all);
  sets.set_score = workspace.take<float>(all);
  sets.heavy.take(shape.units, workspace);
  sets.best_links.take(shape.units, workspace);
  sets.best_sets.take(shape.units, workspace);
  scratch.cosine = workspace.take<float>(shape.segments * shape.stride);
  scratch.term_pivot = workspace.take<u32>(shape.segments * shape.stride);
  if (shape.shares) scratch.mean = workspace.take<float>(all);
  if (shape.equal) scratch.most = workspace.take<u32>(shape.units);
  if (shape.pages) {
    scratch.keep = workspace.take<u8>(shape.segments * shape.stride);
    scratch.slot_of = workspace.take<u32>(shape.segments * shape.stride);
  }
  const std::size_t begin = workspace.mark();
  sets.announced_marks = workspace.take<u64>(tiles);
  sets.announced_nan = workspace.take<u64>(tiles);
  sets.announced_links = workspace.take<u64>(tiles);
  sets.announced_sets = workspace.take<u64>(tiles);
  sets.heavy.take_zeroed(shape.units, workspace);
  sets.best_links.take_zeroed(shape.units, workspace);
  sets.best_sets.take_zeroed(shape.units, workspace);
  sets.zero = reinterpret_cast<uint4*>(sets.announced_marks);
  sets.zero_16 = (workspace.mark() - begin) / 16;
  sets.stride = shape.stride;
  sets.units = shape.units;
  sets.tiles = shape.tiles;
  sets.unit_blocks = ceil_div(shape.units, 256u);
  return scratch;
}

/// One KVMerger call: its kernels in order.
class MergerRun {
 public:
  MergerRun(const CacheView& cache, const KVMergerReducer& reducer, const MergeScores& scores,
            const u32* limit, const SelectOptions& options, const Context& context,
            const PlanView& plan) noexcept
      : cache_(cache),
        reducer_(reducer),
        scores_(scores),
        limit_(limit),
        options_(options),
        context_(context),
        plan_(plan),
        shape_(cache, options),
        chain_(context) {}

  [[nodiscard]] Status run(const Rotation& rotation) noexcept {
    WorkspaceScope scope(context_.workspace);
    MergerScratch scratch = take_scratch(shape_, context_.workspace);
    KVLEAN_RETURN_IF_ERROR(context_.workspace.status());
    SetWork& sets = scratch.sets;
    fill(sets, scratch);
    WeightWork weights;
    weights.plan = plan_;
    weights.term_pivot = scratch.term_pivot;
    weights.sigma = reducer_.sigma;
    weights.fixed_sigma = reducer_.fixed_sigma;
    weights.scaled = reducer_.values == ValueScale::paper_set_size;
    weights.log_mass = reducer_.log_mass;
    if (shape_.pages) {
      KVLEAN_RETURN_IF_ERROR(select_pages(scratch));
      weights.keep = scratch.keep;
      weights.slot_of = scratch.slot_of;
    }
    if (shape_.shares) KVLEAN_RETURN_IF_ERROR(average(sets, scratch));
    KVLEAN_RETURN_IF_ERROR(form(sets, scratch.cosine, false));
    if (shape_.equal) {
      KVLEAN_RETURN_IF_ERROR(
          chain_.run(sets.unit_blocks, 256, equalise_sets<>, sets, scratch.most));
      sets.again = true;
      sets.most = scratch.most;
      KVLEAN_RETURN_IF_ERROR(form(sets, scratch.cosine, true));
    }
    const u64 set_blocks = ceil_div(larger(cache_.max_tokens, 1u), set_threads);
    if (shape_.pages) {
      KVLEAN_RETURN_IF_ERROR(chain_.run(shape_.units * set_blocks, set_threads, write_page_sets<>,
                                        sets, weights, static_cast<u32>(set_blocks)));
    } else {
      KVLEAN_RETURN_IF_ERROR(chain_.run(u64{shape_.units} * shape_.tiles, cut_threads, write_sets<>,
                                        cut_of(sets.best_sets, sets.set_score, shape_.tiles), sets,
                                        weights));
    }
    if (plan_.has_terms()) KVLEAN_RETURN_IF_ERROR(measure(sets, weights, rotation));
    const u32 slot_blocks =
        ceil_div(larger(smaller(plan_.max_slots, cache_.max_tokens), 1u), set_threads);
    return chain_.run(u64{shape_.segments} * slot_blocks, set_threads, weigh_slots<>, cache_,
                      weights, slot_blocks);
  }

 private:
  void fill(SetWork& sets, const MergerScratch& scratch) const noexcept {
    sets.protection = options_.protection;
    sets.form = reducer_.form;
    sets.epsilon = reducer_.epsilon;
    sets.enforce_limit = reducer_.enforce_limit;
    sets.is_mass = static_cast<bool>(scores_.mass);
    sets.whole_pages = shape_.pages;
    sets.recent_fraction = reducer_.recent_fraction;
    sets.heavy_fraction = reducer_.heavy_fraction;
    sets.recent_tokens = reducer_.recent_tokens;
    sets.heavy_tokens = reducer_.heavy_tokens;
    sets.cache = cache_;
    sets.heads_per_unit = shape_.shares ? cache_.kv_heads : 1;
    sets.limit = limit_;
    sets.cosine = scratch.cosine;
    sets.score = sets.is_mass ? scores_.mass : scores_.rank;
    if (shape_.shares) sets.score = {scratch.mean, shape_.stride, nullptr};
    sets.error = context_.error;
  }
  [[nodiscard]] CutWork cut_of(const CutArrays& arrays, const float* values,
                               u32 tiles) const noexcept {
    return arrays.work({values, shape_.stride, nullptr}, shape_.units, tiles);
  }

  /// Slots are the kept tokens; slots_evicted begins with none.
  [[nodiscard]] Status select_pages(const MergerScratch& scratch) noexcept {
    Selection selection;
    selection.plan = plan_;
    selection.keep = scratch.keep;
    selection.slot_of = scratch.slot_of;
    selection.token_stride = shape_.stride;
    KVLEAN_RETURN_IF_ERROR(
        select_kept(cache_, scores_.rank, limit_, options_, context_, selection));
    if (plan_.slots_evicted == nullptr) return StatusCode::ok;
    return status_of(
        cudaMemsetAsync(plan_.slots_evicted, 0, shape_.segments * sizeof(u32), context_.stream));
  }
  [[nodiscard]] Status average(const SetWork& sets, const MergerScratch& scratch) noexcept {
    MeanWork means;
    means.scores = sets.is_mass ? scores_.mass : scores_.rank;
    means.lengths = cache_.lengths;
    means.segments = cache_.segments;
    means.has_positions = cache_.has_positions;
    means.heads = cache_.kv_heads;
    means.item_tokens = 1;
    means.max_items = static_cast<u32>(shape_.stride);
    means.mean = scratch.mean;
    means.error = context_.error;
    return chain_.run(u64{shape_.units} * ceil_div(means.max_items, 256u), 256, mean_scores<>,
                      means);
  }

  /// Marks, cosines (or what they were before), links, sets and their scores.
  [[nodiscard]] Status form(const SetWork& sets, float* cosine, bool again) noexcept {
    const u64 tiles = u64{shape_.units} * shape_.tiles;
    const u64 zero_blocks = smaller(ceil_div(sets.zero_16, u64{1024}), u64{256});
    KVLEAN_RETURN_IF_ERROR(chain_.run(sets.unit_blocks + zero_blocks, 256, start_sets<>, sets));
    CutWork heavy = sets.heavy.work(sets.score, shape_.units, shape_.tiles);
    // Nobody is heavy: the scores are read for NaN alone.
    if (may_be_heavy()) KVLEAN_RETURN_IF_ERROR(chain_.passes(heavy));
    KVLEAN_RETURN_IF_ERROR(may_be_heavy()
                               ? chain_.run(tiles, cut_threads, mark_tokens<true>, heavy, sets)
                               : chain_.run(tiles, cut_threads, mark_tokens<false>, heavy, sets));
    const bool masks = !shape_.shares;
    if (!again) KVLEAN_RETURN_IF_ERROR(cosines(sets, cosine, masks));
    if (again || !masks) {
      const u32 blocks = ceil_div(larger(cache_.max_tokens, 1u), 256u);
      const float* from = cosine;
      KVLEAN_RETURN_IF_ERROR(
          chain_.run(u64{shape_.units} * blocks, 256, mask_links<>, sets, from, blocks));
    }
    const CutWork links = cut_of(sets.best_links, sets.link, shape_.tiles);
    const bool by_slots = (reducer_.form == KVMergerForm::slots || again) && !shape_.pages;
    if (by_slots) KVLEAN_RETURN_IF_ERROR(chain_.passes(links));
    KVLEAN_RETURN_IF_ERROR(by_slots
                               ? chain_.run(tiles, cut_threads, form_sets<true>, links, sets)
                               : chain_.run(tiles, cut_threads, form_sets<false>, links, sets));
    if (shape_.pages) return StatusCode::ok;
    const u32 blocks = ceil_div(larger(cache_.max_tokens, 1u), set_threads);
    KVLEAN_RETURN_IF_ERROR(
        chain_.run(u64{shape_.units} * blocks, set_threads, score_sets<>, sets, blocks));
    const bool limited = reducer_.form == KVMergerForm::slots || again || reducer_.enforce_limit;
    return limited ? chain_.passes(cut_of(sets.best_sets, sets.set_score, shape_.tiles)) : Status{};
  }
  [[nodiscard]] bool may_be_heavy() const noexcept {
    if (shape_.pages) return false;
    return reducer_.heavy_tokens >= 0 ? reducer_.heavy_tokens != 0 : reducer_.heavy_fraction != 0.0;
  }

  template <DType D, u32 Chunks>
  [[nodiscard]] Status cosines_of(const SetWork& sets, float* cosine, bool masks) noexcept {
    // As many rows a team as leave whole waves of blocks; what is not read for its own sake, the
    // row behind them, is little then.
    const u64 wave = u64{multiprocessors()} * cosine_blocks * cosine_teams;  // teams at once
    const u64 each = ceil_div(u64{shape_.segments} * cache_.max_tokens, wave);
    const u32 rows_each = static_cast<u32>(ceil_div(each, ceil_div(each, u64{47})));
    const u32 rows = larger(rows_each, 4u) / 4 * 4 + 3;
    const u32 blocks = ceil_div(larger(cache_.max_tokens, 1u), cosine_teams * rows);
    return chain_.run(u64{shape_.segments} * blocks, cosine_threads, adjacent_cosines<D, Chunks>,
                      sets, cosine, masks, rows, blocks);
  }
  [[nodiscard]] Status cosines(const SetWork& sets, float* cosine, bool masks) noexcept {
    return with_dtype(cache_.key_dtype, [&](auto dtype) {
      constexpr DType D = decltype(dtype)::value;
      const u32 bytes = cache_.key_row_bytes();
      if (bytes <= 128) return cosines_of<D, 1>(sets, cosine, masks);
      if (bytes <= 256) return cosines_of<D, 2>(sets, cosine, masks);
      if (bytes <= 512) return cosines_of<D, 4>(sets, cosine, masks);
      if (bytes <= 1024) return cosines_of<D, 8>(sets, cosine, masks);
      const u32 blocks = ceil_div(larger(cache_.max_tokens, 1u), cosine_teams);
      return chain_.run(u64{shape_.segments} * blocks, cosine_threads, adjacent_cosines_wide<D>,
                        sets, cosine, masks, blocks);
    });
  }
  [[nodiscard]] Status measure(const SetWork& sets, const WeightWork& weights,
                               const Rotation& rotation) noexcept {
    const u32 blocks = ceil_div(larger(cache_.max_tokens, 1u), distance_terms);
    const u64 all = u64{shape_.segments} * blocks;
    return with_dtype(cache_.key_dtype, [&](auto dtype) {
      constexpr DType D = decltype(dtype)::value;
      return rotation.pairs != 0 ? chain_.run(all, distance_threads, measure_distances<D, true>,
                                              sets, weights, rotation, blocks)
                                 : chain_.run(all, distance_threads, measure_distances<D, false>,
                                              sets, weights, rotation, blocks);
    });
  }

  const CacheView& cache_;
  const KVMergerReducer& reducer_;
  const MergeScores& scores_;
  const u32* limit_;
  const SelectOptions& options_;
  const Context& context_;
  const PlanView& plan_;
  MergerShape shape_;
  KernelChain chain_;
};

}  // namespace detail

/// Workspace bytes that reduce() with a KVMergerReducer needs at most: about 33 bytes a token and
/// 62 KiB a segment.
[[nodiscard]] inline std::size_t bytes_required(const CacheView& cache, const KVMergerReducer&,
                                                const SelectOptions& options) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_scratch(detail::MergerShape(cache, options), counting));
  const std::size_t own = counting.bytes_required();
  return options.sharing.kind == SharingKind::whole_pages
             ? own + select_bytes_required(cache, options)
             : own;
}

/// KVMergerReducer::reduce() for all layers and sequences of a step: the CPU's sets, pivots and
/// evictions from the same score bits wherever the cosines fall on the same side of the cut
/// (cosines are float sums in another order), and its weights to float accuracy. `limit`
/// [segments] lies in device memory; of `options` only protection and sharing count. `plan` comes
/// from take_plan(plan_shape(...)); what it needs is added to plan.needs. Keys are read twice: once
/// for the cosines of neighbours, once, for members of sets, for distances to the pivots.
/// O(tokens * d); 16 launches in the slot form.
///
/// Errors, at once: invalid_option, needs_rope, invalid_rope, null_pointer, invalid_shape,
/// shape_mismatch, destination_too_small, needs_log_mass (the plan has no room for it),
/// workspace_too_small, launch_failed. On the error word: destination_too_small (more sets than
/// plan.max_slots; that segment's length is 0 then), shape_mismatch (heads that share tokens
/// differ), budget_below_protected (whole pages).
[[nodiscard]] inline Status reduce(const Context& context, const CacheView& cache,
                                   const KVMergerReducer& reducer, const MergeScores& scores,
                                   const u32* limit, const SelectOptions& options,
                                   PlanView& plan) noexcept {
  KVLEAN_RETURN_IF_ERROR(reducer.check());
  Rotation rotation;
  rotation.pairs = 0;
  if (reducer.keys == MergedKeys::aligned) {
    if (cache.rope == nullptr) return StatusCode::needs_rope;
    KVLEAN_RETURN_IF_ERROR(Rotation::of(cache.rope, cache.key_width, rotation));
  }
  KVLEAN_RETURN_IF_ERROR(detail::check_merge(cache, scores, limit, options, plan));
  const bool biased = cache.has_log_mass || reducer.log_mass != LogMass::none;
  if (biased && plan.log_mass == nullptr) return StatusCode::needs_log_mass;
  const bool scaled = reducer.values == ValueScale::paper_set_size;
  if (!plan.has_terms() || (scaled && plan.term_value_weight == nullptr)) {
    return StatusCode::null_pointer;
  }
  PlanView out = plan;
  if (!scaled) out.self_value_weight = out.term_value_weight = nullptr;
  detail::MergerRun run(cache, reducer, scores, limit, options, context, out);
  KVLEAN_RETURN_IF_ERROR(run.run(rotation));
  out.needs |= needs_changed_values | kvlean::detail::key_needs(reducer.keys);
  if (out.log_mass != nullptr) out.needs |= needs_log_mass;
  if (options.sharing.kind == SharingKind::whole_pages) {
    out.page_tokens = options.sharing.page_tokens;
  }
  plan = out;
  return StatusCode::ok;
}

KVLEAN_CUDA_NAMESPACE_END
