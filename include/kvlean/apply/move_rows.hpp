// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>

#include "kvlean/core/byte_range.hpp"
#include "kvlean/core/rows.hpp"
#include "kvlean/core/validate_plan.hpp"

// Moving rows in the largest pieces that a layout allows.

KVLEAN_NAMESPACE_BEGIN
namespace detail {

/// Neighbouring entries of `anchor` that name neighbouring tokens, from entry 0, at most `limit`.
[[nodiscard]] inline u32 run_length(const u32* anchor, u32 limit) noexcept {
  u32 n = 1;
  while (n < limit && anchor[n] == anchor[0] + n) ++n;
  return n;
}

template <std::size_t element>
void copy_elements(const std::byte* source, std::byte* target, const Rows& from, const Rows& to,
                   u32 count) noexcept {
  constexpr i64 bytes = static_cast<i64>(element);
  for (u32 i = 0; i < count; ++i) {
    const std::byte* s = source + static_cast<i64>(i) * from.token_stride * bytes;
    std::byte* t = target + static_cast<i64>(i) * to.token_stride * bytes;
    for (u32 d = 0; d < from.width; ++d) {
      std::memmove(t, s, element);
      s += from.dim_stride * bytes;
      t += to.dim_stride * bytes;
    }
  }
}

/// Copies `count` rows that are token_stride apart on both sides; the types agree. Rows are copied
/// in ascending order, so within one tensor they may move towards token 0.
inline void copy_straight(const std::byte* source, std::byte* target, const Rows& from,
                          const Rows& to, u32 count) noexcept {
  const std::size_t element = size_bytes(from.dtype);
  const i64 bytes = static_cast<i64>(element);
  const i64 width = static_cast<i64>(from.width);
  if (from.dim_stride == 1 && to.dim_stride == 1) {
    const std::size_t row = from.width * element;
    if (from.token_stride == width && to.token_stride == width) {
      std::memmove(target, source, count * row);
      return;
    }
    for (u32 i = 0; i < count; ++i) {
      std::memmove(target, source, row);
      source += from.token_stride * bytes;
      target += to.token_stride * bytes;
    }
  } else if (from.token_stride == 1 && to.token_stride == 1) {
    for (u32 d = 0; d < from.width; ++d) {
      std::memmove(target, source, count * element);
      source += from.dim_stride * bytes;
      target += to.dim_stride * bytes;
    }
  } else if (element == 4) {
    copy_elements<4>(source, target, from, to, count);
  } else {
    copy_elements<2>(source, target, from, to, count);
  }
}

/// Copies tokens [from_token, from_token + count) of a head onto [to_token, ...), in ascending
/// order. The bits are kept when the types agree and neither side is an accessor. O(count * width).
inline void copy_tokens(const Rows& from, u32 from_head, u32 from_token, const Rows& to,
                        u32 to_head, u32 to_token, u32 count) noexcept {
  if (from.load != nullptr || to.store != nullptr || from.dtype != to.dtype) {
    for (u32 i = 0; i < count; ++i) {
      copy_row(from, from_head, from_token + i, to, to_head, to_token + i);
    }
    return;
  }
  while (count != 0) {
    const u32 n =
        std::min(straight_tokens(from, from_token, count), straight_tokens(to, to_token, count));
    copy_straight(row_address(from, from_head, from_token), row_address(to, to_head, to_token),
                  from, to, n);
    from_token += n;
    to_token += n;
    count -= n;
  }
}

/// Whether tokens are neighbours in memory and dimensions are not: a transposed V.
[[nodiscard]] inline bool is_transposed(const Rows& rows) noexcept {
  return rows.load == nullptr && rows.order == nullptr && rows.page_table == nullptr &&
         rows.token_stride == 1 && rows.dim_stride != 1;
}

template <std::size_t element>
void gather_columns(const Rows& rows, u32 head, const u32* anchor, u32 begin, u32 end) noexcept {
  for (u32 d = 0; d < rows.width; ++d) {
    std::byte* column = row_address(rows, head, 0) +
                        static_cast<i64>(d) * rows.dim_stride * static_cast<i64>(element);
    for (u32 j = begin; j < end; ++j) {
      std::memcpy(column + j * element, column + std::size_t{anchor[j]} * element, element);
    }
  }
}

/// Whether rows can be moved as bytes: no conversion, and elements are neighbours on both sides.
[[nodiscard]] inline bool moves_as_bytes(const Rows& from, const Rows& to) noexcept {
  return from.load == nullptr && to.store == nullptr && from.dtype == to.dtype &&
         from.dim_stride == 1 && to.dim_stride == 1;
}

/// Where the rows of a head lie; not for accessors.
[[nodiscard]] inline simd::RowPlaces places_of(const Rows& rows, u32 head) noexcept {
  const i64 element = static_cast<i64>(size_bytes(rows.dtype));
  simd::RowPlaces places;
  i64 offset = static_cast<i64>(head) * rows.head_stride;
  if (rows.page_table != nullptr) {
    places.page_table = rows.page_table + static_cast<i64>(head) * rows.page_table_stride;
    places.page_stride = rows.page_stride * element;
    places.page_tokens = rows.page_tokens;
    const bool power = std::has_single_bit(rows.page_tokens);
    places.page_shift =
        power ? static_cast<u32>(std::countr_zero(rows.page_tokens)) : simd::RowPlaces::not_a_power;
  } else if (rows.first != nullptr) {
    offset += static_cast<i64>(rows.first[head]) * rows.token_stride;
  }
  if (rows.order != nullptr) places.order = rows.order + static_cast<i64>(head) * rows.order_stride;
  places.stride = rows.token_stride * element;
  places.data = static_cast<std::byte*>(rows.data) + offset * element;
  return places;
}

/// Rows of a head to be moved as bytes. `alone`: nothing else lies among them.
[[nodiscard]] inline simd::RowMoves moves_of(const Rows& from, const Rows& to, u32 head,
                                             bool alone) noexcept {
  const auto packed = [](const Rows& rows) noexcept {
    return rows.order == nullptr && rows.page_table == nullptr &&
           rows.token_stride == static_cast<i64>(rows.width);
  };
  simd::RowMoves moves;
  moves.from = places_of(from, head);
  moves.to = places_of(to, head);
  moves.bytes = from.width * size_bytes(from.dtype);
  moves.packed = alone && packed(from) && packed(to);
  return moves;
}

/// Moves row anchor[j] to row j for all j in [begin, end), in place, element by element or through
/// accessors. anchor[begin] != begin.
inline void gather_in_place(const Rows& rows, u32 head, const u32* anchor, u32 begin,
                            u32 end) noexcept {
  if (is_transposed(rows)) {  // one pass a dimension: scattered tokens would touch every line twice
    if (rows.dtype == DType::f32) {
      gather_columns<4>(rows, head, anchor, begin, end);
    } else {
      gather_columns<2>(rows, head, anchor, begin, end);
    }
    return;
  }
  for (u32 j = begin; j < end;) {
    const u32 n = run_length(anchor + j, end - j);
    copy_tokens(rows, head, anchor[j], rows, head, j, n);
    j += n;
  }
}

/// Moves the keys and values of a segment's anchors to its first `count` rows, in place. Rows that
/// stay where they are, all frozen ones among them, are not written.
inline void compact_segment(const Rows& keys, const Rows& values, u32 head, u32 length,
                            const u32* anchor, u32 count) noexcept {
  u32 begin = 0;
  while (begin < count && anchor[begin] == begin) ++begin;
  if (begin == count) return;
  const bool key_bytes = moves_as_bytes(keys, keys);
  const bool value_bytes = moves_as_bytes(values, values);
  // V may be columns of K (latent attention): then both must leave a row before it is overwritten.
  const bool apart = !hull(keys, head, length).overlaps(hull(values, head, length));
  if (!apart && !(key_bytes && value_bytes)) {
    for (u32 j = begin; j < count; ++j) {
      copy_row(keys, head, anchor[j], keys, head, j);
      copy_row(values, head, anchor[j], values, head, j);
    }
    return;
  }
  if (!key_bytes) gather_in_place(keys, head, anchor, begin, count);
  if (!value_bytes) gather_in_place(values, head, anchor, begin, count);
  if (!key_bytes && !value_bytes) return;
  simd::RowMoves sets[2];
  u32 num_sets = 0;
  if (key_bytes) sets[num_sets++] = moves_of(keys, keys, head, apart);
  if (value_bytes) sets[num_sets++] = moves_of(values, values, head, apart);
  simd::move_kernels().gather(sets, num_sets, anchor, begin, count, count, false);
}

/// Rows of keys that are turned before the values of the same slots move.
inline constexpr u32 turned_block = 16;

/// Moves a segment's rows `begin` to `end` - 1 as MoveKernels::gather does, and turns those of the
/// first set, rows of keys, by shift_of(j) on the way: a row is read and written once. The other
/// set follows every `block` rows.
template <class ShiftOf>
void gather_turned(const RopeRotation& rotation, DType dtype, const simd::RowMoves* sets,
                   u32 num_sets, const u32* anchor, u32 begin, u32 end, u32 block,
                   ShiftOf&& shift_of) noexcept {
  constexpr u32 ahead = 16;
  const simd::MoveKernels& kernels = simd::move_kernels();
  const simd::RowMoves& keys = sets[0];
  const bool in_place = keys.from.data == keys.to.data;
  simd::TurnedRow row = rotation.turned_row();
  row.dtype = dtype;
  RopeTurns turns(rotation);
  while (begin < end) {
    const u32 stop = std::min(end, begin + block);
    for (u32 j = begin; j < stop; ++j) {
      if (end - j > ahead) {
        // Where it goes as well: a store that waits for its line holds up those that follow.
        const std::byte* from = keys.from.at(anchor[j + ahead]);
        const std::byte* to = keys.to.at(j + ahead);
        for (std::size_t i = 0; i < keys.bytes; i += 64) {
          __builtin_prefetch(from + i);
          __builtin_prefetch(to + i, 1);
        }
      }
      const i64 shift = shift_of(j);
      if (shift != 0) {
        const RopeTurn& turn = turns.by(shift);
        kernels.turn(row, turn.cosine, turn.sine, keys.from.at(anchor[j]), keys.to.at(j));
      } else if (!in_place || anchor[j] != j) {
        kernels.gather(sets, 1, anchor, j, j + 1, j + 1, false);
      }
    }
    while (in_place && begin < stop && anchor[begin] == begin) ++begin;  // nothing dropped so far
    kernels.gather(sets + 1, num_sets - 1, anchor, begin, stop, end, false);
    begin = stop;
  }
}

/// Whether a plan turns the keys that it moves and changes them in no other way, and their rows can
/// be moved as bytes: then gather_turned() is all they need.
[[nodiscard]] inline bool turns_while_moving(const CompressionPlan& plan, const Rows& from,
                                             const Rows& to, const CacheView& cache) noexcept {
  return keys_turn(plan, cache) && (plan.needs & needs_moved_keys) == 0 && moves_as_bytes(from, to);
}

}  // namespace detail
KVLEAN_NAMESPACE_END
