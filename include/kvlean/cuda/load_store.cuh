// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kvlean/core/dtype.hpp"
#include "kvlean/cuda/config.cuh"

// 16 bytes of a row at a time: 4 binary32 or 8 half precision elements.

KVLEAN_CUDA_NAMESPACE_BEGIN

namespace detail {
template <DType D>
struct StorageOf {
  using type = float;
};
template <>
struct StorageOf<DType::f16> {
  using type = __half;
};
template <>
struct StorageOf<DType::bf16> {
  using type = __nv_bfloat16;
};
}  // namespace detail

/// CUDA's type of the same bits as kvlean::f16, kvlean::bf16 or float.
template <DType D>
using Storage = typename detail::StorageOf<D>::type;

template <DType D>
inline constexpr u32 element_bytes = D == DType::f32 ? 4 : 2;
/// Elements in 16 bytes.
template <DType D>
inline constexpr u32 elements_16 = 16 / element_bytes<D>;

/// 16-byte loads. `place` is 16-byte aligned.
[[nodiscard]] KVLEAN_DEVICE uint4 load_16(const void* place) noexcept {
  return *static_cast<const uint4*>(place);
}
/// For memory that nothing writes during the kernel.
[[nodiscard]] KVLEAN_DEVICE uint4 load_16_constant(const void* place) noexcept {
  return __ldg(static_cast<const uint4*>(place));
}
/// The same for bytes that are read once: they don't displace what L1 holds.
[[nodiscard]] KVLEAN_DEVICE uint4 load_16_once(const void* place) noexcept {
#if defined(__CUDA_ARCH__)
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(place));
  return bits;
#else
  return load_16(place);
#endif
}
KVLEAN_DEVICE void store_16(void* place, const uint4& bits) noexcept {
  *static_cast<uint4*>(place) = bits;
}
/// For bytes that this kernel does not read again.
KVLEAN_DEVICE void store_16_once(void* place, const uint4& bits) noexcept {
  __stcs(static_cast<uint4*>(place), bits);
}

/// 16 bytes as float, elements_16<D> of them.
template <DType D>
KVLEAN_DEVICE void unpack(const uint4& bits, float* out) noexcept {
  const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (D == DType::f32) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (D == DType::f16) {
      __half2_raw raw;
      raw.x = static_cast<unsigned short>(words[i] & 0xffffu);
      raw.y = static_cast<unsigned short>(words[i] >> 16);
      const float2 pair = __half22float2(__half2(raw));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    } else {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

/// elements_16<D> floats in 16 bytes, rounded to nearest even.
template <DType D>
[[nodiscard]] KVLEAN_DEVICE uint4 pack(const float* in) noexcept {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (D == DType::f32) {
      words[i] = __float_as_uint(in[i]);
    } else if constexpr (D == DType::f16) {
      const __half2_raw raw = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
      words[i] = static_cast<u32>(raw.y) << 16 | raw.x;
    } else {
      const __nv_bfloat162_raw raw = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
      words[i] = static_cast<u32>(raw.y) << 16 | raw.x;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

/// One element as float.
template <DType D>
[[nodiscard]] KVLEAN_DEVICE float load_float(const void* row, u32 index) noexcept {
  if constexpr (D == DType::f32) {
    return static_cast<const float*>(row)[index];
  } else if constexpr (D == DType::f16) {
    return __half2float(static_cast<const __half*>(row)[index]);
  } else {
    return __uint_as_float(static_cast<u32>(static_cast<const unsigned short*>(row)[index]) << 16);
  }
}
/// One float, rounded to nearest even.
template <DType D>
KVLEAN_DEVICE void store_float(void* row, u32 index, float value) noexcept {
  if constexpr (D == DType::f32) {
    static_cast<float*>(row)[index] = value;
  } else if constexpr (D == DType::f16) {
    static_cast<__half*>(row)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(row)[index] = __float2bfloat16_rn(value);
  }
}

/// A lane's share of a row that `Lanes` neighbouring lanes hold together: chunk c of lane l is
/// elements [(c * Lanes + l) * elements_16, + elements_16), so that each load of the team is one
/// run of bytes. Width in elements; a multiple of Lanes * elements_16.
template <DType D, u32 Width, u32 Lanes>
struct RowShare {
  static constexpr u32 each = elements_16<D>;
  static constexpr u32 chunks = Width / (Lanes * each);
  static_assert(chunks * Lanes * each == Width, "the lanes must share the row evenly");
  float x[chunks * each];

  /// First element of a chunk of this lane.
  [[nodiscard]] static KVLEAN_DEVICE u32 element(u32 chunk, u32 lane) noexcept {
    return (chunk * Lanes + lane) * each;
  }
  KVLEAN_DEVICE void load(const void* row, u32 lane) noexcept {
    uint4 bits[chunks];
#pragma unroll
    for (u32 c = 0; c < chunks; ++c) {
      bits[c] = load_16_constant(static_cast<const char*>(row) + (c * Lanes + lane) * 16);
    }
#pragma unroll
    for (u32 c = 0; c < chunks; ++c) unpack<D>(bits[c], x + c * each);
  }
  KVLEAN_DEVICE void store(void* row, u32 lane) const noexcept {
#pragma unroll
    for (u32 c = 0; c < chunks; ++c) {
      store_16(static_cast<char*>(row) + (c * Lanes + lane) * 16, pack<D>(x + c * each));
    }
  }
};

/// Copies `bytes` (a multiple of 16) of a row with the lanes of a team; 4 loads in flight a lane.
template <u32 Lanes>
KVLEAN_DEVICE void copy_row_16(const char* from, char* to, u32 bytes, u32 lane) noexcept {
  for (u32 at = lane * 16; at < bytes; at += Lanes * 64) {
    uint4 bits[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (at + i * Lanes * 16 < bytes) bits[i] = load_16(from + at + i * Lanes * 16);
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (at + i * Lanes * 16 < bytes) store_16(to + at + i * Lanes * 16, bits[i]);
    }
  }
}

/// Calls function(std::integral_constant<DType, D>) for a run-time dtype.
template <class Function>
decltype(auto) with_dtype(DType dtype, Function&& function) noexcept {
  if (dtype == DType::f16) return function(std::integral_constant<DType, DType::f16>{});
  if (dtype == DType::bf16) return function(std::integral_constant<DType, DType::bf16>{});
  return function(std::integral_constant<DType, DType::f32>{});
}

/// Sum over `Lanes` neighbouring lanes of a warp, the same bits in each.
template <u32 Lanes, class T>
[[nodiscard]] KVLEAN_DEVICE T sum_lanes(T value) noexcept {
#pragma unroll
  for (u32 step = Lanes / 2; step != 0; step /= 2) {
    value += __shfl_xor_sync(full_warp, value, step);
  }
  return value;
}
template <u32 Lanes, class T>
[[nodiscard]] KVLEAN_DEVICE T max_lanes(T value) noexcept {
#pragma unroll
  for (u32 step = Lanes / 2; step != 0; step /= 2) {
    value = larger(value, __shfl_xor_sync(full_warp, value, step));
  }
  return value;
}

KVLEAN_CUDA_NAMESPACE_END
