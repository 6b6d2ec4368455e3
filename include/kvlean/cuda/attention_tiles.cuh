// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvlean/cuda/load_store.cuh"
#include "kvlean/cuda/observation.cuh"
#include "kvlean/cuda/tensor_core.cuh"

// What the two passes over queries and keys share: tiles of rows in shared memory, products of a
// warp's rows with them, logits to base 2.

KVLEAN_CUDA_NAMESPACE_BEGIN
namespace detail {

inline constexpr float log2_e = 1.4426950408889634f;
inline constexpr u32 mass_threads = 128;
inline constexpr u32 mass_warps = mass_threads / warp_threads;
inline constexpr u32 tile_rows = 64;  // rows that stream through shared memory at a time
inline constexpr i32 unseen_position = 0x7fffffff;

/// How logits become exponents of 2: x = product * factor, or cap * tanh(product * factor), plus
/// the log mass times log2(e).
struct LogitSpec {
  float factor = 0.0f;
  float cap = 0.0f;  ///< in base 2; 0: none

  [[nodiscard]] static LogitSpec of(const Attention& attention, u32 width) noexcept {
    const float scale = attention.scale_for(width);
    if (attention.softcap == 0.0f) return {scale * log2_e, 0.0f};
    return {scale / attention.softcap, attention.softcap * log2_e};
  }
  template <bool Capped>
  [[nodiscard]] KVLEAN_DEVICE float exponent(float product, float bias) const noexcept {
    if constexpr (Capped) return fmaf(tanhf(product * factor), cap, bias);
    return fmaf(product, factor, bias);
  }
  /// The same where `Plain` says that there is neither cap nor bias.
  template <bool Plain>
  [[nodiscard]] KVLEAN_DEVICE float logit(float product, float bias) const noexcept {
    if constexpr (Plain) return product * factor;
    return cap != 0.0f ? exponent<true>(product, bias) : exponent<false>(product, bias);
  }
  /// 2^(logit + shift).
  template <bool Plain>
  [[nodiscard]] KVLEAN_DEVICE float power(float product, float bias, float shift) const noexcept {
    if constexpr (Plain) return exp2_approximate(fmaf(product, factor, shift));
    return exp2_approximate(logit<false>(product, bias) + shift);
  }
};

/// Makes four registers the place where these values live: or-ed with a zero that the compiler
/// cannot know. They come from two loads of 16 bytes each, whose registers it would otherwise keep,
/// and copy four of them before every product.
KVLEAN_DEVICE void settle(u32 (&a)[4]) noexcept {
  const u32 zero = blockDim.y - 1;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) a[i] |= zero;
}

/// A lane's part of 16 * Tiles rows of Width elements of 16 bits, ready as the first factor. The
/// sum over a row may be taken in any order, so a lane holds 16 neighbouring bytes of each 64 (not
/// the instruction's own columns) and reads the second factor in the same order.
template <u32 Width, u32 Tiles>
struct RowFragments {
  static_assert(Width % 32 == 0);
  static constexpr u32 groups = Width / 32;
  u32 a[Tiles][groups * 2][4];

  /// row(r) is the address of row r of the warp's 16 * Tiles.
  template <class RowAddress>
  KVLEAN_DEVICE void load(RowAddress&& row) noexcept {
    const u32 lane = threadIdx.x % warp_threads;
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
      const char* upper = row(m * 16 + lane / 4) + lane % 4 * 16;
      const char* lower = row(m * 16 + lane / 4 + 8) + lane % 4 * 16;
#pragma unroll
      for (u32 g = 0; g < groups; ++g) {
        const uint4 x = load_16_constant(upper + g * 64);
        const uint4 y = load_16_constant(lower + g * 64);
        a[m][2 * g][0] = x.x;
        a[m][2 * g][1] = y.x;
        a[m][2 * g][2] = x.y;
        a[m][2 * g][3] = y.y;
        a[m][2 * g + 1][0] = x.z;
        a[m][2 * g + 1][1] = y.z;
        a[m][2 * g + 1][2] = x.w;
        a[m][2 * g + 1][3] = y.w;
        settle(a[m][2 * g]);
        settle(a[m][2 * g + 1]);
      }
    }
  }
};

/// 64 rows in shared memory, 64 bytes apart beyond their own, so that eight lanes that read 16
/// bytes each of two rows meet no bank twice.
template <u32 Width>
struct SharedTile {
  static constexpr u32 row_bytes = Width * 2;
  static constexpr u32 stride = row_bytes % 128 == 64 ? row_bytes : row_bytes + 64;
  static_assert(stride >= row_bytes && stride % 128 == 64);
  static constexpr u32 bytes = stride * tile_rows;
};

inline constexpr u32 ring = 4;  // tiles whose row descriptions are kept: two ahead of the products

/// Starts copying a tile of the rows at these addresses; null: zeros.
template <u32 Width>
KVLEAN_DEVICE void fill_tile(u32 shared, const char* const (&rows)[tile_rows]) noexcept {
  constexpr u32 chunks = Width / 8;
#pragma unroll 8
  for (u32 i = threadIdx.x; i < tile_rows * chunks; i += mass_threads) {
    const char* from = rows[i / chunks];
    copy_async_16(shared + i / chunks * SharedTile<Width>::stride + i % chunks * 16,
                  from + (from != nullptr ? i % chunks * 16 : 0), from != nullptr);
  }
}

/// sums[m][n]: the warp's rows times rows 8 (2 pair + n) .. + 8 of the tile.
template <class E, u32 Width, u32 Tiles>
KVLEAN_DEVICE void multiply_pair(const RowFragments<Width, Tiles>& rows, const char* tile, u32 pair,
                                 float (&sums)[Tiles][2][4]) noexcept {
  const u32 lane = threadIdx.x % warp_threads;
  const char* from = tile + (pair * 16 + lane / 4) * SharedTile<Width>::stride + lane % 4 * 16;
#pragma unroll
  for (u32 m = 0; m < Tiles; ++m) {
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (u32 g = 0; g < RowFragments<Width, Tiles>::groups; ++g) {
    const uint4 b0 = *reinterpret_cast<const uint4*>(from + g * 64);
    const uint4 b1 = *reinterpret_cast<const uint4*>(from + 8 * SharedTile<Width>::stride + g * 64);
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
      multiply_add<E>(sums[m][0], rows.a[m][2 * g], b0.x, b0.y);
      multiply_add<E>(sums[m][1], rows.a[m][2 * g], b1.x, b1.y);
    }
#pragma unroll
    for (u32 m = 0; m < Tiles; ++m) {
      multiply_add<E>(sums[m][0], rows.a[m][2 * g + 1], b0.z, b0.w);
      multiply_add<E>(sums[m][1], rows.a[m][2 * g + 1], b1.z, b1.w);
    }
  }
}

/// The softmax sum of one row, in base 2: sum of 2^(x - largest). NaN is left out; with a largest
/// of +inf the sum counts the infinities.
struct RowSum {
  float largest = -INFINITY;
  float sum = 0.0f;

  KVLEAN_DEVICE void add(const RowSum& other) noexcept {
    const float top = fmaxf(largest, other.largest);
    if (top == -INFINITY) return;
    if (top == INFINITY) {
      sum = (largest == top ? sum : 0.0f) + (other.largest == top ? other.sum : 0.0f);
    } else {
      sum =
          sum * exp2_approximate(largest - top) + other.sum * exp2_approximate(other.largest - top);
    }
    largest = top;
  }
  /// Adds the sum of the lane `step` away, in the same order in both, hence with the same bits.
  KVLEAN_DEVICE void join_across(u32 step, bool lower) noexcept {
    const float other_largest = __shfl_xor_sync(full_warp, largest, step);
    const float other_sum = __shfl_xor_sync(full_warp, sum, step);
    RowSum first{lower ? largest : other_largest, lower ? sum : other_sum};
    first.add(RowSum{lower ? other_largest : largest, lower ? other_sum : sum});
    *this = first;
  }
  /// Adds `count` exponents of the row.
  template <u32 count>
  KVLEAN_DEVICE void add(const float (&x)[count]) noexcept {
    float top = largest;
#pragma unroll
    for (u32 i = 0; i < count; ++i) top = fmaxf(top, x[i]);  // which leaves NaN out
    if (top == -INFINITY) return;
    if (top == INFINITY) {
      if (largest != top) sum = 0.0f;
#pragma unroll
      for (u32 i = 0; i < count; ++i) sum += x[i] == top ? 1.0f : 0.0f;
    } else {
      if (top != largest) sum *= exp2_approximate(largest - top);
#pragma unroll
      for (u32 i = 0; i < count; ++i) sum += fmaxf(exp2_approximate(x[i] - top), 0.0f);
    }
    largest = top;
  }
  /// log2 of the sum, +inf when infinities share the mass.
  [[nodiscard]] KVLEAN_DEVICE float log2_sum() const noexcept {
    if (largest == INFINITY || largest == -INFINITY) return largest;
    return largest + log2f(sum);
  }
};

/// Calls function(E{}, width, tiles) for the tensor-core shapes; false if there is none.
template <class Function>
[[nodiscard]] bool with_tensor_shape(DType dtype, u32 width, Function&& function) noexcept {
  const auto with_width = [&](auto element) noexcept {
    using Width64 = std::integral_constant<u32, 64>;
    using Width96 = std::integral_constant<u32, 96>;
    using Width128 = std::integral_constant<u32, 128>;
    using Width256 = std::integral_constant<u32, 256>;
    using One = std::integral_constant<u32, 1>;
    using Two = std::integral_constant<u32, 2>;
    if (width == 64) return function(element, Width64{}, Two{}), true;
    if (width == 96) return function(element, Width96{}, Two{}), true;
    if (width == 128) return function(element, Width128{}, Two{}), true;
    if (width == 256) return function(element, Width256{}, One{}), true;
    return false;
  };
  if (dtype == DType::bf16) return with_width(__nv_bfloat16{});
  if (dtype == DType::f16) return with_width(__half{});
  return false;
}

}  // namespace detail
KVLEAN_CUDA_NAMESPACE_END
