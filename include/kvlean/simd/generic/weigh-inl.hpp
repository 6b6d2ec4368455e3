// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows, element by element.

inline void stream_row(const std::byte* from, std::byte* to, u32 bytes) noexcept {
  for (u32 at = 0; at < bytes; at += 64) stream_line(from + at, to + at);
}
/// `vectors` vectors of a weighted sum, `offset` bytes into the rows, which are of E; `out` is
/// there already. A constant number of terms, or `any_terms`: `terms` of them.
inline constexpr u32 any_terms = ~0u;
template <class E, u32 vectors, u32 fixed_terms, class T>
KVLEAN_SIMD_INLINE void weigh_block(const void* anchor, Vector self, const std::byte* const* row,
                                    const float* weight, u32 terms, std::size_t offset,
                                    bool streams, T* out) noexcept {
  const E* first = reinterpret_cast<const E*>(static_cast<const std::byte*>(anchor) + offset);
  Vector sum[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 c = 0; c < vectors; ++c) sum[c] = rounded_product(self, load(first + c * lanes));
  const u32 count = fixed_terms == any_terms ? terms : fixed_terms;
  for (u32 t = 0; t < count; ++t) {
    const E* x = reinterpret_cast<const E*>(row[t] + offset);
    const Vector w = set1(weight[t]);
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) {
      sum[c] = add(sum[c], rounded_product(w, load(x + c * lanes)));
    }
  }
  if (streams) {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) stream(sum[c], out + c * lanes);
  } else {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) store(sum[c], out + c * lanes);
  }
}

template <class E, u32 fixed_terms, class T>
KVLEAN_SIMD_INLINE void weigh_row(const void* anchor, float self_weight,
                                  const std::byte* const* row, const float* weight, u32 terms,
                                  std::size_t width, bool streams, T* out) noexcept {
  const Vector self = set1(self_weight);
  std::size_t column = 0;
  for (; column + weigh_vectors * lanes <= width; column += weigh_vectors * lanes) {
    weigh_block<E, weigh_vectors, fixed_terms>(anchor, self, row, weight, terms, column * sizeof(E),
                                               streams, out + column);
  }
  for (; column + lanes <= width; column += lanes) {
    weigh_block<E, 1, fixed_terms>(anchor, self, row, weight, terms, column * sizeof(E), streams,
                                   out + column);
  }
  if (column == width) return;
  const u32 rest = static_cast<u32>(width - column);
  Vector sum = rounded_product(self, load(static_cast<const E*>(anchor) + column, rest));
  for (u32 t = 0; t < terms; ++t) {
    const E* x = reinterpret_cast<const E*>(row[t]) + column;
    sum = add(sum, rounded_product(set1(weight[t]), load(x, rest)));
  }
  store(sum, out + column, rest);
}

template <class E, class T>
inline void weigh_of(const WeighedRows& rows, u32 width, bool streams, T* out) noexcept {
  weigh_row<E, any_terms>(rows.anchor, rows.self, rows.terms.row, rows.weight, rows.terms.count,
                          width, streams, out);
}

inline void weigh(const WeighedRows& rows, DType dtype, u32 width, bool as_float, bool streams,
                  void* out) noexcept {
  if (dtype == DType::f32) {
    weigh_of<float>(rows, width, streams, static_cast<float*>(out));
  } else if (dtype == DType::f16) {
    if (as_float) {
      weigh_of<f16>(rows, width, streams, static_cast<float*>(out));
    } else {
      weigh_of<f16>(rows, width, streams, static_cast<f16*>(out));
    }
  } else if (as_float) {
    weigh_of<bf16>(rows, width, streams, static_cast<float*>(out));
  } else {
    weigh_of<bf16>(rows, width, streams, static_cast<bf16*>(out));
  }
}

template <class E>
inline void add_weighed_of(RowPointers rows, const float* weight, u32 width, float* out) noexcept {
  u32 column = 0;
  for (; column + 4 * lanes <= width; column += 4 * lanes) {
    Vector sum[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) sum[c] = load(out + column + c * lanes);
    for (u32 t = 0; t < rows.count; ++t) {
      const E* row = reinterpret_cast<const E*>(rows.row[t]) + column;
      const Vector w = set1(weight[t]);
      KVLEAN_SIMD_UNROLL
      for (u32 c = 0; c < 4; ++c) {
        sum[c] = add(sum[c], rounded_product(w, load(row + c * lanes)));
      }
    }
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(sum[c], out + column + c * lanes);
  }
  for (; column < width; column += lanes) {
    const u32 rest = width - column;
    Vector sum = load_part(out + column, 0, rest);
    for (u32 t = 0; t < rows.count; ++t) {
      const E* row = reinterpret_cast<const E*>(rows.row[t]) + column;
      sum = add(sum, rounded_product(set1(weight[t]), load_part(row, 0, rest)));
    }
    if (rest >= lanes) {
      store(sum, out + column);
    } else {
      store(sum, out + column, rest);
    }
  }
}

inline void add_weighed(RowPointers rows, const float* weight, DType dtype, u32 width,
                        float* sum) noexcept {
  if (dtype == DType::f32) {
    add_weighed_of<float>(rows, weight, width, sum);
  } else if (dtype == DType::f16) {
    add_weighed_of<f16>(rows, weight, width, sum);
  } else {
    add_weighed_of<bf16>(rows, weight, width, sum);
  }
}

inline void add_scaled(float* y, const float* x, float factor, u32 count) noexcept {
  const Vector f = set1(factor);
  u32 i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(add(load(y + i), rounded_product(f, load(x + i))), y + i);
  }
  if (i == count) return;
  const u32 rest = count - i;
  store(add(load(y + i, rest), rounded_product(f, load(x + i, rest))), y + i, rest);
}
