// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "kvlean/core/executor.hpp"
#include "kvlean/core/validate_plan.hpp"
#include "kvlean/core/workspace.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Options of renumber().
struct RenumberOptions {
  u32 sinks = 0;           ///< tokens that stand below this position stay there (attention sinks)
  i32 next_position = -1;  ///< next position to end at; negative: the smallest that fits
};

namespace detail {

/// Leading slots of a segment that keep their position: frozen ones and sinks.
[[nodiscard]] inline u32 pinned_slots(const CompressionPlan& plan, const CacheView& cache, u32 s,
                                      u32 sinks) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  u32 pinned = cache.frozen;
  while (pinned < plan.length[s] && i64{cache.position(s, anchor[pinned])} < i64{sinks}) ++pinned;
  return pinned;
}

/// Smallest next position at which a segment's slots stand behind its pinned ones.
[[nodiscard]] inline i64 smallest_next_position(const CompressionPlan& plan, const CacheView& cache,
                                                u32 s, u32 pinned) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  const i64 behind = pinned != 0 ? i64{cache.position(s, anchor[pinned - 1])} + 1 : 0;
  return behind + i64{plan.length[s] - pinned};
}

/// Positions of moved tokens are lost when nothing stores them; then no shift can be told.
[[nodiscard]] inline bool positions_are_known(const CacheView& cache) noexcept {
  if (cache.positions) return true;
  for (u32 s = 0; s < cache.segments; ++s) {
    if (i64{cache.length(s)} != i64{cache.next_position}) return false;
  }
  return true;
}

}  // namespace detail

/// Gives the slots of all layers of one sequence contiguous positions, so that a stream may outrun
/// the context the model was trained for (arXiv 2309.17453 numbers tokens by their place in the
/// cache). Writes each plan's `position` and `next_position` and sets needs_new_positions; apply()
/// then turns the keys. Plan i is for cache i; layers that keep everything need a plan as well,
/// because all share the next position.
///
/// The next position P is the smallest that fits the longest segment of all, or the one asked for.
/// Slot j of a segment of n slots gets P - n + j: segments end together, so distances among the
/// newest tokens are kept, and shorter segments start later. Frozen tokens stay where they are, and
/// so do tokens that stand below position `sinks`, of those segments that still hold them; a gap
/// may follow. Pinned rows are never turned: their bits last through any number of calls. The
/// others drift a little each time (see RopeRotation), so call it when the context is nearly full.
///
/// Queries remembered from before apply() must follow, by query_shift() and rotate_rows().
///
/// Errors, all found before the first write: those of validate_plan; shape_mismatch (as many plans
/// as caches, one next position for all caches); needs_rope (a cache without a rotation; a model
/// without RoPE says so by a RopeSpec of RopePairing::none); needs_positions (no positions array,
/// though tokens were dropped before, so where they stand is lost); invalid_option (the next
/// position asked for does not fit, or P does not fit its type); workspace_too_small or
/// out_of_memory. Takes 4 bytes a slot. O(slots + terms).
[[nodiscard]] inline Status renumber(std::span<CompressionPlan> plans,
                                     std::span<const CacheView> caches, Workspace& workspace,
                                     const RenumberOptions& options = {}) noexcept {
  if (plans.size() != caches.size()) return StatusCode::shape_mismatch;
  i64 next = 0;
  std::size_t slots = 0;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    const CompressionPlan& plan = plans[i];
    const CacheView& cache = caches[i];
    KVLEAN_RETURN_IF_ERROR(validate_plan(plan, cache));
    if (cache.rope == nullptr) return StatusCode::needs_rope;
    if (cache.next_position != caches[0].next_position) return StatusCode::shape_mismatch;
    if (!detail::positions_are_known(cache)) return StatusCode::needs_positions;
    for (u32 s = 0; s < plan.segments; ++s) {
      const u32 pinned = detail::pinned_slots(plan, cache, s, options.sinks);
      next = std::max(next, detail::smallest_next_position(plan, cache, s, pinned));
    }
    slots += static_cast<std::size_t>(plan.num_slots());
  }
  if (options.next_position >= 0) {
    if (i64{options.next_position} < next) return StatusCode::invalid_option;
    next = options.next_position;
  }
  if (next > i64{std::numeric_limits<i32>::max()}) return StatusCode::invalid_option;
  i32* position = workspace.take<i32>(slots);
  if (position == nullptr) return workspace.exhausted();

  for (std::size_t i = 0; i < plans.size(); ++i) {
    CompressionPlan& plan = plans[i];
    const CacheView& cache = caches[i];
    for (u32 s = 0; s < plan.segments; ++s) {
      const u32 pinned = detail::pinned_slots(plan, cache, s, options.sinks);
      for (u32 j = 0; j < plan.length[s]; ++j) {
        const u64 slot = plan.first[s] + j;
        position[slot] = j < pinned ? cache.position(s, plan.anchor[slot])
                                    : static_cast<i32>(next - i64{plan.length[s]} + i64{j});
      }
    }
    plan.position = position;
    plan.next_position = static_cast<i32>(next);
    plan.needs |= needs_new_positions;
    position += plan.num_slots();
  }
  return StatusCode::ok;
}

/// The same for a sequence of one layer.
template <Cache C>
[[nodiscard]] Status renumber(CompressionPlan& plan, const C& cache, Workspace& workspace,
                              const RenumberOptions& options = {}) noexcept {
  const CacheView view = view_of(cache);
  return renumber(std::span<CompressionPlan>(&plan, 1), std::span<const CacheView>(&view, 1),
                  workspace, options);
}

/// Positions by which queries seen so far move under a plan, new minus old; ask before apply().
template <Cache C>
[[nodiscard]] i64 query_shift(const CompressionPlan& plan, const C& cache) noexcept {
  return plan.next_position >= 0 ? i64{plan.next_position} - i64{view_of(cache).next_position} : 0;
}

/// Moves the first `count` rows of every head by `shift` positions, in place: remembered queries
/// that follow renumbered keys. Float arithmetic, one rounding at the store; a shift of 0 writes
/// nothing. Errors, found before the first write: those of check_rows and RopeSpec::check;
/// read_only. O(heads * count * width); one task a head.
[[nodiscard]] inline Status rotate_rows(const Rows& rows, u32 count, const RopeSpec& rope,
                                        i64 shift, const Executor& executor = {}) noexcept {
  KVLEAN_RETURN_IF_ERROR(check_rows(rows, count));
  RopeRotation rotation;
  KVLEAN_RETURN_IF_ERROR(rotation.prepare(rope, rows.width));
  if (!rows.writable) return StatusCode::read_only;
  if (shift == 0 || rotation.pairs() == 0) return StatusCode::ok;
  RopeTurn turn;
  rotation.turn_by(shift, turn);
  parallel_for(executor, rows.heads, [&](u32, u32 head) noexcept {
    float row[max_row_width];
    for (u32 i = 0; i < count; ++i) {
      load_row(rows, head, i, row);
      rotation.rotate(turn, row);
      store_row(rows, head, i, row);
    }
  });
  return StatusCode::ok;
}

/// The same for a tensor of [head][token][dim].
template <Tensor T>
[[nodiscard]] Status rotate_rows(const T& tensor, u32 count, const RopeSpec& rope, i64 shift,
                                 const Executor& executor = {}) noexcept {
  return rotate_rows(rows_of(tensor), count, rope, shift, executor);
}

KVLEAN_NAMESPACE_END
