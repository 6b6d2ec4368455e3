// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/cache_view.cuh"
#include "kvlean/cuda/load_store.cuh"
#include "kvlean/cuda/merge_tile.cuh"
#include "kvlean/cuda/plan.cuh"
#include "kvlean/cuda/select.cuh"

// reduce/nearest_kept.hpp on the device: for each dropped token the slot with the most similar key,
// and terms sorted by slot.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 no_slot = 0xffffffffu;

/// Everything these kernels take, by value. Tokens that are dropped have numbers, in order.
struct NearestWork {
  CacheView cache;
  PlanView plan;
  Protection protection = {};
  bool spare_protected = false;  ///< protected slots don't receive
  float min_cosine = -2.0f;      ///< less similar tokens are evicted without a fold
  u32 tiles = 0;
  u64 stride = 0;
  const u8* keep = nullptr;       ///< [segments][stride]
  u32* dropped = nullptr;         ///< [segments][stride] token of each number
  u32* num_dropped = nullptr;     ///< [segments]
  float* inverse_norm = nullptr;  ///< [segments][stride] by token; 0: zero or not finite
  u32* has_extreme = nullptr;     ///< [segments] norms too large or small for tensor cores; zeroed
  u32* num_unsettled = nullptr;   ///< [segments] dropped tokens that a tile search left; zeroed
  u32* nearest = nullptr;         ///< [segments][stride] slot by number, or no_slot
  float* cosine = nullptr;        ///< [segments][stride] by number
  u32* cursor = nullptr;          ///< [segments][stride] by slot, zeroed
  u64* announced = nullptr;       ///< [segments][tiles], zeroed
  const float* bar = nullptr;     ///< [segments] instead of min_cosine, or null

  /// Numbers of the unsettled tokens, where their terms will be: nobody has written there yet.
  [[nodiscard]] KVLEAN_DEVICE u32* unsettled(u32 s) const noexcept {
    return plan.term_token + plan.term(s, 0);
  }

  /// Slots that may receive: [first, end).
  struct Receivers {
    u32 first = 0;
    u32 end = 0;
  };
  [[nodiscard]] KVLEAN_DEVICE Receivers receivers(u32 s) const noexcept {
    const u32 length = cache.lengths[s];
    const u32 slots = plan.length[s];
    const u32 frozen = cache.segments[s].frozen;
    // Protected tokens are all kept, so they are the first and the last slots.
    if (!spare_protected) return {smaller(frozen, slots), slots};
    const ProtectedRange range = ProtectedRange::of(protection, length, frozen);
    const u32 behind = length - range.back;
    const u32 first = smaller(range.front, slots);
    return {first, larger(first, slots - smaller(behind, slots))};
  }
  [[nodiscard]] KVLEAN_DEVICE bool accepts(u32 s, u64 number_at) const noexcept {
    return nearest[number_at] != no_slot &&
           cosine[number_at] >= (bar != nullptr ? bar[s] : min_cosine);
  }
};

/// Numbers the dropped tokens. keep and anchors are given.
template <int = 0>
__global__ void __launch_bounds__(cut_threads) number_dropped(const NearestWork work) {
  __shared__ u64 scan[warp_threads + 1];
  __shared__ u64 before[TileFlags::runs];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const u32 first_token = tile * cut_tile;
  const u32 length = work.cache.lengths[s];
  const u32 slots = work.plan.length[s];
  if (tile == 0 && threadIdx.x == 0) work.num_dropped[s] = slots != 0 ? length - slots : 0;
  if (first_token >= length || slots == 0) return;
  const u8* keep = work.keep + s * work.stride;
  const u32* anchor = work.plan.anchor + work.plan.slot(s, 0);
  u32 low = 0;  // slots before the tile
  for (u32 high = slots; low < high;) {
    const u32 middle = (low + high) / 2;
    if (anchor[middle] < first_token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  TileFlags flags;
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    flags.set(j, 0, token < length && keep[token] == 0);
    flags.set(j, 1, false);
    flags.set(j, 2, false);
    flags.set(j, 3, false);
  }
  static_cast<void>(flags.count(before, scan));
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    if (!flags.has(j, 0)) continue;
    const u32 token = first_token + j * cut_threads + threadIdx.x;
    work.dropped[s * work.stride + first_token - low + flags.before(j, 0, before)] = token;
  }
}

// The arithmetic of row_math::dot(): products of 16 lanes are rounded, added up in order, then the
// lanes pairwise. `Lanes` neighbouring threads share the 16 lanes of a row, 16 / Lanes each.

/// Threads that share a row when each loads 16 bytes at a time.
template <DType D>
inline constexpr u32 norm_lanes = 16 / elements_16<D>;

/// Adds the lanes; every thread of the team gets the sum. The whole warp calls.
template <u32 Lanes>
[[nodiscard]] KVLEAN_DEVICE float fold_lanes(float (&lane)[16 / Lanes]) noexcept {
  constexpr u32 own = 16 / Lanes;
#pragma unroll
  for (u32 step = Lanes / 2; step != 0; step /= 2) {
#pragma unroll
    for (u32 i = 0; i < own; ++i) {
      lane[i] = __fadd_rn(lane[i], __shfl_xor_sync(full_warp, lane[i], step));
    }
  }
#pragma unroll
  for (u32 half = 8; half != 0; half /= 2) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      if (i < half && half < own) lane[i] = __fadd_rn(lane[i], lane[(i + half) % own]);
    }
  }
  return lane[0];
}

/// Norms between which products and their sums are normal numbers.
inline constexpr float least_norm = 0x1p-50f;
inline constexpr float most_norm = 0x1p60f;

/// Inverse length of each key: load_unit_key()'s factor.
template <DType D>
__global__ void __launch_bounds__(256) invert_norms(const NearestWork work, u32 blocks) {
  constexpr u32 each = elements_16<D>;
  constexpr u32 lanes = norm_lanes<D>;
  constexpr u32 rows = 256 / lanes;
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 token = blockIdx.x % blocks * rows + threadIdx.x / lanes;
  const u32 lane = threadIdx.x % lanes;
  const u32 length = work.cache.lengths[s];
  if (blockIdx.x % blocks * rows >= length) return;
  float sum[each] = {};
  if (token < length) {
    const char* row = work.cache.segments[s].key_row(token);
    const u32 row_bytes = work.cache.key_width * element_bytes<D>;
    for (u32 offset = lane * 16; offset < row_bytes; offset += lanes * 16) {
      float x[each];
      unpack<D>(load_16_constant(row + offset), x);
#pragma unroll
      for (u32 i = 0; i < each; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(x[i], x[i]));
    }
  }
  const float norm = __fsqrt_rn(fold_lanes<lanes>(sum));
  if (token >= length || lane != 0) return;
  const bool usable = norm > 0.0f && norm <= 3.402823466e38f;
  work.inverse_norm[s * work.stride + token] = usable ? __fdiv_rn(1.0f, norm) : 0.0f;
  if (usable && !(norm >= least_norm && norm <= most_norm)) work.has_extreme[s] = 1;
}

/// A similarity and its slot; better() is find_nearest_kept()'s order.
struct Best {
  float value = -INFINITY;
  u32 slot = no_slot;
  KVLEAN_DEVICE void add(const Best& other) noexcept {
    if (other.value > value || (other.value == value && other.slot < slot)) *this = other;
  }
};

/// Writes what a search found for dropped token number `i`. `best.value` is the cosine.
KVLEAN_DEVICE void store_nearest(const NearestWork& work, u32 s, u32 i, u32 token, Best best,
                                 const NearestWork::Receivers& receivers) noexcept {
  const u64 at = s * work.stride + i;
  float cosine = -2.0f;
  u32 slot = no_slot;
  if (receivers.first < receivers.end) {
    // A zero or broken key is equally far from all: the first receives.
    const bool found = work.inverse_norm[s * work.stride + token] != 0.0f && best.slot != no_slot;
    slot = found ? best.slot : receivers.first;
    cosine = found ? smaller(larger(best.value, -1.0f), 1.0f) : 0.0f;
  }
  work.nearest[at] = slot;
  work.cosine[at] = cosine;
  if (work.bar != nullptr || slot == no_slot || !(cosine >= work.min_cosine)) return;
  atomicAdd(work.cursor + s * work.stride + slot, 1u);
}

inline constexpr u32 search_threads = 256;
inline constexpr u32 search_rows = 32;   // dropped tokens of a block
inline constexpr u32 search_slots = 32;  // slots of a tile
inline constexpr u32 search_chunk = 32;  // elements at a time

/// The search in the CPU's own arithmetic, bit for bit: any type, any width. A lane has a dropped
/// token, a warp 4 slots of each tile. With `unsettled`, only those tokens.
template <DType D>
__global__ void __launch_bounds__(search_threads)
    search_nearest(const NearestWork work, u32 blocks, bool unsettled) {
  constexpr u32 each = elements_16<D>;
  constexpr u32 warps = search_threads / warp_threads;
  constexpr u32 per_warp = search_slots / warps;
  constexpr u32 stride = search_chunk + 4;  // 16-byte aligned, rows in different banks
  __shared__ float row[search_chunk][search_rows + 1];
  alignas(16) __shared__ float key[search_slots][stride];
  __shared__ float found_value[warps][search_rows];
  __shared__ u32 found_slot[warps][search_rows];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 count = unsettled ? work.num_unsettled[s] : work.num_dropped[s];
  const u32 width = work.cache.key_width;
  const u32* dropped = work.dropped + s * work.stride;
  const u32* anchor = work.plan.anchor + work.plan.slot(s, 0);
  const float* inverse = work.inverse_norm + s * work.stride;
  const u32 lane = threadIdx.x % warp_threads;
  const u32 warp = threadIdx.x / warp_threads;
  for (u32 first = blockIdx.x % blocks * search_rows; first < count;
       first += blocks * search_rows) {
    const Segment segment = work.cache.segments[s];
    const NearestWork::Receivers receivers = work.receivers(s);
    const auto number = [&](u32 r) noexcept {
      return unsettled ? work.unsettled(s)[first + r] : first + r;
    };
    Best best;
    for (u32 slot = receivers.first; slot < receivers.end; slot += search_slots) {
      float sum[per_warp][16] = {};
      for (u32 from = 0; from < width; from += search_chunk) {
        constexpr u32 pieces = search_chunk / each;
        __syncthreads();
        for (u32 i = threadIdx.x; i < (search_rows + search_slots) * pieces; i += search_threads) {
          const u32 r = i / pieces;
          const u32 element = from + i % pieces * each;
          const bool is_row = r < search_rows;
          float x[each] = {};
          const bool is_there = is_row ? first + r < count : slot + r - search_rows < receivers.end;
          if (element < width && is_there) {
            const u32 token = is_row ? dropped[number(r)] : anchor[slot + r - search_rows];
            const float factor = inverse[token];
            if (factor != 0.0f) {
              unpack<D>(load_16_constant(segment.key_row(token) + element * element_bytes<D>), x);
#pragma unroll
              for (u32 k = 0; k < each; ++k) x[k] = __fmul_rn(x[k], factor);
            }
          }
#pragma unroll
          for (u32 k = 0; k < each; ++k) {
            if (is_row) {
              row[i % pieces * each + k][r] = x[k];
            } else {
              key[r - search_rows][i % pieces * each + k] = x[k];
            }
          }
        }
        __syncthreads();
#pragma unroll 1
        for (u32 part = 0; part < search_chunk; part += 16) {
#pragma unroll
          for (u32 k = 0; k < 16; k += 4) {
            float mine[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) mine[e] = row[part + k + e][lane];
#pragma unroll
            for (u32 i = 0; i < per_warp; ++i) {
              const float4 other =
                  *reinterpret_cast<const float4*>(&key[warp * per_warp + i][part + k]);
              sum[i][k] = __fadd_rn(sum[i][k], __fmul_rn(mine[0], other.x));
              sum[i][k + 1] = __fadd_rn(sum[i][k + 1], __fmul_rn(mine[1], other.y));
              sum[i][k + 2] = __fadd_rn(sum[i][k + 2], __fmul_rn(mine[2], other.z));
              sum[i][k + 3] = __fadd_rn(sum[i][k + 3], __fmul_rn(mine[3], other.w));
            }
          }
        }
      }
#pragma unroll
      for (u32 i = 0; i < per_warp; ++i) {
        const u32 candidate = slot + warp * per_warp + i;
        const float value = fold_lanes<1>(sum[i]);
        if (candidate < receivers.end && value > best.value) best = Best{value, candidate};
      }
    }
    __syncthreads();
    found_value[warp][lane] = best.value;
    found_slot[warp][lane] = best.slot;
    __syncthreads();
    if (warp == 0 && first + lane < count) {
      for (u32 w = 1; w < warps; ++w) best.add(Best{found_value[w][lane], found_slot[w][lane]});
      const u32 i = number(lane);
      store_nearest(work, s, i, dropped[i], best, receivers);
    }
  }
}

/// Counts the terms of each slot where the bar was not known before. One thread a dropped token.
template <int = 0>
__global__ void __launch_bounds__(256) count_accepted(const NearestWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 i = blockIdx.x % blocks * 256 + threadIdx.x;
  if (i >= work.num_dropped[s]) return;
  const u64 at = s * work.stride + i;
  if (work.accepts(s, at)) atomicAdd(work.cursor + s * work.stride + work.nearest[at], 1u);
}

/// From counts to ranges of terms. Leaves the begin of each range in the cursor too.
template <int = 0>
__global__ void __launch_bounds__(cut_threads) range_terms(const NearestWork work) {
  __shared__ u64 scan[warp_threads + 1];
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / work.tiles;
  const u32 tile = blockIdx.x % work.tiles;
  const u32 slots = work.plan.length[s];
  const u32 first_slot = tile * cut_tile;
  if (first_slot >= slots) return;
  u32* cursor = work.cursor + s * work.stride;
  u32 count[cut_each];
  u64 sum = 0;
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 slot = first_slot + threadIdx.x * cut_each + j;
    count[j] = slot < slots ? cursor[slot] : 0;
    sum += count[j];
  }
  u64 total = 0;
  u32 at = static_cast<u32>(block_scan<cut_threads>(sum, scan, total));
  u64* announced = work.announced + static_cast<u64>(s) * work.tiles;
  if (threadIdx.x == 0) announce(announced + tile, 0, static_cast<u32>(total));
  if (tile != 0) at += sum_announced(announced, tile, scan).equal;
#pragma unroll
  for (u32 j = 0; j < cut_each; ++j) {
    const u32 slot = first_slot + threadIdx.x * cut_each + j;
    if (slot >= slots) continue;
    const u64 entry = work.plan.slot(s, slot);
    work.plan.term_begin[entry] = at;
    cursor[slot] = at;
    at += count[j];
    work.plan.term_end[entry] = at;
  }
}

/// Puts each accepted token among its slot's terms, in any order. term_token holds its number.
template <int = 0>
__global__ void __launch_bounds__(256) place_terms(const NearestWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 i = blockIdx.x % blocks * 256 + threadIdx.x;
  if (i >= work.num_dropped[s]) return;
  const u64 at = s * work.stride + i;
  if (!work.accepts(s, at)) return;
  const u32 term = atomicAdd(work.cursor + s * work.stride + work.nearest[at], 1u);
  work.plan.term_token[work.plan.term(s, term)] = i;
}

inline constexpr u32 sorted_by_thread = 24;

/// Sorts each slot's terms by token and replaces numbers by tokens; term_weight gets the cosine. A
/// slot with many terms collects them anew, in order, with a whole warp.
template <int = 0>
__global__ void __launch_bounds__(128) sort_terms(const NearestWork work, u32 blocks) {
  wait_for_previous();
  allow_next();
  const u32 s = blockIdx.x / blocks;
  const u32 slots = work.plan.length[s];
  if (blockIdx.x % blocks * 128 >= slots) return;
  const u32 slot = blockIdx.x % blocks * 128 + threadIdx.x;
  const u32 lane = threadIdx.x % warp_threads;
  const u64 row = s * work.stride;
  u32 begin = 0;
  u32 terms = 0;
  if (slot < slots) {
    begin = work.plan.term_begin[work.plan.slot(s, slot)];
    terms = work.plan.term_end[work.plan.slot(s, slot)] - begin;
  }
  if (terms <= sorted_by_thread) {
    u32* token = work.plan.term_token + work.plan.term(s, begin);
    for (u32 i = 1; i < terms; ++i) {
      const u32 mine = token[i];
      u32 place = i;
      for (; place != 0 && token[place - 1] > mine; --place) token[place] = token[place - 1];
      token[place] = mine;
    }
    for (u32 i = 0; i < terms; ++i) {
      work.plan.term_weight[work.plan.term(s, begin + i)] = work.cosine[row + token[i]];
      token[i] = work.dropped[row + token[i]];
    }
  }
  u32 pending = __ballot_sync(full_warp, terms > sorted_by_thread);
  const u32 count = work.num_dropped[s];
  while (pending != 0) {
    const u32 owner = static_cast<u32>(__ffs(pending)) - 1;
    pending &= pending - 1;
    const u32 wanted = slot - lane + owner;
    u32 term = __shfl_sync(full_warp, begin, owner);
    for (u32 from = 0; from < count; from += warp_threads) {
      const u32 i = from + lane;
      const bool mine = i < count && work.nearest[row + i] == wanted && work.accepts(s, row + i);
      const u32 all = __ballot_sync(full_warp, mine);
      if (mine) {
        const u64 at = work.plan.term(s, term + __popc(all & ((1u << lane) - 1)));
        work.plan.term_token[at] = work.dropped[row + i];
        work.plan.term_weight[at] = work.cosine[row + i];
      }
      term += __popc(all);
    }
  }
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
