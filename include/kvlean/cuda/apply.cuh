// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/fold_rows.cuh"

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

[[nodiscard]] inline bool rewrites_rows(const PlanView& plan, const CacheView& cache) noexcept {
  return plan.has_terms() || plan.self_weight != nullptr || plan.self_value_weight != nullptr ||
         (plan.position != nullptr && cache.rope != nullptr);
}

[[nodiscard]] inline Status check_apply(const PlanView& plan, const CacheView& cache,
                                        const CacheView& destination) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_cache(cache));
  KVLEAN_RETURN_IF_ERROR(check_cache(destination));
  if (plan.length == nullptr || plan.anchor == nullptr) return StatusCode::null_pointer;
  if (plan.segments != cache.num_segments() || plan.segments != destination.num_segments() ||
      destination.key_width != cache.key_width || destination.value_width != cache.value_width ||
      destination.key_dtype != cache.key_dtype || destination.value_dtype != cache.value_dtype ||
      destination.num_sequences != cache.num_sequences) {
    return StatusCode::shape_mismatch;
  }
  if (plan.page_tokens != 0) return StatusCode::invalid_plan;
  if (!destination.has_positions && (plan.position != nullptr || cache.has_positions)) {
    return StatusCode::needs_positions;
  }
  if (!destination.has_log_mass && (plan.log_mass != nullptr || cache.has_log_mass)) {
    return StatusCode::needs_log_mass;
  }
  if ((plan.needs & needs_aligned_terms) != 0 && cache.rope == nullptr) {
    return StatusCode::needs_rope;
  }
  return StatusCode::ok;
}

[[nodiscard]] inline Status fold(const Context& context, const PlanView& plan,
                                 const CacheView& cache, const CacheView& destination,
                                 bool in_place, const Rotation& rotation) noexcept {
  Status status = StatusCode::ok;
  with_dtype(cache.key_dtype, [&](auto key) noexcept {
    with_dtype(cache.value_dtype, [&](auto value) noexcept {
      if (rotation.pairs == 0) {
        const u32 slots = fold_warps * fold_slots;
        status = launch(context,
                        {.grid = dim3(ceil_div(plan.max_slots, slots), plan.segments),
                         .block = fold_threads,
                         .overlap = true},
                        fold_rows_kernel<key(), value()>, plan, cache, destination, in_place,
                        static_cast<const u32*>(context.error));
        return;
      }
      const u32 bytes = larger(cache.key_row_bytes(), cache.value_row_bytes());
      const u32 lanes = bytes <= 256 ? 16 : 32;
      const u32 teams = move_threads / lanes;
      const LaunchShape shape{.grid = dim3(ceil_div(plan.max_slots, teams), plan.segments),
                              .block = move_threads};
      if (lanes == 16) {
        status = launch(context, shape, fold_kernel<key(), value(), 16>, plan, cache, destination,
                        in_place, rotation, static_cast<const u32*>(context.error));
      } else {
        status = launch(context, shape, fold_kernel<key(), value(), 32>, plan, cache, destination,
                        in_place, rotation, static_cast<const u32*>(context.error));
      }
    });
  });
  return status;
}

[[nodiscard]] inline Status finish_apply(const Context& context, const PlanView& plan,
                                         const CacheView& cache,
                                         const CacheView& destination) noexcept {
  const u32 threads = larger(plan.segments, destination.num_sequences);
  return launch(context, {.grid = ceil_div(threads, 128u), .block = 128}, finish_apply_kernel<>,
                plan, cache, destination, static_cast<const u32*>(context.error));
}

/// Slots that a block of compact_kernel moves at a time.
[[nodiscard]] inline u32 chunk_slots(const CacheView& cache) noexcept {
  const u32 bytes = cache.key_row_bytes() + cache.value_row_bytes();
  u32 slots = 128;
  while (slots > 1 && slots * bytes > 48 * 1024) slots /= 2;
  return slots;
}
[[nodiscard]] inline Turns take_turns(const PlanView& plan, const CacheView& cache,
                                      Workspace& workspace) noexcept {
  Turns turns;
  turns.chunk_slots = chunk_slots(cache);
  turns.chunks = ceil_div(plan.max_slots, turns.chunk_slots);
  turns.ticket = workspace.take<u32>(1 + std::size_t{turns.chunks} * plan.segments);
  turns.has_read = turns.ticket + 1;
  return turns;
}

}  // namespace detail

/// Carries out a plan into another cache with room of its own for every segment: kvlean::apply on
/// the device. Plain slots keep their anchors' bits; blends and turns are computed in float and
/// rounded once, with one difference to the CPU: products and sums are fused, so a rounded element
/// may differ by one unit in its last place. Three launches for all layers and sequences.
///
/// The destination's descriptors give each segment's place and capacity (see pack_segments() for a
/// flat ragged store); its lengths and next positions are written. It overlaps nothing of the
/// source. Literal rows and whole pages are not plans of this backend.
///
/// Errors: those of check_cache, null_pointer, shape_mismatch, invalid_plan (pages),
/// needs_positions, needs_log_mass, needs_rope, those of RopeSpec::check, launch_failed. On the
/// device: destination_too_small; then, as after any earlier report, nothing is written.
[[nodiscard]] inline Status apply(const Context& context, const PlanView& plan,
                                  const CacheView& cache, const CacheView& destination) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_apply(plan, cache, destination));
  Rotation rotation;
  const bool turns = plan.position != nullptr || (plan.needs & needs_aligned_terms) != 0;
  KVLEAN_RETURN_IF_ERROR(Rotation::of(turns ? cache.rope : nullptr, cache.key_width, rotation));
  KVLEAN_RETURN_IF_ERROR(launch(context, {.grid = ceil_div(plan.segments, 128u), .block = 128},
                                detail::check_capacity_kernel<>, plan, destination, context.error));
  if (detail::rewrites_rows(plan, cache)) {
    KVLEAN_RETURN_IF_ERROR(detail::fold(context, plan, cache, destination, false, rotation));
  } else {
    const u32 bytes = larger(cache.key_row_bytes(), cache.value_row_bytes());
    const u32 lanes = bytes <= 256 ? 16 : 32;
    const u32 slots = detail::move_threads / lanes * detail::slots_in_flight;
    KVLEAN_RETURN_IF_ERROR(
        launch(context,
               {.grid = dim3(ceil_div(plan.max_slots, slots), plan.segments),
                .block = detail::move_threads},
               lanes == 16 ? detail::gather_kernel<16> : detail::gather_kernel<32>, plan, cache,
               destination, cache.key_row_bytes(), cache.value_row_bytes(),
               static_cast<const u32*>(context.error)));
  }
  return detail::finish_apply(context, plan, cache, destination);
}

/// Bytes of device workspace that apply_in_place takes.
[[nodiscard]] inline std::size_t apply_in_place_bytes_required(const PlanView& plan,
                                                               const CacheView& cache) noexcept {
  Workspace counting = Workspace::counting();
  static_cast<void>(detail::take_turns(plan, cache, counting));
  return counting.bytes_required();
}

/// The same within the cache's own memory: changed rows are written at their anchors, then all
/// move down. Rows are read once and written once; blocks wait only for those that still read where
/// they write. Four launches and a memset at most.
/// Errors: as apply, and workspace_too_small; row_too_wide for keys above 2048 bytes that turn.
[[nodiscard]] inline Status apply_in_place(const Context& context, const PlanView& plan,
                                           const CacheView& cache) noexcept {
  KVLEAN_RETURN_IF_ERROR(detail::check_apply(plan, cache, cache));
  Rotation rotation;
  const bool turns = plan.position != nullptr || (plan.needs & needs_aligned_terms) != 0;
  KVLEAN_RETURN_IF_ERROR(Rotation::of(turns ? cache.rope : nullptr, cache.key_width, rotation));
  if (rotation.pairs != 0 && cache.key_row_bytes() > 2048) return StatusCode::row_too_wide;
  const WorkspaceScope scope(context.workspace);
  const detail::Turns order = detail::take_turns(plan, cache, context.workspace);
  KVLEAN_RETURN_IF_ERROR(context.workspace.status());
  KVLEAN_RETURN_IF_ERROR(status_of(cudaMemsetAsync(
      order.ticket, 0, (1 + std::size_t{order.chunks} * plan.segments) * sizeof(u32),
      context.stream)));
  KVLEAN_RETURN_IF_ERROR(launch(context, {.grid = ceil_div(plan.segments, 128u), .block = 128},
                                detail::check_capacity_kernel<>, plan, cache, context.error));
  if (detail::rewrites_rows(plan, cache)) {
    KVLEAN_RETURN_IF_ERROR(detail::fold(context, plan, cache, cache, true, rotation));
  }
  const std::size_t shared =
      std::size_t{order.chunk_slots} * (cache.key_row_bytes() + cache.value_row_bytes());
  KVLEAN_RETURN_IF_ERROR(raise_shared_bytes(detail::compact_kernel<>, shared));
  KVLEAN_RETURN_IF_ERROR(launch(
      context,
      {.grid = order.chunks * plan.segments, .block = detail::move_threads, .shared_bytes = shared},
      detail::compact_kernel<>, plan, cache, cache.key_row_bytes(), cache.value_row_bytes(), order,
      static_cast<const u32*>(context.error)));
  return detail::finish_apply(context, plan, cache, cache);
}

KVLEAN_CUDA_NAMESPACE_END
