// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>

#include "kvlean/core/ragged_kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN

inline bool RaggedKVCache::place(const RaggedShape& shape, std::byte* base, Parts& parts,
                                 std::size_t& bytes) noexcept {
  constexpr std::size_t limit = std::numeric_limits<std::size_t>::max() / 4;
  constexpr std::size_t head_limit = std::numeric_limits<u32>::max();
  const bool flat = shape.layout == RaggedLayout::flat;
  if (shape.kv_heads == 0 || shape.kv_heads >= head_limit) return false;
  if (shape.key_dim == 0 || shape.key_dim > max_row_width) return false;
  if (shape.value_dim == 0 || shape.value_dim > max_row_width) return false;
  if (!flat && shape.capacity_per_head > head_limit) return false;
  if (!flat && shape.capacity_per_head > limit / shape.kv_heads) return false;
  const std::size_t slots = flat ? shape.total_slots : shape.kv_heads * shape.capacity_per_head;
  // 64 bytes more than a slot has leave room for the padding between the arrays.
  if (slots > limit / (slot_bytes(shape) + 64)) return false;

  std::size_t next = 0;
  const auto take = [&](std::size_t size) noexcept {
    const std::size_t at = next;
    next = (next + size + alignment - 1) / alignment * alignment;
    return at;
  };
  const std::size_t offsets = take((shape.kv_heads + 1) * sizeof(u64));
  const std::size_t lengths = take(shape.kv_heads * sizeof(u32));
  const std::size_t keys = take(slots * shape.key_dim * size_bytes(shape.key_dtype));
  const std::size_t values = take(slots * shape.value_dim * size_bytes(shape.value_dtype));
  const std::size_t positions = take(shape.positions ? slots * sizeof(i32) : 0);
  const std::size_t log_mass = take(shape.log_mass ? slots * sizeof(float) : 0);
  bytes = next;
  if (base == nullptr) return true;

  parts.shape = shape;
  parts.begin = base;
  parts.end = base + bytes;
  parts.offsets = reinterpret_cast<u64*>(base + offsets);
  parts.lengths = reinterpret_cast<u32*>(base + lengths);
  parts.keys = base + keys;
  parts.values = base + values;
  parts.positions = shape.positions ? reinterpret_cast<i32*>(base + positions) : nullptr;
  parts.log_mass = shape.log_mass ? reinterpret_cast<float*>(base + log_mass) : nullptr;
  return true;
}

inline void RaggedKVCache::adopt(std::byte* storage, const RaggedShape& shape,
                                 void* block) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(storage);
  std::byte* base = storage + (alignment - address % alignment) % alignment;
  Parts parts;
  std::size_t bytes = 0;
  static_cast<void>(place(shape, base, parts, bytes));
  for (std::size_t h = 0; h < shape.kv_heads; ++h) new (parts.lengths + h) u32{0};
  for (std::size_t h = 0; h <= shape.kv_heads; ++h) {
    new (parts.offsets + h)
        u64{shape.layout == RaggedLayout::fixed ? h * shape.capacity_per_head : 0};
  }
  ::operator delete (owned_, std::align_val_t{alignment});
  parts_ = parts;
  owned_ = block;
}

inline Status RaggedKVCache::set_lengths(std::span<const u32> lengths) noexcept {
  if (lengths.size() != num_kv_heads()) return StatusCode::shape_mismatch;
  const bool flat = parts_.shape.layout == RaggedLayout::flat;
  u64 total = 0;
  for (const u32 length : lengths) {
    if (!flat && length > parts_.shape.capacity_per_head) return StatusCode::destination_too_small;
    total += length;
  }
  if (flat && total > parts_.shape.total_slots) return StatusCode::destination_too_small;
  for (std::size_t h = 0; h < lengths.size(); ++h) {
    parts_.lengths[h] = lengths[h];
    if (flat) parts_.offsets[h + 1] = parts_.offsets[h] + lengths[h];
  }
  return StatusCode::ok;
}

inline Status RaggedKVCache::append(const Rows& keys, const Rows& values, u32 count,
                                    i32 first_position) noexcept {
  const CacheView to = view();
  if (to.segments == 0) return StatusCode::invalid_shape;
  if (keys.heads != to.segments || values.heads != to.segments) return StatusCode::shape_mismatch;
  if (keys.width != to.keys.width || values.width != to.values.width) {
    return StatusCode::shape_mismatch;
  }
  KVLEAN_RETURN_IF_ERROR(check_rows(keys, count));
  KVLEAN_RETURN_IF_ERROR(check_rows(values, count));
  if (first_position < parts_.next_position) return StatusCode::invalid_option;
  if (static_cast<i64>(first_position) + count > std::numeric_limits<i32>::max()) {
    return StatusCode::invalid_option;
  }
  for (u32 h = 0; h < to.segments; ++h) {
    if (count > capacity(h) - length(h)) return StatusCode::destination_too_small;
  }
  const auto block = detail::ByteRange::of(parts_.begin, storage().size());
  for (u32 h = 0; h < to.segments; ++h) {
    if (detail::rows_touch(keys, h, count, block) || detail::rows_touch(values, h, count, block)) {
      return StatusCode::destination_overlaps;
    }
  }
  for (u32 h = 0; h < to.segments; ++h) {
    const u32 end = length(h);
    for (u32 i = 0; i < count; ++i) {
      copy_row(keys, h, i, to.keys, h, end + i);
      copy_row(values, h, i, to.values, h, end + i);
      if (to.positions) to.positions(h, end + i) = first_position + static_cast<i32>(i);
      if (to.log_mass) to.log_mass(h, end + i) = 0.0f;
    }
    parts_.lengths[h] = end + count;
  }
  parts_.next_position = first_position + static_cast<i32>(count);
  return StatusCode::ok;
}

inline void RaggedKVCache::pack() noexcept {
  if (parts_.shape.layout == RaggedLayout::fixed) return;
  const auto close_up = [](auto* data, std::size_t to, std::size_t from, std::size_t slots,
                           std::size_t per_slot) noexcept {
    if (data == nullptr || to == from) return;
    std::memmove(data + to * per_slot, data + from * per_slot, slots * per_slot * sizeof *data);
  };
  const RaggedShape& shape = parts_.shape;
  u64 from = 0;
  for (std::size_t h = 0; h < num_kv_heads(); ++h) {
    const u64 to = parts_.offsets[h];
    const std::size_t slots = parts_.lengths[h];
    close_up(parts_.keys, to, from, slots, shape.key_dim * size_bytes(shape.key_dtype));
    close_up(parts_.values, to, from, slots, shape.value_dim * size_bytes(shape.value_dtype));
    close_up(parts_.positions, to, from, slots, 1);
    close_up(parts_.log_mass, to, from, slots, 1);
    from = parts_.offsets[h + 1];
    parts_.offsets[h + 1] = to + slots;
  }
}

KVLEAN_NAMESPACE_END
