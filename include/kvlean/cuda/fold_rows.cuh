// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/move_rows.cuh"

// Blends of rows that do not turn. A warp takes neighbouring slots and walks over all their rows,
// anchor first and then the terms, as one list: eight rows are under way at a time whatever the
// slots' sizes, and every row is read once. Its first lanes hold 16 bytes each of the key, the next
// ones of the value.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 fold_threads = 128;
inline constexpr u32 fold_warps = fold_threads / warp_threads;
inline constexpr u32 fold_slots = warp_threads;  // of a warp: lane i looks after slot i
inline constexpr u32 fold_batch = 8;             // rows whose loads are under way

/// What the lanes of a warp tell each other: where 32 rows lie and how they count, and where the
/// warp's slots go. First index 0: keys, 1: values.
struct alignas(16) FoldList {
  const char* row[2][warp_threads];
  float weight[2][warp_threads];
  char* target[2][fold_slots];  ///< null: the row stays as it is
};

/// One row of a warp's list.
struct FoldRow {
  const char* key = nullptr;
  const char* value = nullptr;
  float key_weight = 0.0f;
  float value_weight = 0.0f;
  bool last = false;  ///< of its slot
};

/// The slots of a warp: lane i holds slot i.
struct FoldSlots {
  u32 anchor = 0;
  u32 term_begin = 0;
  u32 rows = 0;    ///< anchor and terms; 0: no slot
  u32 before = 0;  ///< rows of the slots before
  u32 total = 0;   ///< rows of all
  float key_weight = 1.0f;
  float value_weight = 1.0f;

  /// The whole warp calls this and look_up().
  KVLEAN_DEVICE void load(const PlanView& plan, u64 entry, bool fine) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    if (fine) {
      anchor = plan.anchor[entry];
      term_begin = plan.has_terms() ? plan.term_begin[entry] : 0;
      rows = 1 + (plan.has_terms() ? plan.term_end[entry] - term_begin : 0);
      key_weight = plan.key_self_weight(entry);
      value_weight = plan.value_self_weight(entry);
    }
    before = rows;
#pragma unroll
    for (u32 step = 1; step < warp_threads; step *= 2) {
      const u32 other = __shfl_up_sync(full_warp, before, step);
      if (lane >= step) before += other;
    }
    total = __shfl_sync(full_warp, before, warp_threads - 1);
    before -= rows;
  }
  /// Row `number` of the list; behind the last, that again. Keys that stay are the anchor's in all
  /// rows of a slot.
  [[nodiscard]] KVLEAN_DEVICE FoldRow look_up(const PlanView& plan, const Segment& from, u32 s,
                                              u32 number, bool blends) const noexcept {
    const u32 known = smaller(number, total - 1);
    u32 slot = 0;  // the last that begins at or before it
#pragma unroll
    for (u32 step = warp_threads / 2; step != 0; step /= 2) {
      if (__shfl_sync(full_warp, before, slot + step) <= known) slot += step;
    }
    const u32 within = known - __shfl_sync(full_warp, before, slot);
    const u32 count = __shfl_sync(full_warp, rows, slot);
    const u32 begin = __shfl_sync(full_warp, term_begin, slot);
    const u32 own = __shfl_sync(full_warp, anchor, slot);
    u32 token = own;
    FoldRow row;
    row.key_weight = __shfl_sync(full_warp, key_weight, slot);
    row.value_weight = __shfl_sync(full_warp, value_weight, slot);
    if (within != 0) {
      const u64 at = plan.term(s, begin + within - 1);
      token = plan.term_token[at];
      row.key_weight = plan.term_weight[at];
      row.value_weight = plan.value_term_weight(at);
    }
    row.last = number < total && within + 1 == count;
    row.key = from.key_row(blends ? token : own);
    row.value = from.value_row(token);
    return row;
  }
};

/// Adds a row's 16 bytes of type D.
template <DType D>
KVLEAN_DEVICE void blend_16(const uint4& bits, float weight, float (&sum)[8]) noexcept {
  float x[elements_16<D>];
  unpack<D>(bits, x);
#pragma unroll
  for (u32 i = 0; i < elements_16<D>; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
}

/// Writes every slot's blended rows: to the destination, or (in place) to its anchor's own place,
/// where nobody else reads. Blocks (slots, segment).
template <DType K, DType V>
__global__ void __launch_bounds__(fold_threads)
    fold_rows_kernel(const PlanView plan, const CacheView cache, const CacheView destination,
                     bool in_place, const u32* error) {
  __shared__ FoldList lists[fold_warps];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.y;
  const u32 count = plan.length[s];
  const u32 warp = threadIdx.x / warp_threads;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 first_slot = (blockIdx.x * fold_warps + warp) * fold_slots;
  if (first_slot >= count || has_failed(error)) return;
  const Segment from = cache.segments[s];
  const bool blends = (plan.needs & needs_moved_keys) != 0;
  const u32 j = first_slot + lane;
  FoldList& list = lists[warp];
  FoldSlots slots;
  slots.load(plan, plan.slot(s, j), j < count);
  const bool keeps_key = !blends || (slots.rows == 1 && slots.key_weight == 1.0f);
  const bool keeps_value = slots.rows == 1 && slots.value_weight == 1.0f;
  const u32 kept_keys = __ballot_sync(full_warp, keeps_key);
  const u32 kept_values = __ballot_sync(full_warp, keeps_value);
  if (j < count) {
    const Segment to = in_place ? from : destination.segments[s];
    const u32 slot = in_place ? slots.anchor : j;
    list.target[0][lane] = in_place && keeps_key ? nullptr : to.key_row(slot);
    list.target[1][lane] = in_place && keeps_value ? nullptr : to.value_row(slot);
    if (!in_place) write_slot_numbers(plan, from, to, plan.slot(s, j), j, slots.anchor);
  }
  const u32 key_chunks = cache.key_width * element_bytes<K> / 16;
  const u32 chunks = key_chunks + cache.value_width * element_bytes<V> / 16;
  for (u32 chunk_base = 0; chunk_base < chunks; chunk_base += warp_threads) {
    const u32 chunk = chunk_base + lane;
    const bool has_chunk = chunk < chunks;
    const bool of_key = chunk < key_chunks;
    const u32 offset = has_chunk ? (of_key ? chunk : chunk - key_chunks) * 16 : 0;
    const char* const* row = list.row[of_key ? 0 : 1];
    const float* weight = list.weight[of_key ? 0 : 1];
    char* const* target = list.target[of_key ? 0 : 1];
    const u32 kept = of_key ? kept_keys : kept_values;
    u32 slot = 0;
    float sum[8] = {};
    FoldRow next = slots.look_up(plan, from, s, lane, blends);
    for (u32 base = 0; base < slots.total; base += warp_threads) {
      __syncwarp();
      list.row[0][lane] = next.key;
      list.row[1][lane] = next.value;
      list.weight[0][lane] = next.key_weight;
      list.weight[1][lane] = next.value_weight;
      u32 last = __ballot_sync(full_warp, next.last);
      __syncwarp();
      if (base + warp_threads < slots.total) {
        next = slots.look_up(plan, from, s, base + warp_threads + lane, blends);
      }
      const u32 here = smaller(warp_threads, slots.total - base);
#pragma unroll 1
      for (u32 round = 0; round < here; round += fold_batch) {
        uint4 bits[fold_batch];
#pragma unroll
        for (u32 i = 0; i < fold_batch; ++i) bits[i] = load_16(row[round + i] + offset);
#pragma unroll
        for (u32 i = 0; i < fold_batch; ++i) {
          if constexpr (K == V) {
            blend_16<K>(bits[i], weight[round + i], sum);
          } else if (of_key) {
            blend_16<K>(bits[i], weight[round + i], sum);
          } else {
            blend_16<V>(bits[i], weight[round + i], sum);
          }
          if ((last >> i & 1) == 0) continue;
          char* place = target[slot];
          uint4 result;
          if constexpr (K == V) {
            result = pack<K>(sum);
          } else {
            result = of_key ? pack<K>(sum) : pack<V>(sum);
          }
          if ((kept >> slot & 1) != 0) result = bits[i];
          if (has_chunk && place != nullptr) store_16_once(place + offset, result);
          ++slot;
#pragma unroll
          for (float& x : sum) x = 0.0f;
        }
        last >>= fold_batch;
      }
    }
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
