// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/cuda/launch.cuh"
#include "kvlean/cuda/load_store.cuh"
#include "kvlean/cuda/plan.cuh"
#include "kvlean/cuda/rotation.cuh"

// Rows from one place to another: gathered as they are, or blended and turned.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 move_threads = 256;
inline constexpr u32 slots_in_flight = 4;  // of a team of lanes

/// What becomes of the per-slot numbers of entry `at`, slot j, whose anchor is `token`.
KVLEAN_DEVICE void write_slot_numbers(const PlanView& plan, const Segment& from, const Segment& to,
                                      u64 at, u32 j, u32 token) noexcept {
  if (to.positions != nullptr) {
    to.positions[j] = plan.position != nullptr ? plan.position[at] : from.position(token);
  }
  if (to.log_mass != nullptr) {
    to.log_mass[j] = plan.log_mass != nullptr ? plan.log_mass[at] : from.mass_bias(token);
  }
}

/// Copies the rows and numbers of slots [first, first + slots) of segment s, `count` slots long, to
/// slots elsewhere. A team of lanes copies slots_in_flight rows at a time.
template <u32 Lanes>
KVLEAN_DEVICE void gather_slots(const PlanView& plan, u32 s, u32 count, u32 first,
                                const Segment& from, const Segment& to, u32 key_bytes,
                                u32 value_bytes) noexcept {
  constexpr u32 teams = move_threads / Lanes;
  const u32 team = threadIdx.x / Lanes;
  const u32 lane = threadIdx.x % Lanes;
  u32 token[slots_in_flight];
#pragma unroll
  for (u32 i = 0; i < slots_in_flight; ++i) {
    const u32 j = first + team + i * teams;
    token[i] = plan.anchor[plan.slot(s, smaller(j, count - 1))];
  }
  const auto copy = [&](u32 bytes, auto&& row_of, auto&& slot_of) noexcept {
    const char* source[slots_in_flight];
#pragma unroll
    for (u32 i = 0; i < slots_in_flight; ++i) source[i] = row_of(token[i]);
    for (u32 at = lane * 16; at < bytes; at += Lanes * 16) {
      uint4 bits[slots_in_flight];
#pragma unroll
      for (u32 i = 0; i < slots_in_flight; ++i) bits[i] = load_16_once(source[i] + at);
#pragma unroll
      for (u32 i = 0; i < slots_in_flight; ++i) {
        const u32 j = first + team + i * teams;
        if (j < count) store_16_once(slot_of(j) + at, bits[i]);
      }
    }
  };
  copy(
      key_bytes, [&](u32 t) noexcept { return from.key_row(t); },
      [&](u32 j) noexcept { return to.key_row(j); });
  copy(
      value_bytes, [&](u32 t) noexcept { return from.value_row(t); },
      [&](u32 j) noexcept { return to.value_row(j); });
  const u32 j = first + threadIdx.x;
  if (threadIdx.x < teams * slots_in_flight && j < count) {
    const u64 at = plan.slot(s, j);
    write_slot_numbers(plan, from, to, at, j, plan.anchor[at]);
  }
}

/// Copies anchors' rows and numbers to slots elsewhere. Blocks (slots, segment).
template <u32 Lanes>
__global__ void __launch_bounds__(move_threads)
    gather_kernel(const PlanView plan, const CacheView cache, const CacheView destination,
                  u32 key_bytes, u32 value_bytes, const u32* error) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 count = plan.length[s];
  const u32 first = blockIdx.x * (move_threads / Lanes) * slots_in_flight;
  if (first >= count || has_failed(error)) return;
  gather_slots<Lanes>(plan, s, count, first, cache.segments[s], destination.segments[s], key_bytes,
                      value_bytes);
}

/// A lane's 16 bytes of a blend of rows, with the partners' where the result or the sources are
/// turned.
template <DType D>
struct Blend {
  static constexpr u32 each = elements_16<D>;
  float own[each];
  float partner[each];

  KVLEAN_DEVICE void clear() noexcept {
#pragma unroll
    for (u32 i = 0; i < each; ++i) own[i] = partner[i] = 0.0f;
  }
  KVLEAN_DEVICE void add(const char* row, u32 chunk, float weight) noexcept {
    float x[each];
    unpack<D>(load_16(row + chunk * 16), x);
#pragma unroll
    for (u32 i = 0; i < each; ++i) own[i] = fmaf(weight, x[i], own[i]);
  }
  /// Adds the partners too.
  KVLEAN_DEVICE void add_pairs(const char* row, u32 chunk, float weight,
                               const Rotation& rotation) noexcept {
    add(row, chunk, weight);
#pragma unroll
    for (u32 i = 0; i < each; ++i) {
      partner[i] = fmaf(weight, load_float<D>(row, rotation.partner(chunk * each + i)), partner[i]);
    }
  }
  /// Adds the row turned by `shift`.
  KVLEAN_DEVICE void add_turned(const char* row, u32 chunk, float weight, const Rotation& rotation,
                                i32 shift) noexcept {
    float x[each];
    unpack<D>(load_16(row + chunk * 16), x);
#pragma unroll
    for (u32 i = 0; i < each; ++i) {
      const u32 element = chunk * each + i;
      const float other = load_float<D>(row, rotation.partner(element));
      own[i] = fmaf(weight, rotation.turned(element, x[i], other, shift), own[i]);
    }
  }
  KVLEAN_DEVICE void turn(u32 chunk, const Rotation& rotation, i32 shift) noexcept {
#pragma unroll
    for (u32 i = 0; i < each; ++i) {
      own[i] = rotation.turned(chunk * each + i, own[i], partner[i], shift);
    }
  }
};

/// Writes every slot's blended and turned rows: to the destination, or (in place) to its anchor's
/// own place, where nobody else reads. Blocks (slots, segment), a team of lanes a slot.
template <DType K, DType V, u32 Lanes>
__global__ void __launch_bounds__(move_threads)
    fold_kernel(const PlanView plan, const CacheView cache, const CacheView destination,
                bool in_place, const __grid_constant__ Rotation rotation, const u32* error) {
  constexpr u32 teams = move_threads / Lanes;
  const u32 s = blockIdx.y;
  const u32 count = plan.length[s];
  const u32 j = blockIdx.x * teams + threadIdx.x / Lanes;
  if (j >= count || has_failed(error)) return;
  const Segment from = cache.segments[s];
  const u32 lane = threadIdx.x % Lanes;
  const u64 at = plan.slot(s, j);
  const u32 token = plan.anchor[at];
  const u32 term_begin = plan.has_terms() ? plan.term_begin[at] : 0;
  const u32 term_end = plan.has_terms() ? plan.term_end[at] : 0;
  const u32 key_bytes = cache.key_width * element_bytes<K>;
  const u32 value_bytes = cache.value_width * element_bytes<V>;

  const bool blends = (plan.needs & needs_moved_keys) != 0;
  const bool aligned = (plan.needs & needs_aligned_terms) != 0 && rotation.pairs != 0;
  const i32 position = plan.position != nullptr ? plan.position[at] : from.position(token);
  const i32 shift = rotation.pairs != 0 ? position - from.position(token) : 0;
  const float self = blends ? plan.key_self_weight(at) : 1.0f;
  const bool key_changes = shift != 0 || (blends && (self != 1.0f || term_begin != term_end));
  const float value_self = plan.value_self_weight(at);
  const bool value_changes = value_self != 1.0f || term_begin != term_end;

  const Segment& to_segment = in_place ? cache.segments[s] : destination.segments[s];
  const Segment to = to_segment;
  const u32 to_slot = in_place ? token : j;
  const char* key = from.key_row(token);
  char* to_key = to.key_row(to_slot);
  if (key_changes) {
    // The partner of a chunk is read by another lane: all reads of a row come before its writes.
    constexpr u32 most_chunks = 4;
    for (u32 base = 0; base < key_bytes; base += Lanes * 16 * most_chunks) {
      uint4 result[most_chunks];
#pragma unroll
      for (u32 c = 0; c < most_chunks; ++c) {
        const u32 chunk = base / 16 + c * Lanes + lane;
        if (chunk * 16 >= key_bytes) continue;
        Blend<K> blend;
        blend.clear();
        if (aligned) {
          if (shift != 0) {
            blend.add_turned(key, chunk, self, rotation, shift);
          } else {
            blend.add(key, chunk, self);
          }
        } else if (shift != 0) {
          blend.add_pairs(key, chunk, self, rotation);
        } else {
          blend.add(key, chunk, self);
        }
        for (u32 i = term_begin; blends && i < term_end; ++i) {
          const u64 term = plan.term(s, i);
          const u32 other = plan.term_token[term];
          const float weight = plan.term_weight[term];
          const char* row = from.key_row(other);
          const i32 own_shift = aligned ? position - from.position(other) : 0;
          if (aligned && own_shift != 0) {
            blend.add_turned(row, chunk, weight, rotation, own_shift);
          } else if (!aligned && shift != 0) {
            blend.add_pairs(row, chunk, weight, rotation);
          } else {
            blend.add(row, chunk, weight);
          }
        }
        if (!aligned && shift != 0) blend.turn(chunk, rotation, shift);
        result[c] = pack<K>(blend.own);
      }
      // A wider row than one round must not turn in place: see apply_in_place.
      __syncwarp(Lanes == 32 ? full_warp : 0xffffu << (threadIdx.x % 32 / Lanes * Lanes));
#pragma unroll
      for (u32 c = 0; c < most_chunks; ++c) {
        const u32 chunk = base / 16 + c * Lanes + lane;
        if (chunk * 16 < key_bytes) store_16(to_key + chunk * 16, result[c]);
      }
    }
  } else if (!in_place) {
    for (u32 i = lane * 16; i < key_bytes; i += Lanes * 16) store_16(to_key + i, load_16(key + i));
  }
  const char* value = from.value_row(token);
  char* to_value = to.value_row(to_slot);
  if (value_changes) {
    for (u32 chunk = lane; chunk * 16 < value_bytes; chunk += Lanes) {
      Blend<V> blend;
      blend.clear();
      blend.add(value, chunk, value_self);
      for (u32 i = term_begin; i < term_end; ++i) {
        const u64 term = plan.term(s, i);
        blend.add(from.value_row(plan.term_token[term]), chunk, plan.value_term_weight(term));
      }
      store_16(to_value + chunk * 16, pack<V>(blend.own));
    }
  } else if (!in_place) {
    for (u32 i = lane * 16; i < value_bytes; i += Lanes * 16) {
      store_16(to_value + i, load_16(value + i));
    }
  }
  if (!in_place && lane == 0) write_slot_numbers(plan, from, to, at, j, token);
}

// ---- in place ----------------------------------------------------------------------------------

/// How blocks take turns when rows move to lower slots of the same memory: chunk c of a segment may
/// write its slots once all chunks that read rows there have read them. Chunks are taken in order,
/// so whoever is waited for is running or done.
struct Turns {
  u32* ticket = nullptr;
  u32* has_read = nullptr;  ///< [chunks][segments]
  u32 chunk_slots = 0;
  u32 chunks = 0;
};

/// Slots of a segment whose anchor is below `token`. O(log count).
[[nodiscard]] KVLEAN_DEVICE u32 anchors_before(const u32* anchor, u32 count, u32 token) noexcept {
  u32 low = 0;
  u32 high = count;
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (anchor[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// One block a chunk of slots; shared: the chunk's rows.
template <int = 0>
__global__ void __launch_bounds__(move_threads)
    compact_kernel(const PlanView plan, const CacheView cache, u32 key_bytes, u32 value_bytes,
                   const Turns turns, const u32* error) {
  extern __shared__ __align__(16) char moved_rows[];
  __shared__ u32 my_ticket;
  constexpr u32 most_slots = 128;
  __shared__ u32 token_of[most_slots];
  __shared__ i32 position_of[most_slots];
  __shared__ float mass_of[most_slots];
  wait_for_previous();
  allow_next();
  if (has_failed(error)) return;
  if (threadIdx.x == 0) my_ticket = atomicAdd(turns.ticket, 1u);
  __syncthreads();
  const u32 segments = cache.num_segments();
  const u32 s = my_ticket % segments;
  const u32 chunk = my_ticket / segments;
  const u32 count = plan.length[s];
  const u32 first = chunk * turns.chunk_slots;
  if (first >= count) return;
  const u32 here = smaller(turns.chunk_slots, count - first);
  const Segment segment = cache.segments[s];
  const u32* anchor = plan.anchor + plan.slot(s, 0);
  if (threadIdx.x < here) {
    const u32 j = first + threadIdx.x;
    const u32 token = anchor[j];
    const u64 at = plan.slot(s, j);
    token_of[threadIdx.x] = token;
    position_of[threadIdx.x] =
        plan.position != nullptr ? plan.position[at] : segment.position(token);
    mass_of[threadIdx.x] = plan.log_mass != nullptr ? plan.log_mass[at] : segment.mass_bias(token);
  }
  __syncthreads();
  const u32 key_chunks = key_bytes / 16;
  const u32 value_chunks = value_bytes / 16;
  const u32 row_chunks = key_chunks + value_chunks;
  uint4* rows = reinterpret_cast<uint4*>(moved_rows);
  const bool moves = token_of[here - 1] != first + here - 1;  // else the chunk stays as it is
  if (moves) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < here * row_chunks; i += move_threads) {
      const u32 slot = i / row_chunks;
      const u32 c = i % row_chunks;
      const char* row = c < key_chunks ? segment.key_row(token_of[slot]) + c * 16
                                       : segment.value_row(token_of[slot]) + (c - key_chunks) * 16;
      rows[i] = load_16(row);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicExch(turns.has_read + static_cast<u64>(chunk) * segments + s, 1u);
    if (moves && chunk != 0) {
      // Slots whose anchors lie where this chunk writes, in chunks before this one.
      const u32 begin = anchors_before(anchor, count, first) / turns.chunk_slots;
      const u32 end =
          smaller(chunk, ceil_div(anchors_before(anchor, count, first + here), turns.chunk_slots));
      for (u32 c = begin; c < end; ++c) {
        const volatile u32* flag = turns.has_read + static_cast<u64>(c) * segments + s;
        while (*flag == 0) __nanosleep(64);
      }
      __threadfence();
    }
  }
  __syncthreads();
  if (moves) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < here * row_chunks; i += move_threads) {
      const u32 slot = first + i / row_chunks;
      const u32 c = i % row_chunks;
      char* row = c < key_chunks ? segment.key_row(slot) + c * 16
                                 : segment.value_row(slot) + (c - key_chunks) * 16;
      store_16(row, rows[i]);
    }
  }
  if (threadIdx.x < here) {
    const u32 j = first + threadIdx.x;
    if (segment.positions != nullptr) segment.positions[j] = position_of[threadIdx.x];
    if (segment.log_mass != nullptr) segment.log_mass[j] = mass_of[threadIdx.x];
  }
}

// ---- before and after --------------------------------------------------------------------------

/// Reports a destination that is too small, before anything is written.
template <int = 0>
__global__ void check_capacity_kernel(const PlanView plan, const CacheView destination,
                                      ErrorWord error) {
  const u32 s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s >= plan.segments) return;
  if (plan.length[s] > destination.segments[s].capacity) {
    report(error, StatusCode::destination_too_small);
  }
}

/// Writes lengths, next positions and, where asked for, running sums of lengths.
template <int = 0>
__global__ void finish_apply_kernel(const PlanView plan, const CacheView cache,
                                    const CacheView destination, const u32* error) {
  if (has_failed(error)) return;
  const u32 s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s < plan.segments) destination.lengths[s] = plan.length[s];
  if (destination.next_positions == nullptr || s >= destination.num_sequences) return;
  if (plan.next_position >= 0) {
    destination.next_positions[s] = plan.next_position;
  } else if (cache.next_positions != nullptr &&
             cache.next_positions != destination.next_positions) {
    destination.next_positions[s] = cache.next_positions[s];
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
