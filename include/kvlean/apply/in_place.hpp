// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/merge_rows.hpp"
#include "kvlean/core/executor.hpp"
#include "kvlean/core/ragged_kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Tag type of `in_place`.
struct in_place_t {
  explicit in_place_t() = default;
};
/// Asks apply() to work in the cache's own memory: `apply(plan, layer, in_place)`.
inline constexpr in_place_t in_place{};

namespace detail {

/// Whether all segments read one array: no offsets, stride 0.
template <class T>
[[nodiscard]] bool is_shared(const Ragged<T>& values, u32 segments) noexcept {
  return values && values.first == nullptr && values.stride == 0 && segments > 1;
}

/// Whether every segment has the same values in a per-slot array of the plan.
template <class T>
[[nodiscard]] bool same_in_all_segments(const CompressionPlan& plan, const T* per_slot) noexcept {
  for (u32 s = 1; s < plan.segments; ++s) {
    if (plan.length[s] != plan.length[0] ||
        !std::equal(per_slot, per_slot + plan.length[0], per_slot + plan.first[s])) {
      return false;
    }
  }
  return true;
}

/// Whether the plan's positions are the slots' indices, which need no array.
[[nodiscard]] inline bool positions_are_indices(const CompressionPlan& plan) noexcept {
  for (u32 s = 0; s < plan.segments; ++s) {
    for (u32 j = 0; j < plan.length[s]; ++j) {
      if (plan.position[plan.first[s] + j] != static_cast<i32>(j)) return false;
    }
  }
  return true;
}

/// What in-place work asks of the cache's arrays, after validate_plan.
[[nodiscard]] inline Status check_cache_can_hold(const CompressionPlan& plan,
                                                 const CacheView& cache) noexcept {
  if ((plan.needs & needs_ragged_lengths) != 0 && cache.lengths == nullptr) {
    return StatusCode::needs_ragged_lengths;
  }
  if (plan.position != nullptr && !cache.positions && !positions_are_indices(plan)) {
    return StatusCode::needs_positions;
  }
  if (is_shared(cache.positions, cache.segments) &&
      !(plan.position != nullptr ? same_in_all_segments(plan, plan.position)
                                 : same_in_all_segments(plan, plan.anchor))) {
    return StatusCode::needs_positions;
  }
  if (plan.log_mass != nullptr && !cache.log_mass) return StatusCode::needs_log_mass;
  if (is_shared(cache.log_mass, cache.segments) &&
      !(plan.log_mass != nullptr ? same_in_all_segments(plan, plan.log_mass)
                                 : same_in_all_segments(plan, plan.anchor))) {
    return StatusCode::needs_log_mass;
  }
  const auto literals_apart = [&](const Rows& literal) noexcept {
    for (u32 s = 0; s < plan.segments; ++s) {
      const ByteRange range = hull(literal, s, plan.length[s]);
      for (u32 other = 0; other < cache.segments; ++other) {
        if (rows_touch(cache.keys, other, cache.length(other), range) ||
            rows_touch(cache.values, other, cache.length(other), range)) {
          return false;
        }
      }
    }
    return true;
  };
  if (plan.has_literal_keys() && !literals_apart(plan.literal_keys)) {
    return StatusCode::destination_overlaps;
  }
  if (plan.has_literal_values() && !literals_apart(plan.literal_values)) {
    return StatusCode::destination_overlaps;
  }
  return StatusCode::ok;
}

/// fold_segment() and compact_segment() of a plan that turns_while_moving(), keys in one pass.
inline void turn_and_compact_segment(const CompressionPlan& plan, const CacheView& cache,
                                     const KeyRotation& rotation, u32 s) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  const u32 count = plan.length[s];
  const u32 length = cache.length(s);
  const bool value_bytes = moves_as_bytes(cache.values, cache.values);
  const bool apart = !hull(cache.keys, s, length).overlaps(hull(cache.values, s, length));
  if (!value_bytes && !apart) {
    fold_segment(plan, cache, rotation, s);
    compact_segment(cache.keys, cache.values, s, length, anchor, count);
    return;
  }
  ValueWriter writer(plan, cache.values, s);
  for (u32 j = 0; (plan.needs & needs_changed_values) != 0 && j < count; ++j) {
    const u64 slot = plan.first[s] + j;
    if (writer.changes(slot)) writer.write(slot, cache.values, anchor[j]);
  }
  const auto shift_of = [&](u32 j) noexcept {
    return i64{plan.position[plan.first[s] + j]} - i64{cache.position(s, anchor[j])};
  };
  u32 begin = 0;
  while (begin < count && anchor[begin] == begin && shift_of(begin) == 0) ++begin;
  simd::RowMoves sets[2];
  sets[0] = moves_of(cache.keys, cache.keys, s, apart);
  if (value_bytes) sets[1] = moves_of(cache.values, cache.values, s, apart);
  gather_turned(rotation.rotation(), cache.keys.dtype, sets, value_bytes ? 2 : 1, anchor, begin,
                count, apart ? turned_block : 1, shift_of);
  while (begin < count && anchor[begin] == begin) ++begin;
  if (!value_bytes && begin < count) gather_in_place(cache.values, s, anchor, begin, count);
}

/// Whether ranges of terms move ahead and terms ascend, as CaM's do.
[[nodiscard]] inline bool windows_slide(const CompressionPlan& plan, u32 s) noexcept {
  const u64 first = plan.first[s];
  const u64 last = plan.first[s + 1];
  if (first == last) return true;
  const u64 begin = plan.term_begin[first];
  return ranges_move_ahead(plan, s) &&
         ascends(plan.term_token + begin, static_cast<u32>(plan.term_end[last - 1] - begin));
}

/// The first slot from which on no row is a term of a later slot, so that each may be written once
/// the slots before it were; for ranges of terms that move ahead. O(slots).
[[nodiscard]] inline u32 first_free_row(const CompressionPlan& plan, u32 s) noexcept {
  u32 slot = plan.length[s];
  u32 lowest = ~0u;  // token of a term from here on
  while (slot != 0) {
    const u64 at = plan.first[s] + slot - 1;
    if (plan.term_begin[at] != plan.term_end[at]) lowest = plan.term_token[plan.term_begin[at]];
    if (lowest < slot) break;
    --slot;
  }
  return slot;
}

/// fold_segment() and compact_segment() where values change and keys only move: a value moves as it
/// is written. False, with nothing done, where rows are no bytes or terms don't move ahead.
[[nodiscard]] inline bool fold_while_moving(const CompressionPlan& plan, const CacheView& cache,
                                            u32 s) noexcept {
  const u32 length = cache.length(s);
  const u32 count = plan.length[s];
  if ((plan.needs & needs_changed_values) == 0 || (plan.needs & needs_moved_keys) != 0 ||
      keys_turn(plan, cache) || plan.has_literal_values() ||
      !moves_as_bytes(cache.keys, cache.keys) || !moves_as_bytes(cache.values, cache.values) ||
      hull(cache.keys, s, length).overlaps(hull(cache.values, s, length)) ||
      !windows_slide(plan, s)) {
    return false;
  }
  const u32* anchor = plan.anchor + plan.first[s];
  const simd::MoveKernels& kernels = simd::move_kernels();
  const simd::RowMoves keys = moves_of(cache.keys, cache.keys, s, true);
  const simd::RowMoves values = moves_of(cache.values, cache.values, s, true);
  const u32 free = first_free_row(plan, s);
  u32 moved = 0;
  while (moved < count && anchor[moved] == moved) ++moved;
  kernels.gather(&keys, 1, anchor, moved, count, count, false);
  ValueWriter writer(plan, cache.values, s);
  for (u32 j = 0; j < free; ++j) {
    const u64 slot = plan.first[s] + j;
    if (writer.changes(slot)) writer.write(slot, cache.values, anchor[j]);
  }
  if (moved < free) kernels.gather(&values, 1, anchor, moved, free, free, false);
  for (u32 j = free; j < count;) {
    const u64 slot = plan.first[s] + j;
    const u32 run = writer.run_of(slot, plan.first[s + 1]);
    if (run != 1) {
      writer.write_run(slot, run, cache.values, j);
      j += run;
      continue;
    }
    if (writer.changes(slot)) {
      writer.write(slot, cache.values, j++);
      continue;
    }
    u32 end = j + 1;
    while (end < count && !writer.changes(slot + (end - j))) ++end;
    if (anchor[end - 1] != end - 1) {
      kernels.gather(&values, 1, anchor, std::max(j, std::min(moved, end)), end, end, false);
    }
    j = end;
  }
  return true;
}

/// Moves a per-slot array, of 4 bytes a slot, along with the anchors, or takes the plan's values
/// where it has them.
template <class T>
void compact_array(const CompressionPlan& plan, const Ragged<T>& values, const T* replacement,
                   u32 frozen, u32 segment) noexcept {
  T* array = values.segment(segment);
  const u64 first = plan.first[segment];
  const u32 count = plan.length[segment];
  if (replacement != nullptr) {
    std::copy(replacement + first + frozen, replacement + first + count, array + frozen);
  } else {
    simd::move_kernels().gather_values(array, plan.anchor + first, frozen, count, array);
  }
}

/// Positions, log mass, lengths and the next position, once the rows are in their place.
inline void compact_arrays(const CompressionPlan& plan, CacheView& cache) noexcept {
  const u32 positions = is_shared(cache.positions, cache.segments) ? 1 : cache.segments;
  const u32 masses = is_shared(cache.log_mass, cache.segments) ? 1 : cache.segments;
  for (u32 s = 0; cache.positions && s < positions; ++s) {
    compact_array(plan, cache.positions, plan.position, cache.frozen, s);
  }
  for (u32 s = 0; cache.log_mass && s < masses; ++s) {
    compact_array(plan, cache.log_mass, plan.log_mass, cache.frozen, s);
  }
  if (cache.lengths != nullptr) {
    std::copy_n(plan.length, plan.segments, cache.lengths);
  } else {
    cache.uniform_length = plan.length[0];
  }
  if (plan.next_position >= 0) cache.next_position = plan.next_position;
}

/// Gives a KVCache the length and the next position that in-place work left in its view.
template <Tensor K, Tensor V>
void adopt_length(KVCache<K, V>& cache, const CacheView& view) noexcept {
  // A `lengths` array is the caller's and up to date already.
  if (view.lengths == nullptr) cache.set_length(view.uniform_length);
  cache.set_next_position(view.next_position);
}

}  // namespace detail

/// Carries out a plan in the cache's own memory: blends and turns at the anchors' rows, then moves
/// rows, positions and log mass towards token 0 in ascending order. The same bits as out of place
/// in the same type (accessor tensors: as far as storing what was loaded keeps the bits). Lengths
/// are written to the cache's `lengths`, or to its uniform length; the next position stays unless
/// the plan gives one. Frozen rows are never written. Without a positions array the positions of
/// moved tokens are not kept anywhere, unless the plan makes them the indices. K and V may lie in
/// one buffer, interleaved, or V may be columns of K if the plan rewrites neither, or only turns
/// elements of K that are not of V.
///
/// Errors, all found before the first write: those of validate_plan; read_only;
/// needs_ragged_lengths (no `lengths` array); needs_log_mass, needs_positions (no array, or one
/// that all segments share and the plan makes differ); destination_overlaps (literal rows inside
/// the cache). O(slots * width + terms * width), and a sine a rotated pair for each change of shift
/// between neighbouring moved rows; one task a segment.
[[nodiscard]] inline Status apply(const CompressionPlan& plan, CacheView& cache, in_place_t,
                                  const Executor& executor = {}) noexcept {
  KVLEAN_RETURN_IF_ERROR(validate_plan(plan, cache));
  if (!cache.keys.writable || !cache.values.writable) return StatusCode::read_only;
  KVLEAN_RETURN_IF_ERROR(detail::check_cache_can_hold(plan, cache));
  const detail::KeyRotation rotation(plan, cache);
  const bool turns = detail::turns_while_moving(plan, cache.keys, cache.keys, cache);
  const bool merges = detail::merges_rows(plan, cache);
  parallel_for(executor, plan.segments, [&](u32, u32 s) noexcept {
    if (turns) {
      detail::turn_and_compact_segment(plan, cache, rotation, s);
      return;
    }
    if (merges &&
        (detail::merge_segment(plan, cache, s) || detail::fold_while_moving(plan, cache, s))) {
      return;
    }
    detail::fold_segment(plan, cache, rotation, s);
    detail::compact_segment(cache.keys, cache.values, s, cache.length(s),
                            plan.anchor + plan.first[s], plan.length[s]);
  });
  detail::compact_arrays(plan, cache);
  return StatusCode::ok;
}

/// The same for a KVCache, whose length and next position are updated.
template <Tensor K, Tensor V>
[[nodiscard]] Status apply(const CompressionPlan& plan, KVCache<K, V>& cache, in_place_t,
                           const Executor& executor = {}) noexcept {
  CacheView view = cache.view();
  KVLEAN_RETURN_IF_ERROR(apply(plan, view, in_place, executor));
  detail::adopt_length(cache, view);
  return StatusCode::ok;
}

/// The same for a RaggedKVCache. Heads stay where they are: a flat cache gets gaps, which leave
/// room for append() and which pack() closes.
[[nodiscard]] inline Status apply(const CompressionPlan& plan, RaggedKVCache& cache, in_place_t,
                                  const Executor& executor = {}) noexcept {
  CacheView view = cache.view();
  KVLEAN_RETURN_IF_ERROR(apply(plan, view, in_place, executor));
  cache.set_next_position(view.next_position);
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
