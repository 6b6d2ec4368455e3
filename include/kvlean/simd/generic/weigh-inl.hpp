// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows, element by element.

inline void stream_row(const std::byte* from, std::byte* to, u32 bytes) noexcept {
  for (u32 at = 0; at < bytes; at += 64) stream_line(from + at, to + at);
}
/// Columns [column, column + vectors * lanes) of a weighted sum.
template <class E, class T, u32 vectors>
inline void weigh_block(const WeighedRows& rows, u32 column, bool streams, T* out) noexcept {
  const E* anchor = static_cast<const E*>(rows.anchor) + column;
  const Vector self = set1(rows.self);
  Vector sum[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 c = 0; c < vectors; ++c) sum[c] = rounded_product(self, load(anchor + c * lanes));
  for (u32 t = 0; t < rows.terms.count; ++t) {
    const E* row = reinterpret_cast<const E*>(rows.terms.row[t]) + column;
    const Vector w = set1(rows.weight[t]);
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) {
      sum[c] = add(sum[c], rounded_product(w, load(row + c * lanes)));
    }
  }
  if (streams) {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) stream(sum[c], out + column + c * lanes);
  } else {
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) store(sum[c], out + column + c * lanes);
  }
}

template <class E, class T>
inline void weigh_of(const WeighedRows& rows, u32 width, bool streams, T* out) noexcept {
  u32 column = 0;
  for (; column + weigh_vectors * lanes <= width; column += weigh_vectors * lanes) {
    weigh_block<E, T, weigh_vectors>(rows, column, streams, out);
  }
  for (; column + lanes <= width; column += lanes) {
    weigh_block<E, T, 1>(rows, column, streams, out);
  }
  if (column == width) return;
  const u32 rest = width - column;
  Vector sum =
      rounded_product(set1(rows.self), load(static_cast<const E*>(rows.anchor) + column, rest));
  for (u32 t = 0; t < rows.terms.count; ++t) {
    const E* row = reinterpret_cast<const E*>(rows.terms.row[t]) + column;
    sum = add(sum, rounded_product(set1(rows.weight[t]), load(row, rest)));
  }
  store(sum, out + column, rest);
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
inline void weigh_all_of(const WeighedRows* sums, u32 count, u32 width, RowPointers ahead,
                         bool streams, std::byte* const* out) noexcept {
  const u32 bytes = width * static_cast<u32>(sizeof(E));
  u32 fetched = 0;
  for (u32 i = 0; i < count; ++i) {
    const WeighedRows& sum = sums[i];
    for (u32 end = fetched + sum.terms.count + 1; fetched < end && fetched < ahead.count;) {
      fetch_row(ahead.row[fetched++], bytes);
    }
    if (sum.terms.count != 0 || sum.self != 1.0f) {
      weigh_of<E>(sum, width, streams, reinterpret_cast<E*>(out[i]));
    } else if (out[i] != sum.anchor) {
      if (streams) {
        stream_row(static_cast<const std::byte*>(sum.anchor), out[i], bytes);
      } else {
        std::memmove(out[i], sum.anchor, bytes);
      }
    }
  }
  for (; fetched < ahead.count; ++fetched) fetch_row(ahead.row[fetched], bytes);
}

inline void weigh_all(const WeighedRows* sums, u32 count, DType dtype, u32 width, RowPointers ahead,
                      bool streams, std::byte* const* out) noexcept {
  if (dtype == DType::f32) {
    weigh_all_of<float>(sums, count, width, ahead, streams, out);
  } else if (dtype == DType::f16) {
    weigh_all_of<f16>(sums, count, width, ahead, streams, out);
  } else {
    weigh_all_of<bf16>(sums, count, width, ahead, streams, out);
  }
}

template <class E, class T>
inline void add_parts_of(const WeighedRows& rows, u32 width, T* out) noexcept {
  const E* anchor = static_cast<const E*>(rows.anchor);
  const Vector self = set1(rows.self);
  u32 column = 0;
  for (; column + 4 * lanes <= width; column += 4 * lanes) {
    Vector sum[4];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) {
      sum[c] = rounded_product(self, load(anchor + column + c * lanes));
    }
    for (u32 t = 0; t < rows.terms.count; ++t) {
      const float* row = reinterpret_cast<const float*>(rows.terms.row[t]) + column;
      KVLEAN_SIMD_UNROLL
      for (u32 c = 0; c < 4; ++c) sum[c] = add(sum[c], load(row + c * lanes));
    }
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < 4; ++c) store(sum[c], out + column + c * lanes);
  }
  for (; column < width; column += lanes) {
    const u32 rest = width - column;
    Vector sum = rounded_product(self, load_part(anchor + column, 0, rest));
    for (u32 t = 0; t < rows.terms.count; ++t) {
      const float* row = reinterpret_cast<const float*>(rows.terms.row[t]) + column;
      sum = add(sum, load_part(row, 0, rest));
    }
    if (rest >= lanes) {
      store(sum, out + column);
    } else {
      store(sum, out + column, rest);
    }
  }
}

inline void add_parts(const WeighedRows& rows, DType dtype, u32 width, bool as_float,
                      void* out) noexcept {
  if (dtype == DType::f32) {
    add_parts_of<float>(rows, width, static_cast<float*>(out));
  } else if (dtype == DType::f16) {
    if (as_float) {
      add_parts_of<f16>(rows, width, static_cast<float*>(out));
    } else {
      add_parts_of<f16>(rows, width, static_cast<f16*>(out));
    }
  } else if (as_float) {
    add_parts_of<bf16>(rows, width, static_cast<float*>(out));
  } else {
    add_parts_of<bf16>(rows, width, static_cast<bf16*>(out));
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

inline void stream_done() noexcept { stream_end(); }
