// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/simd/attention_kernels.hpp"

// What the attention of many query rows is summed over tokens with: products, powers, column sums.
// Lanes hold query rows, so that a row's shift, sum and weight are a lane's.

KVLEAN_NAMESPACE_BEGIN
namespace simd {

/// Query rows of a block of products at most: [token][16 or 32 lanes].
inline constexpr u32 lane_rows = 32;
/// Query rows and keys that tiles take in one call, at most.
inline constexpr u32 tile_rows_limit = 128;
inline constexpr u32 tile_keys_limit = 256;
/// Elements of a row that tiles take at most.
inline constexpr u32 tile_width_limit = 512;

/// How a product x of token t and row r becomes the power 2^(y - shift[r]):
/// y = factor * x, or cap * tanh(factor * x) where cap > 0, plus log2(e) * log_mass[t].
struct LaneLogits {
  float factor = 1.0f;                 ///< log2(e) * scale; with a cap, scale / softcap
  float cap = 0.0f;                    ///< log2(e) * softcap; 0: none
  const float* log_mass = nullptr;     ///< [tokens], or null: none
  const float* minus_shift = nullptr;  ///< [lanes]; -inf: all powers of the row are zero
  const float* begin = nullptr;        ///< [lanes] first token that each row sees, and the one
  const float* end = nullptr;          ///< after the last; null: every row sees every token

  [[nodiscard]] bool plain() const noexcept {
    return cap == 0.0f && log_mass == nullptr && begin == nullptr;
  }
};

/// Evenly spaced rows that a later call reads, to be fetched into the cache meanwhile; or none.
struct StridedAhead {
  const std::byte* first = nullptr;
  i64 stride = 0;
  u32 rows = 0;
  u32 bytes = 0;  ///< of a row
};

/// The kernels of one target; `lanes` is 16 or 32, `x` is [token][lanes]. Sums are in float; the
/// order of additions depends on the extents alone. A power is within (3e-7 + 1.2e-7 |y - shift|)
/// of the exact one, relative. NaN products give NaN powers, in their own lane and token only. No
/// argument needs alignment, and nothing beyond the extents is read or written.
struct MatrixKernels {
  /// x[t][r] = queries[.][r] . keys[t]; `queries` is [width][lanes], its stride the lanes. Fetches
  /// the rows of `ahead` meanwhile, at most as many as tokens.
  void (*products)(ConstFloatRows queries, ConstFloatRows keys, u32 tokens, u32 width,
                   StridedAhead ahead, float* x) noexcept;
  /// largest[r] = max(largest[r], y of all tokens that the row sees), NaN left out.
  void (*maxima)(const float* x, u32 tokens, u32 lanes, const LaneLogits& logits,
                 float* largest) noexcept;
  /// x becomes the powers, zero where a row does not see the token; sums[r] += those of the row.
  void (*powers)(float* x, u32 tokens, u32 lanes, const LaneLogits& logits, float* sums) noexcept;
  /// out[t] += the sum of weights[r] * x[t][r] over the rows whose weight is above zero.
  void (*columns)(const float* x, u32 tokens, u32 lanes, const float* weights, float* out) noexcept;
};

/// Query rows as tiles read them: see TileKernels::pack.
struct TileRows {
  const std::byte* packed = nullptr;
  u32 rows = 0;   ///< at most tile_rows_limit
  u32 steps = 0;  ///< parts of 32 elements of a row, the last padded with zeros
  u32 terms = 1;  ///< bf16 numbers whose sum a query element is, 1 or 2
};

/// Up to tile_keys_limit keys in bf16. Tile i holds keys 16 i and on: 16 rows of `steps` * 32
/// elements, stride[i] bytes apart, readable even past the last key. Rows at multiples of 64 bytes
/// are read about twice as fast.
struct TileKeys {
  const std::byte* const* tile = nullptr;
  const i64* stride = nullptr;
  u32 tokens = 0;
  u32 ahead = 0;  ///< pointers after these tiles' whose rows are to be fetched meanwhile
};

/// The rows [first, last) of a group, whose weighted powers are added to out[t].
struct TileSpan {
  u32 first = 0;
  u32 last = 0;
  float* out = nullptr;
};

/// The same with products made by AMX-BF16 tiles, which never leave the first cache level.
/// Products of bf16 numbers are exact, their sums are in float. A power is within (7e-7 +
/// 1.2e-7 |y - shift|) of the exact one, relative. LaneLogits and the arrays of rows
/// are padded to a multiple of 32 rows; a pad's minus_shift is -inf, its weight 0. Each call sets
/// up the tiles of its thread and releases them. Only on a CPU that supports Target::amx.
struct TileKernels {
  /// Packs up to 32 rows of floats, `stride` apart, `width` long, as bf16: rounded to nearest even
  /// with one term; with two, the rounding error follows and 17 bits are kept. `packed` is 64-byte
  /// aligned, takes tile_rows_bytes(32, steps, terms).
  void (*pack)(ConstFloatRows rows, u32 count, u32 width, u32 terms, std::byte* packed) noexcept;
  void (*maxima)(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                 float* largest) noexcept;
  /// sums[r] += the powers of the row.
  void (*sums)(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
               float* sums) noexcept;
  /// Spans ascend; rows in none are left out.
  void (*columns)(const TileRows& rows, const TileKeys& keys, const LaneLogits& logits,
                  const float* weights, const TileSpan* spans, u32 span_count) noexcept;
};

/// Bytes of `rows` packed rows.
[[nodiscard]] constexpr std::size_t tile_rows_bytes(u32 rows, u32 steps, u32 terms) noexcept {
  return (static_cast<std::size_t>(rows) + 31) / 32 * 2048 * steps * terms;
}

}  // namespace simd
KVLEAN_NAMESPACE_END

#if KVLEAN_SIMD_DEFINE
#define KVLEAN_SIMD_FILE "kvlean/simd/generic/matrix-inl.hpp"
#include "kvlean/simd/for_each_target-inl.hpp"
#if KVLEAN_SIMD_AMX
#include "kvlean/simd/amx/for_tiles-inl.hpp"
#endif
#endif

KVLEAN_NAMESPACE_BEGIN
namespace simd {
inline namespace KVLEAN_SIMD_BASELINE {

KVLEAN_SIMD_TABLES(MatrixTables, MatrixKernels, matrix_kernels_here)

[[nodiscard]] inline const MatrixKernels& matrix_kernels(Target target = Target::best) noexcept {
  return table_of<MatrixTables>(target);
}

#if KVLEAN_SIMD_AMX
struct TileTables {
#if !defined(KVLEAN_SEPARATE_KERNELS)
  static constexpr TileKernels amx = avx512::tiles::tile_kernels_here();
#else
  static const TileKernels amx;
#endif
};
#if defined(KVLEAN_SEPARATE_KERNELS) && defined(KVLEAN_KERNELS_UNIT)
constinit const TileKernels TileTables::amx = avx512::tiles::tile_kernels_here();
#endif
#endif

/// The kernels of AMX tiles where `target` is best or amx and this CPU has them, else null. O(1).
[[nodiscard]] inline const TileKernels* tile_kernels(Target target = Target::best) noexcept {
#if KVLEAN_SIMD_AMX
  const bool asked = target == Target::best || target == Target::amx;
  return asked && detail::has_tiles() ? &TileTables::amx : nullptr;
#else
  static_cast<void>(target);
  return nullptr;
#endif
}

}  // namespace KVLEAN_SIMD_BASELINE
}  // namespace simd
KVLEAN_NAMESPACE_END
