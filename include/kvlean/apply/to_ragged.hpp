// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/apply/fold.hpp"
#include "kvlean/apply/move_rows.hpp"
#include "kvlean/core/executor.hpp"
#include "kvlean/core/ragged_kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

/// The flat shape that holds exactly what a plan keeps of a cache, in the cache's types; accessor
/// tensors become f32. Log mass and positions are there when plan or cache has them. O(1).
template <Cache Source>
[[nodiscard]] RaggedShape ragged_shape(const CompressionPlan& plan, const Source& source) noexcept {
  const CacheView cache = view_of(source);
  RaggedShape shape;
  shape.kv_heads = cache.segments;
  shape.key_dim = cache.keys.width;
  shape.value_dim = cache.values.width;
  shape.key_dtype = cache.keys.dtype;
  shape.value_dtype = cache.values.dtype;
  shape.total_slots = static_cast<std::size_t>(plan.num_slots());
  shape.log_mass = plan.log_mass != nullptr || cache.log_mass;
  shape.positions = true;  // tokens move, so their index no longer tells
  return shape;
}

namespace detail {

[[nodiscard]] inline Status check_destination(const CompressionPlan& plan, const CacheView& cache,
                                              const RaggedKVCache& destination) noexcept {
  const RaggedShape& shape = destination.shape();
  if (shape.kv_heads != cache.segments || shape.key_dim != cache.keys.width ||
      shape.value_dim != cache.values.width) {
    return StatusCode::shape_mismatch;
  }
  if (!shape.positions && (plan.position != nullptr || cache.positions)) {
    return StatusCode::needs_positions;
  }
  if (!shape.log_mass && (plan.log_mass != nullptr || cache.log_mass)) {
    return StatusCode::needs_log_mass;
  }
  const auto storage = destination.storage();
  const ByteRange block = ByteRange::of(storage.data(), storage.size());
  for (u32 s = 0; s < cache.segments; ++s) {
    const u32 length = cache.length(s);
    if (rows_touch(cache.keys, s, length, block) || rows_touch(cache.values, s, length, block)) {
      return StatusCode::destination_overlaps;
    }
    const auto array_touches = [&](const auto& values) noexcept {
      return values &&
             ByteRange::of(values.segment(s), length * sizeof(*values.data)).overlaps(block);
    };
    if (array_touches(cache.positions) || array_touches(cache.log_mass)) {
      return StatusCode::destination_overlaps;
    }
  }
  if (ByteRange::of(cache.lengths, cache.lengths != nullptr ? cache.segments * sizeof(u32) : 0)
          .overlaps(block)) {
    return StatusCode::destination_overlaps;
  }
  return StatusCode::ok;
}

/// Writes one segment's keys or values, slot j into row j: unchanged neighbours in one piece.
template <class Changes, class Write>
void write_segment(const CompressionPlan& plan, const Rows& from, const Rows& to, u32 s,
                   Changes&& changes, Write&& write) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  for (u32 j = 0; j < plan.length[s];) {
    const u64 slot = plan.first[s] + j;
    if (changes(slot)) {
      write(slot, j);
      ++j;
      continue;
    }
    u32 n = 1;
    while (j + n < plan.length[s] && anchor[j + n] == anchor[j] + n && !changes(slot + n)) ++n;
    copy_tokens(from, s, anchor[j], to, s, j, n);
    j += n;
  }
}

inline void write_segment_to(const CompressionPlan& plan, const CacheView& from,
                             const CacheView& to, const KeyRotation& rotation, u32 s) noexcept {
  KeyWriter keys(plan, from, rotation, s);
  write_segment(
      plan, from.keys, to.keys, s, [&](u64 slot) noexcept { return keys.changes(slot); },
      [&](u64 slot, u32 j) noexcept { keys.write(slot, to.keys, j); });
  write_segment(
      plan, from.values, to.values, s, [&](u64 slot) noexcept { return value_changes(plan, slot); },
      [&](u64 slot, u32 j) noexcept { write_value(plan, from.values, s, slot, to.values, j); });
  for (u32 j = 0; j < plan.length[s]; ++j) {
    const u64 slot = plan.first[s] + j;
    const u32 anchor = plan.anchor[slot];
    if (to.positions) to.positions(s, j) = slot_position(plan, from, s, slot);
    if (to.log_mass) {
      to.log_mass(s, j) =
          plan.log_mass != nullptr ? plan.log_mass[slot] : from.mass_bias(s, anchor);
    }
  }
}

}  // namespace detail

/// Carries out a plan into another cache, which is overwritten; the source stays as it is. Types
/// are converted by one rounding, and the bits are kept where they agree. The destination takes
/// over the next position (the plan's where it gives one), rotation and origin; nothing in it is
/// frozen, since it is a copy. Slots get the plan's position, or their anchor's (its index where
/// the source has no positions). Literal rows may be the very rows of the destination they belong
/// to (a fit that wrote its result there).
///
/// Errors, all found before the first write: those of validate_plan; shape_mismatch (heads or
/// widths); destination_too_small; needs_log_mass, needs_positions (plan or source has them and the
/// destination's shape does not); destination_overlaps (the source lies in the destination's
/// memory; rows behind accessors cannot be checked). O(slots * width + terms * width); one task a
/// segment.
template <Cache Source>
[[nodiscard]] Status apply(const CompressionPlan& plan, const Source& source,
                           RaggedKVCache& destination, const Executor& executor = {}) noexcept {
  const CacheView from = view_of(source);
  KVLEAN_RETURN_IF_ERROR(validate_plan(plan, from));
  KVLEAN_RETURN_IF_ERROR(detail::check_destination(plan, from, destination));
  KVLEAN_RETURN_IF_ERROR(destination.set_lengths({plan.length, plan.segments}));
  const CacheView to = destination.view();
  const detail::KeyRotation rotation(plan, from);
  parallel_for(executor, plan.segments,
               [&](u32, u32 s) noexcept { detail::write_segment_to(plan, from, to, rotation, s); });
  destination.set_next_position(plan.next_position >= 0 ? plan.next_position : from.next_position);
  destination.set_rope(from.rope);
  destination.set_rope_pairing(from.rope_pairing);
  destination.set_origin(from.origin);
  destination.set_frozen(0);
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
