// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "kvlean/config.hpp"

KVLEAN_NAMESPACE_BEGIN

/// Storage type of a tensor's elements.
enum class DType : u8 { f32, f16, bf16 };

[[nodiscard]] constexpr std::size_t size_bytes(DType dtype) noexcept {
  return dtype == DType::f32 ? 4 : 2;
}

[[nodiscard]] constexpr const char* name(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
  }
  return "unknown";
}

namespace detail {

// IEEE binary32 -> binary16, round to nearest even, subnormals kept, overflow to infinity, NaN
// quiet.
[[nodiscard]] constexpr u16 f32_to_f16_bits(float value) noexcept {
  const u32 bits = std::bit_cast<u32>(value);
  const u32 sign = (bits >> 16) & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<u16>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  }
  if (magnitude >= 0x47800000u) return static_cast<u16>(sign | 0x7c00u);  // >= 65536, infinity too
  if (magnitude < 0x38800000u) {                                          // below 2^-14: subnormal
    // 2^-1 as binary32 has its last mantissa bit at 2^-24, the smallest binary16 subnormal, so the
    // addition rounds to nearest even exactly where it should.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<u16>(sign | (std::bit_cast<u32>(shifted) - 0x3f000000u));
  }
  const u32 odd = (magnitude >> 13) & 1u;
  const u32 rounded = magnitude - 0x38000000u + 0xfffu + odd;  // rebias 127 -> 15, then round
  return static_cast<u16>(sign | (rounded >> 13));
}

[[nodiscard]] constexpr float f16_bits_to_f32(u16 half) noexcept {
  const u32 sign = static_cast<u32>(half & 0x8000u) << 16;
  const u32 magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    const u32 quiet = magnitude > 0x7c00u ? 0x400000u : 0u;  // as the hardware's conversions do
    return std::bit_cast<float>(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

// binary32 -> bfloat16, round to nearest even, NaN quiet.
[[nodiscard]] constexpr u16 f32_to_bf16_bits(float value) noexcept {
  const u32 bits = std::bit_cast<u32>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((bits >> 16) | 0x40u);
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[nodiscard]] constexpr float bf16_bits_to_f32(u16 bits) noexcept {
  return std::bit_cast<float>(static_cast<u32>(bits) << 16);
}

}  // namespace detail

/// IEEE half precision as storage: converts from and to float, does no arithmetic of its own.
struct f16 {
  u16 bits = 0;
  constexpr f16() noexcept = default;
  constexpr explicit f16(float value) noexcept : bits(detail::f32_to_f16_bits(value)) {}
  constexpr explicit operator float() const noexcept { return detail::f16_bits_to_f32(bits); }
};

/// bfloat16 as storage: the upper half of a binary32.
struct bf16 {
  u16 bits = 0;
  constexpr bf16() noexcept = default;
  constexpr explicit bf16(float value) noexcept : bits(detail::f32_to_bf16_bits(value)) {}
  constexpr explicit operator float() const noexcept { return detail::bf16_bits_to_f32(bits); }
};

static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2);
static_assert(std::is_trivially_copyable_v<f16> && std::is_trivially_copyable_v<bf16>);

/// Element types a view can be made of.
template <class T>
concept StorageType = std::is_same_v<T, float> || std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

template <StorageType T>
inline constexpr DType dtype_of = std::is_same_v<T, float> ? DType::f32
                                  : std::is_same_v<T, f16> ? DType::f16
                                                           : DType::bf16;

/// Reads one element from any address; alignment is not required.
[[nodiscard]] inline float load_element(const void* address, DType dtype) noexcept {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, address, sizeof value);
    return value;
  }
  u16 bits;
  std::memcpy(&bits, address, sizeof bits);
  return dtype == DType::f16 ? detail::f16_bits_to_f32(bits) : detail::bf16_bits_to_f32(bits);
}

/// Writes one element, rounded to nearest even, to any address.
inline void store_element(void* address, DType dtype, float value) noexcept {
  if (dtype == DType::f32) {
    std::memcpy(address, &value, sizeof value);
    return;
  }
  const u16 bits =
      dtype == DType::f16 ? detail::f32_to_f16_bits(value) : detail::f32_to_bf16_bits(value);
  std::memcpy(address, &bits, sizeof bits);
}

KVLEAN_NAMESPACE_END
