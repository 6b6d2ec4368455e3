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

/// Copies the anchors of slots [begin, end) of a segment to rows of the same numbers, through
/// conversions or element by element.
inline void convert_rows(const Rows& from, const Rows& to, u32 s, const u32* anchor, u32 begin,
                         u32 end) noexcept {
  for (u32 j = begin; j < end;) {
    const u32 n = run_length(anchor + j, end - j);
    copy_tokens(from, s, anchor[j], to, s, j, n);
    j += n;
  }
}

/// Writes a segment's rows: changed ones one by one, those between them in one piece.
inline void write_rows(const CompressionPlan& plan, const CacheView& from, const CacheView& to,
                       const KeyRotation& rotation, u32 s, bool stream) noexcept {
  const u32* anchor = plan.anchor + plan.first[s];
  const u32 count = plan.length[s];
  const simd::MoveKernels& kernels = simd::move_kernels();
  const bool key_bytes = moves_as_bytes(from.keys, to.keys);
  const bool value_bytes = moves_as_bytes(from.values, to.values);
  simd::RowMoves keys;
  simd::RowMoves values;
  if (key_bytes) keys = moves_of(from.keys, to.keys, s, true);
  if (value_bytes) values = moves_of(from.values, to.values, s, true);
  const auto copy = [&](u32 begin, u32 end, bool with_keys, bool with_values) noexcept {
    simd::RowMoves sets[2];
    u32 num_sets = 0;
    if (with_keys && key_bytes) sets[num_sets++] = keys;
    if (with_values && value_bytes) sets[num_sets++] = values;
    if (num_sets != 0) kernels.gather(sets, num_sets, anchor, begin, end, count, stream);
    if (with_keys && !key_bytes) convert_rows(from.keys, to.keys, s, anchor, begin, end);
    if (with_values && !value_bytes) convert_rows(from.values, to.values, s, anchor, begin, end);
  };
  if (!rewrites_rows(plan, from)) {
    copy(0, count, true, true);
  } else if (turns_while_moving(plan, from.keys, to.keys, from) && value_bytes &&
             (plan.needs & needs_changed_values) == 0) {
    const simd::RowMoves sets[2] = {keys, values};
    gather_turned(rotation.rotation(), from.keys.dtype, sets, 2, anchor, 0, count, turned_block,
                  [&](u32 j) noexcept {
                    return i64{plan.position[plan.first[s] + j]} - i64{from.position(s, anchor[j])};
                  });
  } else {
    KeyWriter key_writer(plan, from, rotation, s);
    ValueWriter value_writer(plan, from.values, s);
    for (u32 j = 0; j < count;) {
      const u64 slot = plan.first[s] + j;
      const bool key_moves = key_writer.changes(slot);
      const bool value_moves = value_writer.changes(slot);
      u32 n = 1;
      while (!key_moves && !value_moves && j + n < count && !key_writer.changes(slot + n) &&
             !value_writer.changes(slot + n)) {
        ++n;
      }
      if (key_moves) key_writer.write(slot, to.keys, j);
      if (value_moves) value_writer.write(slot, to.values, j);
      copy(j, j + n, !key_moves, !value_moves);
      j += n;
    }
  }
  if (stream) kernels.gather(nullptr, 0, anchor, 0, 0, 0, true);
}

/// Writes a segment's rows, positions and log mass. With `stream`, rows that are only moved go past
/// the caches.
inline void write_segment_to(const CompressionPlan& plan, const CacheView& from,
                             const CacheView& to, const KeyRotation& rotation, u32 s,
                             bool stream = false) noexcept {
  write_rows(plan, from, to, rotation, s, stream);
  const u32* anchor = plan.anchor + plan.first[s];
  const u32 count = plan.length[s];
  const simd::MoveKernels& kernels = simd::move_kernels();
  if (to.positions && plan.position != nullptr) {
    std::copy_n(plan.position + plan.first[s], count, to.positions.segment(s));
  } else if (to.positions && from.positions) {
    kernels.gather_values(from.positions.segment(s), anchor, 0, count, to.positions.segment(s));
  } else if (to.positions) {
    std::copy_n(anchor, count, to.positions.segment(s));
  }
  if (to.log_mass && plan.log_mass != nullptr) {
    std::copy_n(plan.log_mass + plan.first[s], count, to.log_mass.segment(s));
  } else if (to.log_mass && from.log_mass) {
    kernels.gather_values(from.log_mass.segment(s), anchor, 0, count, to.log_mass.segment(s));
  } else if (to.log_mass) {
    std::fill_n(to.log_mass.segment(s), count, 0.0f);
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
  // What fits into the caches stays there.
  constexpr u64 large = u64{8} << 20;
  const RaggedShape& shape = destination.shape();
  const bool stream = plan.num_slots() * RaggedKVCache::slot_bytes(shape) >= large;
  parallel_for(executor, plan.segments, [&](u32, u32 s) noexcept {
    detail::write_segment_to(plan, from, to, rotation, s, stream);
  });
  destination.set_next_position(plan.next_position >= 0 ? plan.next_position : from.next_position);
  destination.set_rope(from.rope);
  destination.set_rope_pairing(from.rope_pairing);
  destination.set_origin(from.origin);
  destination.set_frozen(0);
  return StatusCode::ok;
}

KVLEAN_NAMESPACE_END
