// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <numeric>

#include "kvlean/core/ragged_kv_cache.hpp"

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Copies the first `count` rows of a head to the rows from `to_token` on of a row-major store.
inline void copy_to_row_major(const Rows& from, const Rows& to, u32 head, u32 to_token,
                              u32 count) noexcept {
  const bool straight = from.load == nullptr && from.order == nullptr &&
                        from.page_table == nullptr && from.dtype == to.dtype &&
                        from.dim_stride == 1 && from.token_stride == static_cast<i64>(from.width);
  if (straight && count != 0) {
    std::memcpy(row_address(to, head, to_token), row_address(from, head, 0),
                std::size_t{count} * from.width * size_bytes(from.dtype));
    return;
  }
  for (u32 i = 0; i < count; ++i) copy_row(from, head, i, to, head, to_token + i);
}

}  // namespace detail

inline bool RaggedKVCache::place(const RaggedShape& shape, std::byte* base, Parts& parts,
                                 std::size_t& bytes) noexcept {
  constexpr std::size_t limit = std::numeric_limits<std::size_t>::max() / 4;
  constexpr std::size_t head_limit = std::numeric_limits<u32>::max();
  const bool flat = shape.layout == RaggedLayout::flat;
  if (shape.kv_heads == 0 || shape.kv_heads >= head_limit) return false;
  if (shape.key_dim == 0 || shape.key_dim > max_row_width) return false;
  if (shape.value_dim == 0 || shape.value_dim > max_row_width) return false;
  if (shape.layer_heads != 0 && shape.kv_heads % shape.layer_heads != 0) return false;
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
  const std::size_t states = take(slots * shape.state_arrays * sizeof(float));
  bytes = next;
  if (base == nullptr) return true;

  parts.shape = shape;
  parts.slots = slots;
  parts.begin = base;
  parts.end = base + bytes;
  parts.offsets = reinterpret_cast<u64*>(base + offsets);
  parts.lengths = reinterpret_cast<u32*>(base + lengths);
  parts.keys = base + keys;
  parts.values = base + values;
  parts.positions = shape.positions ? reinterpret_cast<i32*>(base + positions) : nullptr;
  parts.log_mass = shape.log_mass ? reinterpret_cast<float*>(base + log_mass) : nullptr;
  parts.states = shape.state_arrays != 0 ? reinterpret_cast<float*>(base + states) : nullptr;
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

template <std::invocable<std::size_t> LengthOf>
Status RaggedKVCache::set_lengths(LengthOf length_of) noexcept {
  const bool flat = parts_.shape.layout == RaggedLayout::flat;
  u64 total = 0;
  for (std::size_t h = 0; h < num_kv_heads(); ++h) {
    const u32 length = length_of(h);
    if (!flat && length > parts_.shape.capacity_per_head) return StatusCode::destination_too_small;
    total += length;
  }
  if (flat && total > parts_.shape.total_slots) return StatusCode::destination_too_small;
  for (std::size_t h = 0; h < num_kv_heads(); ++h) {
    parts_.lengths[h] = length_of(h);
    if (flat) parts_.offsets[h + 1] = parts_.offsets[h] + parts_.lengths[h];
  }
  return StatusCode::ok;
}

inline CacheView RaggedKVCache::view(u32 first_head, u32 heads) const noexcept {
  CacheView view;
  if (!has_heads(first_head, heads)) return view;
  const RaggedShape& shape = parts_.shape;
  const bool flat = shape.layout == RaggedLayout::flat;
  view.segments = heads;
  for (u32 h = 0; h < heads; ++h) view.capacity = std::max(view.capacity, capacity(first_head + h));
  const u64* offsets = parts_.offsets + first_head;
  const auto rows = [&](std::byte* data, DType dtype, std::size_t dim) noexcept {
    Rows result;
    result.data =
        flat ? data : data + first_head * shape.capacity_per_head * dim * size_bytes(dtype);
    result.dtype = dtype;
    result.writable = true;
    result.width = static_cast<u32>(dim);
    result.heads = heads;
    result.tokens = view.capacity;
    result.token_stride = static_cast<i64>(dim);
    result.head_stride = flat ? 0 : static_cast<i64>(shape.capacity_per_head * dim);
    result.first = flat ? offsets : nullptr;
    return result;
  };
  view.keys = rows(parts_.keys, shape.key_dtype, shape.key_dim);
  view.values = rows(parts_.values, shape.value_dtype, shape.value_dim);
  view.lengths = parts_.lengths + first_head;
  view.frozen = parts_.frozen;
  view.positions = Ragged<i32>(parts_.positions, offsets);
  view.log_mass = Ragged<float>(parts_.log_mass, offsets);
  view.next_position = parts_.next_position;
  view.rope_pairing = parts_.rope_pairing;
  view.rope = parts_.rope;
  view.origin = parts_.origin;
  view.origin.layer += first_head / layer_heads();
  view.origin.head += first_head % layer_heads();
  return view;
}

inline Status RaggedKVCache::append(u32 first_head, u32 heads, const Rows& keys, const Rows& values,
                                    u32 count, i32 first_position) noexcept {
  if (!has_heads(first_head, heads)) return StatusCode::invalid_shape;
  if (first_position < 0) return StatusCode::invalid_option;
  for (u32 h = first_head; parts_.positions != nullptr && h < first_head + heads; ++h) {
    const u64 end = parts_.offsets[h] + length(h);
    if (length(h) != 0 && parts_.positions[end - 1] >= first_position) {
      return StatusCode::invalid_option;
    }
  }
  return append_rows(first_head, heads, keys, values, count, first_position);
}

inline Status RaggedKVCache::append_rows(u32 first_head, u32 heads, const Rows& keys,
                                         const Rows& values, u32 count,
                                         i32 first_position) noexcept {
  const CacheView to = view(first_head, heads);
  if (to.segments == 0) return StatusCode::invalid_shape;
  if (keys.heads != to.segments || values.heads != to.segments) return StatusCode::shape_mismatch;
  if (keys.width != to.keys.width || values.width != to.values.width) {
    return StatusCode::shape_mismatch;
  }
  KVLEAN_RETURN_IF_ERROR(check_rows(keys, count));
  KVLEAN_RETURN_IF_ERROR(check_rows(values, count));
  const i64 next = static_cast<i64>(first_position) + count;
  if (next > std::numeric_limits<i32>::max()) return StatusCode::invalid_option;
  if (count > min_room(first_head, heads)) return StatusCode::destination_too_small;
  const auto block = detail::ByteRange::of(parts_.begin, storage().size());
  for (u32 h = 0; h < heads; ++h) {
    if (detail::rows_touch(keys, h, count, block) || detail::rows_touch(values, h, count, block)) {
      return StatusCode::destination_overlaps;
    }
  }
  for (u32 h = 0; h < heads; ++h) {
    const u32 end = to.lengths[h];
    detail::copy_to_row_major(keys, to.keys, h, end, count);
    detail::copy_to_row_major(values, to.values, h, end, count);
    if (to.positions) {
      i32* positions = to.positions.segment(h) + end;
      std::iota(positions, positions + count, first_position);
    }
    if (to.log_mass) std::fill_n(to.log_mass.segment(h) + end, count, 0.0f);
    for (u32 i = 0; i < parts_.shape.state_arrays; ++i) {
      std::fill_n(state(i, first_head).segment(h) + end, count, 0.0f);
    }
    to.lengths[h] = end + count;
  }
  parts_.next_position = std::max(parts_.next_position, static_cast<i32>(next));
  return StatusCode::ok;
}

inline Status RaggedKVCache::truncate(u32 first_head, u32 heads, u32 count) noexcept {
  if (!has_heads(first_head, heads)) return StatusCode::invalid_shape;
  for (u32 h = first_head; h < first_head + heads; ++h) {
    if (length(h) < count) return StatusCode::invalid_length;
    if (count != 0 && length(h) - count < parts_.frozen) return StatusCode::frozen_token_changed;
  }
  for (u32 h = first_head; h < first_head + heads; ++h) parts_.lengths[h] -= count;
  return StatusCode::ok;
}

inline void RaggedKVCache::move_head(u64 from, u64 to, std::size_t slots) noexcept {
  const auto move = [=](auto* data, std::size_t per_slot) noexcept {
    if (data == nullptr || slots == 0) return;
    std::memmove(data + to * per_slot, data + from * per_slot, slots * per_slot * sizeof *data);
  };
  const RaggedShape& shape = parts_.shape;
  move(parts_.keys, shape.key_dim * size_bytes(shape.key_dtype));
  move(parts_.values, shape.value_dim * size_bytes(shape.value_dtype));
  move(parts_.positions, 1);
  move(parts_.log_mass, 1);
  for (u32 i = 0; i < shape.state_arrays; ++i) move(parts_.states + i * parts_.slots, 1);
}

inline void RaggedKVCache::place_apart(std::size_t gap) noexcept {
  if (parts_.shape.layout == RaggedLayout::fixed) return;
  const std::size_t heads = num_kv_heads();
  if (heads == 0) return;
  // First what goes left, from the first head on, then what goes right, from the last one on: so no
  // head is written over one that has not moved yet.
  u64 target = 0;
  for (std::size_t h = 0; h < heads; ++h) {
    const u64 from = parts_.offsets[h];
    if (target < from) {
      move_head(from, target, parts_.lengths[h]);
      parts_.offsets[h] = target;
    }
    target += parts_.lengths[h] + gap;
  }
  parts_.offsets[heads] = target;
  for (std::size_t h = heads; h-- > 0;) {
    target -= parts_.lengths[h] + gap;
    const u64 from = parts_.offsets[h];
    if (target > from) {
      move_head(from, target, parts_.lengths[h]);
      parts_.offsets[h] = target;
    }
  }
}

KVLEAN_NAMESPACE_END
