// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Rows between storage types and float.

template <class E>
inline void load_elements(const E* from, float* to, u32 count) noexcept {
  u32 i = 0;
  for (; i + lanes <= count; i += lanes) store(load(from + i), to + i);
  if (i < count) store(load(from + i, count - i), to + i, count - i);
}

template <class E>
inline void store_elements(const float* from, E* to, u32 count) noexcept {
  u32 i = 0;
  for (; i + lanes <= count; i += lanes) store(load(from + i), to + i);
  if (i < count) store(load(from + i, count - i), to + i, count - i);
}

inline void load_row(const void* from, DType dtype, float* to, u32 count) noexcept {
  if (dtype == DType::f32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == DType::f16) {
    load_elements(static_cast<const f16*>(from), to, count);
  } else {
    load_elements(static_cast<const bf16*>(from), to, count);
  }
}

inline void store_row(const float* from, void* to, DType dtype, u32 count) noexcept {
  if (dtype == DType::f32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == DType::f16) {
    store_elements(from, static_cast<f16*>(to), count);
  } else {
    store_elements(from, static_cast<bf16*>(to), count);
  }
}

[[nodiscard]] constexpr RowKernels row_kernels_here() noexcept { return {load_row, store_row}; }
