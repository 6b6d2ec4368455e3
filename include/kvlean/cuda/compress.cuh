// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>

#include "kvlean/apply/in_place.hpp"
#include "kvlean/cuda/apply.cuh"
#include "kvlean/cuda/merge_tile.cuh"
#include "kvlean/cuda/policy.cuh"
#include "kvlean/cuda/ragged_store.cuh"
#include "kvlean/cuda/score_attention.cuh"
#include "kvlean/cuda/select.cuh"
#include "kvlean/reduce/kvmerger_options.hpp"

// A whole compression in one call: score, select, merge where the policy does, move rows.

KVLEAN_CUDA_NAMESPACE_BEGIN

/// A packed destination: pack_segments() cuts `pool` by the lengths of the plan.
struct PackedDestination {
  CacheView view;  ///< its descriptors, lengths and next positions are written
  FlatPool pool;
  u32 slack = 0;  ///< further slots that each segment is given
};

namespace detail {

template <class R>
inline constexpr bool is_eviction = std::same_as<R, EvictReducer>;
template <class R>
[[nodiscard]] consteval bool wants_mass() noexcept {
  if constexpr (requires { R::wants_mass; }) return R::wants_mass;
  return false;
}
template <class R>
[[nodiscard]] consteval bool prefers_accumulated_mass() noexcept {
  if constexpr (requires { R::prefers_accumulated_mass; }) return R::prefers_accumulated_mass;
  return false;
}
/// The reducer compares mass by observer.
template <class R>
[[nodiscard]] bool wants_observers(const R& reducer) noexcept {
  if constexpr (requires { reducer.per_observer; }) return reducer.per_observer;
  return false;
}

/// What a scorer says of attention received.
enum class MassKind : u8 { none, of_window, accumulated };
template <class S>
[[nodiscard]] MassKind mass_kind(const S& scorer) noexcept {
  if constexpr (std::same_as<S, H2OScorer> || std::same_as<S, ObservedAttentionScorer>) {
    return MassKind::accumulated;
  } else if constexpr (std::same_as<S, SnapKVScorer> || std::same_as<S, TOVAScorer>) {
    return MassKind::of_window;
  } else if constexpr (std::same_as<S, ExternalScorer>) {
    return scorer.is_mass ? MassKind::of_window : MassKind::none;
  } else {
    return MassKind::none;
  }
}

/// Ready-made scores that need no kernel, or empty.
template <class S>
[[nodiscard]] DeviceRagged<const float> ready_scores(const S&, const Observation& seen) noexcept {
  if constexpr (std::same_as<S, ExternalScorer>) return seen.external;
  if constexpr (std::same_as<S, H2OScorer>) return seen.mass;
  return {};
}

[[nodiscard]] inline DeviceRagged<const float> as_const(const DeviceRagged<float>& from) noexcept {
  return {from.data, from.stride, from.first};
}

/// observers[segment][token] as count_observers() and ready_made_observers() of
/// score/observed_mass.hpp have them. Blocks (tokens, segment).
template <int = 0>
__global__ void observers_kernel(const CacheView cache, const Queries queries,
                                 const Attention attention, bool ready_made, u32 most,
                                 DeviceRagged<u32> observers) {
  const u32 s = blockIdx.y;
  const u32 length = cache.lengths[s];
  const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= length) return;
  u32 count = 1;
  if (!ready_made) {
    const SegmentQueries own = SegmentQueries::of(cache, queries, attention, s, length);
    count = observers_of(own, cache.segments[s].position(t));
  } else {
    bool known = true;  // without positions a compressed cache does not tell how old a token is
    if (cache.segments[s].positions == nullptr && cache.next_positions != nullptr) {
      u32 longest = 0;
      const u32 first = s / cache.kv_heads * cache.kv_heads;
      for (u32 other = first; other < first + cache.kv_heads; ++other) {
        longest = larger(longest, cache.lengths[other]);
      }
      known = cache.next_positions[cache.sequence_of(s)] == static_cast<i32>(longest);
    }
    if (known) count = given_observers(cache, s, length, t, most);
  }
  observers.segment(s)[t] = count;
}

/// The next positions of the compressed sequences, by one block.
KVLEAN_DEVICE void write_next_positions(const PlanView& plan, const CacheView& cache,
                                        const CacheView& destination, u32 thread) noexcept {
  if (destination.next_positions == nullptr) return;
  for (u32 q = thread; q < destination.num_sequences; q += blockDim.x) {
    if (plan.next_position >= 0) {
      destination.next_positions[q] = plan.next_position;
    } else if (cache.next_positions != nullptr &&
               cache.next_positions != destination.next_positions) {
      destination.next_positions[q] = cache.next_positions[q];
    }
  }
}

/// What one block does before rows move: checks capacities, and where all is well writes lengths
/// and next positions; other blocks zero `turns`.
template <int = 0>
__global__ void __launch_bounds__(1024)
    begin_apply_kernel(const PlanView plan, const CacheView cache, const CacheView destination,
                       u32* turns, u32 turns_count, ErrorWord error) {
  wait_for_previous();
  allow_next();
  if (blockIdx.x != 0) {
    for (u32 i = (blockIdx.x - 1) * 1024 + threadIdx.x; i < turns_count;
         i += (gridDim.x - 1) * 1024) {
      turns[i] = 0;
    }
    return;
  }
  bool fits = true;
  for (u32 s = threadIdx.x; s < plan.segments; s += 1024) {
    fits = fits && plan.length[s] <= destination.segments[s].capacity;
  }
  if (!__syncthreads_and(fits ? 1 : 0)) {
    if (threadIdx.x == 0) report(error, StatusCode::destination_too_small);
    return;
  }
  if (has_failed(error)) return;
  for (u32 s = threadIdx.x; s < plan.segments; s += 1024) {
    destination.lengths[s] = plan.length[s];
  }
  write_next_positions(plan, cache, destination, threadIdx.x);
}

/// Everything that carrying out an eviction takes, where there are at most move_threads segments:
/// every block finds out by itself where its segment goes and whether all fit. Blocks (slots,
/// segment); the first of a segment also writes what describes it.
template <u32 Lanes>
__global__ void __launch_bounds__(move_threads)
    gather_all_kernel(const PlanView plan, const CacheView cache, const CacheView destination,
                      const FlatPool pool, bool packs, u32 slack, u32 key_bytes, u32 value_bytes,
                      ErrorWord error) {
  __shared__ u64 sums[2][move_threads / warp_threads];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 count = plan.length[s];
  const u32 first = blockIdx.x * (move_threads / Lanes) * slots_in_flight;
  if (first >= count && blockIdx.x != 0) return;
  const bool leads = blockIdx.x == 0 && threadIdx.x == 0;
  Segment to;
  bool fits = true;
  u64 begin = 0;
  u64 all = 0;
  if (packs) {
    const u64 room = threadIdx.x < plan.segments ? u64{plan.length[threadIdx.x]} + slack : 0;
    const u64 before = warp_sum(threadIdx.x < s ? room : 0);
    const u64 total = warp_sum(room);
    if (threadIdx.x % warp_threads == 0) {
      sums[0][threadIdx.x / warp_threads] = before;
      sums[1][threadIdx.x / warp_threads] = total;
    }
    __syncthreads();
#pragma unroll
    for (u32 w = 0; w < move_threads / warp_threads; ++w) {
      begin += sums[0][w];
      all += sums[1][w];
    }
    fits = all <= pool.slots;
    to = packed_segment(pool, destination, cache.segments[s], begin, count + slack);
  } else {
    fits = threadIdx.x >= plan.segments ||
           plan.length[threadIdx.x] <= destination.segments[threadIdx.x].capacity;
    fits = __syncthreads_and(fits ? 1 : 0) != 0;
    to = destination.segments[s];
  }
  if (!fits && leads && s == 0) report(error, StatusCode::destination_too_small);
  if (!fits || has_failed(error)) return;
  if (leads) {
    destination.lengths[s] = count;
    if (packs) {
      destination.segments[s] = to;
      if (pool.cu_lengths != nullptr) {
        pool.cu_lengths[s] = static_cast<i32>(begin);
        if (s == 0) pool.cu_lengths[plan.segments] = static_cast<i32>(all);
      }
    }
  }
  if (blockIdx.x == 0 && s == 0) write_next_positions(plan, cache, destination, threadIdx.x);
  if (first >= count) return;
  gather_slots<Lanes>(plan, s, count, first, cache.segments[s], to, key_bytes, value_bytes);
}

/// Where the rows of a plan go.
struct Target {
  CacheView view;
  const FlatPool* pool = nullptr;
  u32 slack = 0;
  bool in_place = false;
};

/// apply() and apply_in_place() with fewer launches: one where rows only move elsewhere; otherwise
/// one before the rows, one or two that move them, one more where the destination is packed.
[[nodiscard]] inline Status carry_out(const Context& context, const PlanView& plan,
                                      const CacheView& cache, const Target& target,
                                      const Rotation& rotation) noexcept {
  const CacheView& to = target.view;
  const WorkspaceScope scope(context.workspace);
  Turns turns;
  u32 turns_count = 0;
  if (target.in_place) {
    turns = take_turns(plan, cache, context.workspace);
    turns_count = 1 + turns.chunks * plan.segments;
    KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  }
  const bool rewrites = rewrites_rows(plan, cache);
  const u32 lanes = larger(cache.key_row_bytes(), cache.value_row_bytes()) <= 256 ? 16 : 32;
  const u32 slots = move_threads / lanes * slots_in_flight;
  if (!target.in_place && !rewrites && plan.segments <= move_threads) {
    const bool packs = target.pool != nullptr;
    if (packs) KVLEAN_RETURN_IF_ERROR(check_pool(*target.pool, to));
    return launch(context,
                  {.grid = dim3(larger(ceil_div(plan.max_slots, slots), 1u), plan.segments),
                   .block = move_threads,
                   .overlap = true},
                  lanes == 16 ? gather_all_kernel<16> : gather_all_kernel<32>, plan, cache, to,
                  packs ? *target.pool : FlatPool{}, packs, target.slack, cache.key_row_bytes(),
                  cache.value_row_bytes(), context.error);
  }
  if (target.pool != nullptr) {
    KVLEAN_RETURN_IF_ERROR(
        pack_segments(context, plan.length, target.slack, *target.pool, cache, to));
  }
  const u32 zero_blocks = smaller(ceil_div(turns_count, 4096u), 128u);
  KVLEAN_RETURN_IF_ERROR(launch(context, {.grid = 1 + zero_blocks, .block = 1024, .overlap = true},
                                begin_apply_kernel<>, plan, cache, to, turns.ticket, turns_count,
                                context.error));
  const u32* error = context.error;
  if (rewrites) {
    KVLEAN_RETURN_IF_ERROR(fold(context, plan, cache, to, target.in_place, rotation));
  }
  if (target.in_place) {
    const std::size_t shared =
        std::size_t{turns.chunk_slots} * (cache.key_row_bytes() + cache.value_row_bytes());
    KVLEAN_RETURN_IF_ERROR(raise_shared_bytes(compact_kernel<>, shared));
    return launch(context,
                  {.grid = turns.chunks * plan.segments,
                   .block = move_threads,
                   .shared_bytes = shared,
                   .overlap = !rewrites},
                  compact_kernel<>, plan, cache, cache.key_row_bytes(), cache.value_row_bytes(),
                  turns, error);
  }
  if (rewrites) return StatusCode::ok;
  return launch(context,
                {.grid = dim3(ceil_div(plan.max_slots, slots), plan.segments),
                 .block = move_threads,
                 .overlap = true},
                lanes == 16 ? gather_kernel<16> : gather_kernel<32>, plan, cache, to,
                cache.key_row_bytes(), cache.value_row_bytes(), error);
}

/// Arrays between the stages of one compression.
struct CompressScratch {
  PlanView plan;
  DeviceRagged<float> rank;
  DeviceRagged<float> mass;
  DeviceRagged<u32> observers;
  u32* limit = nullptr;
};

/// Slots that a segment can have at most, as far as the host knows.
template <class S, class R>
[[nodiscard]] u32 most_slots(const CacheView& cache, const Policy<S, R>& policy,
                             const Budget& budget) noexcept {
  // Other allocators may give one segment everything, and sets below a threshold merge as they are.
  if (policy.select.allocator != AllocatorKind::uniform || !is_eviction<R>) {
    return cache.max_tokens;
  }
  const u32 nominal = budget.slots_for(cache.max_tokens);
  const u32 covered = policy.select.protection.count(cache.max_tokens, cache.frozen);
  return smaller(cache.max_tokens, larger(larger(nominal, covered), 1u));
}

template <class S, class R>
[[nodiscard]] CompressScratch take_scratch(const CacheView& cache, const Policy<S, R>& policy,
                                           const Budget& budget, const Observation& seen,
                                           Workspace& workspace) noexcept {
  CompressScratch scratch;
  const u32 slots = most_slots(cache, policy, budget);
  PlanShape shape;
  shape.segments = cache.num_segments();
  shape.max_slots = slots;
  if constexpr (!is_eviction<R>) shape = plan_shape(cache, policy.reducer, slots);
  scratch.plan = take_plan(shape, workspace);
  const u64 stride = ceil_div(u64{cache.max_tokens}, u64{32}) * 32;
  const std::size_t all = cache.num_segments() * stride;
  scratch.rank.stride = scratch.mass.stride = scratch.observers.stride = stride;
  if (!ready_scores(policy.scorer, seen)) scratch.rank.data = workspace.take<float>(all);
  if constexpr (!is_eviction<R>) {
    scratch.limit = workspace.take<u32>(cache.num_segments());
    if constexpr (wants_mass<R>()) scratch.mass.data = workspace.take<float>(all);
    if (wants_observers(policy.reducer)) scratch.observers.data = workspace.take<u32>(all);
  }
  return scratch;
}

template <class S>
[[nodiscard]] Status score_step(const Context& context, const CacheView& cache, const S& scorer,
                                const Observation& seen, const Scores& scores, u64 seed,
                                u32 step) noexcept {
  if constexpr (std::same_as<S, RandomScorer>) {
    return score(context, cache, scorer, seen, scores, seed, step);
  } else {
    return score(context, cache, scorer, seen, scores);
  }
}

/// Plans into `scratch`.
template <class S, class R>
[[nodiscard]] Status plan_step(const Context& context, const CacheView& cache,
                               const Policy<S, R>& policy, const Budget& budget,
                               const Observation& seen, CompressScratch& scratch) noexcept {
  SelectOptions options = policy.select;
  options.budget = budget;
  DeviceRagged<const float> rank = ready_scores(policy.scorer, seen);
  if constexpr (std::same_as<S, ExternalScorer>) {
    if (!rank) return StatusCode::missing_observation;
  }
  if constexpr (is_eviction<R>) {
    if (!rank) {
      KVLEAN_RETURN_IF_ERROR(score_step(context, cache, policy.scorer, seen,
                                        Scores{scratch.rank, {}}, policy.seed, policy.step));
      rank = as_const(scratch.rank);
    }
    options.recent_share = policy.reducer.recent_share;
    Selection selection;
    selection.plan = scratch.plan;
    return select(cache, rank, options, context, selection);
  } else {
    MassKind kind = mass_kind(policy.scorer);
    const bool accumulates =
        wants_mass<R>() &&
        (kind == MassKind::none || (kind == MassKind::of_window && prefers_accumulated_mass<R>()));
    const bool replaces = accumulates && (seen.mass || seen.reference.count != 0);
    DeviceRagged<const float> mass;
    if (rank) {
      if (kind != MassKind::none) mass = rank;
    } else {
      Scores scores{scratch.rank, {}};
      if (kind != MassKind::none && !replaces && wants_mass<R>()) {
        scores.mass = std::same_as<S, H2OScorer> ? scratch.rank : scratch.mass;
        mass = as_const(scores.mass);
      }
      KVLEAN_RETURN_IF_ERROR(
          score_step(context, cache, policy.scorer, seen, scores, policy.seed, policy.step));
      rank = as_const(scratch.rank);
    }
    if (replaces) {
      kind = MassKind::accumulated;
      if (seen.mass) {
        mass = seen.mass;
      } else {
        KVLEAN_RETURN_IF_ERROR(accumulate_attention(context, cache, seen.reference, seen.attention,
                                                    GroupReduction::mean, scratch.mass));
        mass = as_const(scratch.mass);
      }
    }
    MergeScores scores{rank, mass, {}};
    if (wants_observers(policy.reducer) && mass) {
      const bool ready = kind == MassKind::accumulated && seen.mass;
      Queries queries = kind == MassKind::accumulated ? seen.reference : window_queries(seen);
      bool known = kind == MassKind::accumulated && (!ready || seen.observers != 0);
      if constexpr (std::same_as<S, ObservedAttentionScorer>) known = true;
      if constexpr (std::same_as<S, SnapKVScorer>) {
        if (kind == MassKind::of_window) {
          known = true;
          if (policy.scorer.window != 0) queries = queries.last(policy.scorer.window);
        }
      }
      if (known) {
        KVLEAN_RETURN_IF_ERROR(launch(context, {.grid = token_grid(cache), .block = 256},
                                      observers_kernel<>, cache, queries, seen.attention, ready,
                                      seen.observers, scratch.observers));
        scores.observers = {scratch.observers.data, scratch.observers.stride, nullptr};
      }
    }
    KVLEAN_RETURN_IF_ERROR(allocate(cache, rank, options, context, scratch.limit));
    if constexpr (requires {
                    reduce(context, cache, policy.reducer, scores, scratch.limit, options,
                           scratch.plan, {policy.seed, policy.step});
                  }) {  // reducers that draw
      return reduce(context, cache, policy.reducer, scores, scratch.limit, options, scratch.plan,
                    {policy.seed, policy.step});
    } else {
      return reduce(context, cache, policy.reducer, scores, scratch.limit, options, scratch.plan);
    }
  }
}

/// What can be refused before the first launch.
template <class S, class R>
[[nodiscard]] Status check_compress(const CacheView& cache, const Policy<S, R>& policy,
                                    const Budget& budget) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(budget.check());
  KVLEAN_RETURN_IF_ERROR(policy.select.check(cache.num_layers));
  if constexpr (is_eviction<R>) {
    const float share = policy.reducer.recent_share;
    if (!(share >= 0.0f && share <= 1.0f)) return StatusCode::invalid_option;
  } else {
    // Folding whole pages as they are is not a plan of this backend.
    if (policy.select.sharing.kind == SharingKind::whole_pages) return StatusCode::invalid_plan;
  }
  return StatusCode::ok;
}

template <class S, class R>
[[nodiscard]] Status compress_to(const Context& context, const CacheView& cache,
                                 const Policy<S, R>& policy, const Budget& budget,
                                 const Observation& seen, const Target& target) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_compress(cache, policy, budget));
  const WorkspaceScope scope(context.workspace);
  CompressScratch scratch = take_scratch(cache, policy, budget, seen, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  PlanView& plan = scratch.plan;
  KVLEAN_RETURN_IF_ERROR(check_apply(plan, cache, target.view));
  Rotation rotation;
  if constexpr (requires { policy.reducer.keys; }) {
    const bool turns = policy.reducer.keys == MergedKeys::aligned;
    if (turns && cache.rope == nullptr) return StatusCode::needs_rope;
    KVLEAN_RETURN_IF_ERROR(Rotation::of(turns ? cache.rope : nullptr, cache.key_width, rotation));
    if (target.in_place && rotation.pairs != 0 && cache.key_row_bytes() > 2048) {
      return StatusCode::row_too_wide;
    }
  }
  KVLEAN_RETURN_IF_ERROR(plan_step(context, cache, policy, budget, seen, scratch));
  return carry_out(context, plan, cache, target, rotation);
}

}  // namespace detail

/// Workspace bytes that plan() and compress() take at most for these shapes. Of `seen` only shapes
/// and what is present count; pass what the call will get.
template <class S, class R>
[[nodiscard]] std::size_t compress_bytes_required(const CacheView& cache,
                                                  const Policy<S, R>& policy, const Budget& budget,
                                                  const Observation& seen) noexcept {
  Workspace counting = Workspace::counting();
  const detail::CompressScratch scratch =
      detail::take_scratch(cache, policy, budget, seen, counting);
  SelectOptions options = policy.select;
  options.budget = budget;
  std::size_t stage = select_bytes_required(cache, options);
  if constexpr (requires { score_bytes_required(cache, policy.scorer, seen); }) {
    if (!detail::ready_scores(policy.scorer, seen)) {
      stage = larger(stage, score_bytes_required(cache, policy.scorer, seen));
    }
  }
  if constexpr (!detail::is_eviction<R>) {
    stage = larger(stage, bytes_required(cache, policy.reducer, options));
    if (detail::wants_mass<R>() && !seen.mass && seen.reference.count != 0) {
      stage =
          larger(stage, attention_mass_bytes_required(cache, seen.reference, GroupReduction::mean));
    }
  }
  stage = larger(stage, apply_in_place_bytes_required(scratch.plan, cache));
  return counting.bytes_required() + stage;
}

/// Plans all layers and sequences of a step: kvlean::PolicyInterface::plan() on the device. The
/// plan lies in the workspace, behind what was taken before, and stays valid until the caller
/// rewinds it. Where every token fits it is the identity. Errors: those of the stages.
template <class S, class R>
[[nodiscard]] Status plan(const Context& context, const CacheView& cache,
                          const Policy<S, R>& policy, const Budget& budget, const Observation& seen,
                          PlanView& out) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_compress(cache, policy, budget));
  const std::size_t mark = context.workspace.mark();
  detail::CompressScratch scratch =
      detail::take_scratch(cache, policy, budget, seen, context.workspace);
  Status status = context.workspace.status();
  if (status) status = detail::plan_step(context, cache, policy, budget, seen, scratch);
  if (status) {
    out = scratch.plan;
  } else {
    context.workspace.rewind(mark);
  }
  return status;
}

/// Compresses all layers and sequences of a step within the cache's own memory: plan and apply in
/// one call. Puts kernels on the caller's stream and nothing else: no allocation, no wait, no read
/// back, so it can be captured in a graph and replayed on whatever the cache then holds. Eviction
/// with ready scores takes two launches (short segments, elsewhere) to eight; score() and reduce()
/// say what they add.
///
/// `seen` must hold what the scorer reads; H2OScorer and ExternalScorer read ready-made scores
/// where they lie. Lengths and next positions are written on the device; the host never learns the
/// counts. The workspace is left as it was found; its bytes may be used again behind this call on
/// the same stream.
///
/// Errors, at once: those of check_cache, the scorer, select() and the reducer, needs_positions,
/// needs_log_mass, needs_rope, invalid_plan (a merging reducer with whole pages),
/// workspace_too_small, launch_failed. On the device's error word: those of select() and the
/// reducer, destination_too_small; then the cache is as it was.
template <class S, class R>
[[nodiscard]] Status compress(const Context& context, const CacheView& cache,
                              const Policy<S, R>& policy, const Budget& budget,
                              const Observation& seen, in_place_t) noexcept {
  return detail::compress_to(context, cache, policy, budget, seen, {cache, nullptr, 0, true});
}

/// The same into another cache, whose segments have room of their own: `destination` overlaps
/// nothing of `cache`, which stays as it is.
template <class S, class R>
[[nodiscard]] Status compress(const Context& context, const CacheView& cache,
                              const Policy<S, R>& policy, const Budget& budget,
                              const Observation& seen, const CacheView& destination) noexcept {
  return detail::compress_to(context, cache, policy, budget, seen,
                             {destination, nullptr, 0, false});
}

/// The same into a packed store: each segment gets as many slots as its plan has, and the slack.
template <class S, class R>
[[nodiscard]] Status compress(const Context& context, const CacheView& cache,
                              const Policy<S, R>& policy, const Budget& budget,
                              const Observation& seen,
                              const PackedDestination& destination) noexcept {
  return detail::compress_to(context, cache, policy, budget, seen,
                             {destination.view, &destination.pool, destination.slack, false});
}

KVLEAN_CUDA_NAMESPACE_END
