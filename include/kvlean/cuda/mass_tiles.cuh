// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/attention_tiles.cuh"

// The two operands of the passes over queries and keys. One stays in registers: 16 or 32 rows of a
// warp. The other streams through shared memory in tiles of 64 rows that all warps read. Both reach
// the tensor cores by ldmatrix, which leaves them where the products want them.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr u32 sum_threads = 256;
inline constexpr u32 sum_warps = sum_threads / warp_threads;
inline constexpr u32 resident_tiles = 4;  // tiles of queries that may stay in shared memory

/// Rows in shared memory, 16 bytes apart beyond their own, so that 16 bytes each of eight rows meet
/// no bank twice.
template <u32 Width>
struct PaddedTile {
  static constexpr u32 row_bytes = Width * 2;
  static constexpr u32 stride = row_bytes + 16;
  static constexpr u32 bytes = stride * tile_rows;
  static constexpr u32 stages = Width <= 128 ? 4 : 2;  // tiles under way or in use
};

/// Starts copying row threadIdx.x / 4 of a tile, by its four threads.
template <u32 Width>
KVLEAN_DEVICE void copy_tile_row(u32 tile, const char* row) noexcept {
  const u32 part = threadIdx.x % 4 * 16;
  const u32 to = tile + threadIdx.x / 4 * PaddedTile<Width>::stride + part;
#pragma unroll
  for (u32 g = 0; g < Width / 32; ++g) copy_async_16(to + g * 64, row + part + g * 64);
}

/// 16 * Tiles rows of a warp in registers, as the first factor.
template <u32 Width, u32 Tiles>
struct StationaryRows {
  static_assert(Width % 32 == 0);
  static constexpr u32 rows = 16 * Tiles;
  static constexpr u32 staged_bytes = rows * PaddedTile<Width>::stride;
  u32 a[Tiles][Width / 16][4];

  /// Starts copying them to shared memory of the warp's own; row(r) is the address of row r.
  template <class RowAddress>
  static KVLEAN_DEVICE void stage(u32 staged, RowAddress&& row) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 part = lane % 4 * 16;
#pragma unroll
    for (u32 r = 0; r < rows; r += 8) {
      const char* from = row(r + lane / 4) + part;
      const u32 to = staged + (r + lane / 4) * PaddedTile<Width>::stride + part;
#pragma unroll
      for (u32 g = 0; g < Width / 32; ++g) copy_async_16(to + g * 64, from + g * 64);
    }
  }
  /// Takes them from there, after wait_for_copies() and a warp barrier.
  KVLEAN_DEVICE void load(u32 staged) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 from = staged + lane % 16 * PaddedTile<Width>::stride + lane / 16 * 16;
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
      for (u32 k = 0; k < Width / 16; ++k) {
        load_matrices(a[m][k], from + m * 16 * PaddedTile<Width>::stride + k * 32);
      }
    }
  }
  /// sums[m][n]: these rows times rows 8 n .. 8 n + 8 of the 16 at this address.
  template <class E>
  KVLEAN_DEVICE void multiply(u32 streamed, float (&sums)[Tiles][2][4]) const noexcept {
    const u32 lane = threadIdx.x % warp_threads;
    const u32 from =
        streamed + (lane / 16 * 8 + lane % 8) * PaddedTile<Width>::stride + lane / 8 % 2 * 16;
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
      for (u32 n = 0; n < 2; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
    u32 b[2][4];
    load_matrices(b[0], from);
#pragma unroll
    for (u32 k = 0; k < Width / 16; ++k) {
      if (k + 1 < Width / 16) load_matrices(b[(k + 1) % 2], from + (k + 1) * 32);
#pragma unroll
      for (u32 m = 0; m < Tiles; ++m) {
        multiply_add<E>(sums[m][0], a[m][k], b[k % 2][0], b[k % 2][1]);
        multiply_add<E>(sums[m][1], a[m][k], b[k % 2][2], b[k % 2][3]);
      }
    }
  }
};

/// Quotients by a divisor that stays the same.
struct Divider {
  u32 divisor = 1;
  u32 inverse = 0xffffffffu;

  [[nodiscard]] static KVLEAN_DEVICE Divider of(u32 divisor) noexcept {
    return {divisor, 0xffffffffu / divisor};
  }
  KVLEAN_DEVICE void divide(u32 x, u32& quotient, u32& rest) const noexcept {
    quotient = __umulhi(x, inverse);  // at most one too small
    rest = x - quotient * divisor;
    if (rest >= divisor) {
      ++quotient;
      rest -= divisor;
    }
  }
};

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
