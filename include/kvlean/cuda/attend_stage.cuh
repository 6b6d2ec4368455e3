// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attend_split.cuh"

// How tiles of keys and values come to a warp: through its own stages of shared memory, whose
// copies are under way while another tile is multiplied.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

/// load_matrices() of the transposed matrices: lane l gets columns' elements 2 (l % 4) and one more
/// of column l / 4.
KVLEAN_DEVICE void load_transposed(u32 (&to)[4], u32 shared_row) noexcept {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_row)
               : "memory");
}

/// Fetches the line of an address, whose contents are asked for soon.
KVLEAN_DEVICE void prefetch_line(const void* global) noexcept {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}

/// Starts a copy of 4 bytes to shared memory; zeros where not valid.
KVLEAN_DEVICE void copy_async_4(u32 shared, const void* global, bool valid) noexcept {
  const u32 bytes = valid ? 4u : 0u;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

/// A tile of 16 tokens in shared memory: key rows, value rows, log masses, positions. The 16-byte
/// chunks of a row are swapped by its number, so that the lanes that read together meet no bank
/// twice: eight neighbouring chunks of two keys, one chunk of eight values.
template <u32 Width>
struct AttendStage {
  static constexpr u32 row_bytes = Width * 2;
  static constexpr u32 chunks = row_bytes / 16;
  static constexpr u32 values = attend_tile * row_bytes;  // where they begin
  static constexpr u32 masses = 2 * values;
  static constexpr u32 positions = masses + attend_tile * 4;
  static constexpr u32 bytes = positions + attend_tile * 4;
  static constexpr u32 count = Width <= 128 ? 3 : 2;  // stages of a warp
  static constexpr u32 block_bytes = attend_warps * count * bytes;
  static constexpr u32 blocks = Width <= 64 ? 4 : Width <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr bool wide = chunks % 8 == 0;  // else rows begin 64 bytes apart in the banks

  [[nodiscard]] static KVLEAN_DEVICE u32 key_swap(u32 row) noexcept {
    return wide ? (row & 1u) << 2 : 0;
  }
  [[nodiscard]] static KVLEAN_DEVICE u32 value_swap(u32 row) noexcept {
    return wide ? row & 7u : row >> 1 & 3u;
  }
  // Copy i of a lane: its row and chunk.
  static constexpr u32 copies = attend_tile * chunks / warp_threads;
  [[nodiscard]] static KVLEAN_HOST_DEVICE constexpr u32 row_of(u32 i, u32 lane) noexcept {
    if constexpr (warp_threads % chunks == 0) return lane / chunks + i * (warp_threads / chunks);
    if constexpr (chunks == warp_threads) return i;
    return lane / 4 + i % 2 * 8;
  }
  [[nodiscard]] static KVLEAN_HOST_DEVICE constexpr u32 chunk_of(u32 i, u32 lane) noexcept {
    if constexpr (warp_threads % chunks == 0) return lane % chunks;
    if constexpr (chunks == warp_threads) return lane;
    return lane % 4 + i / 2 * 4;
  }
};

/// A warp's tiles on their way: starts their copies in order.
template <u32 Width>
struct AttendFeed {
  using Stage = AttendStage<Width>;
  const char* key = nullptr;  ///< flat: this lane's place in the next tile
  const char* value = nullptr;
  i64 key_step = 0;  ///< bytes between the rows of a copy and the next
  i64 value_step = 0;
  u32 token = 0;  ///< where the next tile begins
  u32 last = 0;

  KVLEAN_DEVICE AttendFeed(const Segment& segment, u32 first, u32 end) noexcept
      : token(first), last(end) {
    const u32 t = first + Stage::row_of(0, threadIdx.x % warp_threads);
    key = static_cast<const char*>(segment.keys) + i64{t} * segment.key_stride;
    value = static_cast<const char*>(segment.values) + i64{t} * segment.value_stride;
    constexpr u32 rows = Stage::row_of(1, 0) - Stage::row_of(0, 0);
    key_step = i64{rows} * segment.key_stride;
    value_step = i64{rows} * segment.value_stride;
  }
  /// Copies a tile to `shared`, rows from `last` on as zeros, and goes on by `step` tokens.
  KVLEAN_DEVICE void next(u32 shared, const Segment& segment, u32 step) noexcept {
    if (token < last) {
      const u32 lane = threadIdx.x % warp_threads;
      const u32 left = last - token;
      if (segment.page_table == nullptr) {
        const char* key_row = key;
        const char* value_row = value;
#pragma unroll
        for (u32 i = 0; i < Stage::copies; ++i) {
          copy(shared, i, lane, key_row, value_row, left);
          // The rows of copies go up, or up and down again.
          const bool up = i + 1 < Stage::copies && Stage::row_of(i + 1, 0) > Stage::row_of(i, 0);
          key_row += up ? key_step : -key_step;
          value_row += up ? value_step : -value_step;
        }
        key += i64{step} * segment.key_stride;
        value += i64{step} * segment.value_stride;
      } else {
#pragma unroll 2
        for (u32 i = 0; i < Stage::copies; ++i) {
          i64 page = 0;
          u32 place = 0;
          segment.find_page(smaller(token + Stage::row_of(i, lane), last - 1), page, place);
          copy(shared, i, lane,
               static_cast<const char*>(segment.keys) + page * segment.key_page_stride +
                   i64{place} * segment.key_stride,
               static_cast<const char*>(segment.values) + page * segment.value_page_stride +
                   i64{place} * segment.value_stride,
               left);
        }
      }
      const u32 here = lane % attend_tile;
      if (lane < attend_tile) {
        if (segment.log_mass != nullptr) {
          copy_async_4(shared + Stage::masses + here * 4, segment.log_mass + token + here,
                       here < left);
        }
      } else if (segment.positions != nullptr) {
        copy_async_4(shared + Stage::positions + here * 4, segment.positions + token + here,
                     here < left);
      }
    }
    token += step;
    commit_copies();
  }

 private:
  KVLEAN_DEVICE static void copy(u32 shared, u32 i, u32 lane, const char* key_row,
                                 const char* value_row, u32 left) noexcept {
    const u32 row = Stage::row_of(i, lane);
    const u32 chunk = Stage::chunk_of(i, lane);
    const u32 to = shared + row * Stage::row_bytes;
    copy_async_16(to + (chunk ^ Stage::key_swap(row)) * 16, key_row + chunk * 16, row < left);
    copy_async_16(to + Stage::values + (chunk ^ Stage::value_swap(row)) * 16,
                  value_row + chunk * 16, row < left);
  }
};

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
