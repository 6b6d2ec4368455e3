// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Norms, products and distances of rows. The order of additions is that of simd/row_math.hpp on
// every target.

inline constexpr u32 sum_vectors = 16 / lanes;

/// load(p, n) for n in [0, lanes], of a part of 16 elements.
template <class E>
inline Vector load_part(const E* p, u32 at, u32 count) noexcept {
  if (count >= at + lanes) return load(p + at);
  return count > at ? load(p + at, count - at) : zero();
}

/// out[r] = the sum of the lanes of sum[r], for r < used.
template <u32 rows>
inline void write_sums(const Vector (&sum)[rows][sum_vectors], u32 used, float* out) noexcept {
  if constexpr (rows == 4) {
    if (used == rows) {
      sum_16_of_4(sum, out);
      return;
    }
  }
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    if (r < used) out[r] = sum_16(sum[r]);
  }
}

enum class RowSum { squared_norm, product, squared_distance };

template <RowSum kind>
inline Vector summand(Vector from, Vector x) noexcept {
  if constexpr (kind == RowSum::squared_norm) return rounded_product(x, x);
  if constexpr (kind == RowSum::product) return rounded_product(from, x);
  const Vector difference = sub(from, x);
  return rounded_product(difference, difference);
}

/// out of up to `rows` rows. Rows past the last repeat it and are not written.
template <RowSum kind, class F, class E, u32 rows>
inline void sum_row_block(const F* from, RowPointers source, u32 first, u32 used, u32 width,
                          float* out) noexcept {
  const E* row[rows];
  for (u32 r = 0; r < rows; ++r) {
    row[r] = reinterpret_cast<const E*>(source.row[first + (r < used ? r : used - 1)]);
  }
  Vector sum[rows][sum_vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) sum[r][v] = zero();
  }
  u32 i = 0;
  for (; i + 16 <= width; i += 16) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      const Vector f = kind == RowSum::squared_norm ? zero() : load(from + i + v * lanes);
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        sum[r][v] = add(sum[r][v], summand<kind>(f, load(row[r] + i + v * lanes)));
      }
    }
  }
  if (i < width) {
    const u32 rest = width - i;
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      const Vector f = kind == RowSum::squared_norm ? zero() : load_part(from + i, v * lanes, rest);
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        sum[r][v] = add(sum[r][v], summand<kind>(f, load_part(row[r] + i, v * lanes, rest)));
      }
    }
  }
  write_sums<rows>(sum, used, out);
}

template <RowSum kind, class F, class E>
inline void sum_rows_of(const F* from, RowPointers rows, u32 width, float* out) noexcept {
  u32 t = 0;
  for (; t + 1 < rows.count; t += neighbour_rows) {
    const u32 left = rows.count - t;
    sum_row_block<kind, F, E, neighbour_rows>(
        from, rows, t, left < neighbour_rows ? left : neighbour_rows, width, out + t);
  }
  if (t < rows.count) sum_row_block<kind, F, E, 1>(from, rows, t, 1, width, out + t);
}

inline void squared_norms(RowPointers rows, DType dtype, u32 width, float* out) noexcept {
  const float* none = nullptr;
  if (dtype == DType::f32) {
    sum_rows_of<RowSum::squared_norm, float, float>(none, rows, width, out);
  } else if (dtype == DType::f16) {
    sum_rows_of<RowSum::squared_norm, float, f16>(none, rows, width, out);
  } else {
    sum_rows_of<RowSum::squared_norm, float, bf16>(none, rows, width, out);
  }
}

inline void products(const float* from, RowPointers rows, DType dtype, u32 width,
                     float* out) noexcept {
  if (dtype == DType::f32) {
    sum_rows_of<RowSum::product, float, float>(from, rows, width, out);
  } else if (dtype == DType::f16) {
    sum_rows_of<RowSum::product, float, f16>(from, rows, width, out);
  } else {
    sum_rows_of<RowSum::product, float, bf16>(from, rows, width, out);
  }
}

inline void squared_distances(const void* from, RowPointers rows, DType dtype, u32 width,
                              float* out) noexcept {
  constexpr RowSum kind = RowSum::squared_distance;
  if (dtype == DType::f32) {
    sum_rows_of<kind, float, float>(static_cast<const float*>(from), rows, width, out);
  } else if (dtype == DType::f16) {
    sum_rows_of<kind, f16, f16>(static_cast<const f16*>(from), rows, width, out);
  } else {
    sum_rows_of<kind, bf16, bf16>(static_cast<const bf16*>(from), rows, width, out);
  }
}

inline void fetch_row(const std::byte* row, u32 bytes) noexcept {
  u32 at = 0;
  for (; at + 256 <= bytes; at += 256) {  // mostly once
    KVLEAN_SIMD_UNROLL
    for (u32 line = 0; line < 256; line += 64) __builtin_prefetch(row + at + line);
  }
  for (; at < bytes; at += 64) __builtin_prefetch(row + at);
}

template <class E, u32 rows>
KVLEAN_SIMD_INLINE void pair_block(RowPointers from, RowPointers to, u32 first, u32 used, u32 width,
                                   float* out) noexcept {
  const E* a[rows];
  const E* b[rows];
  for (u32 r = 0; r < rows; ++r) {
    const u32 t = first + (r < used ? r : used - 1);
    a[r] = reinterpret_cast<const E*>(from.row[t]);
    b[r] = reinterpret_cast<const E*>(to.row[t]);
  }
  Vector sum[rows][sum_vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) sum[r][v] = zero();
  }
  u32 i = 0;
  for (; i + 16 <= width; i += 16) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector difference = sub(load(a[r] + i + v * lanes), load(b[r] + i + v * lanes));
        sum[r][v] = add(sum[r][v], rounded_product(difference, difference));
      }
    }
  }
  if (i < width) {
    const u32 rest = width - i;
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector difference =
            sub(load_part(a[r] + i, v * lanes, rest), load_part(b[r] + i, v * lanes, rest));
        sum[r][v] = add(sum[r][v], rounded_product(difference, difference));
      }
    }
  }
  write_sums<rows>(sum, used, out);
}

template <class E>
inline void pair_distances_of(RowPointers from, RowPointers rows, u32 width, RowPointers ahead,
                              float* out) noexcept {
  const u32 bytes = width * static_cast<u32>(sizeof(E));
  const u32 blocks = (rows.count + neighbour_rows - 1) / neighbour_rows;
  const u32 step = blocks != 0 ? (ahead.count + blocks - 1) / blocks : 0;
  u32 fetched = 0;
  for (u32 t = 0; t < rows.count; t += neighbour_rows) {
    for (u32 i = 0; i < step && fetched < ahead.count; ++i) fetch_row(ahead.row[fetched++], bytes);
    const u32 left = rows.count - t;
    if (left >= neighbour_rows) {
      pair_block<E, neighbour_rows>(from, rows, t, neighbour_rows, width, out + t);
    } else {
      pair_block<E, neighbour_rows>(from, rows, t, left, width, out + t);
    }
  }
  for (; fetched < ahead.count; ++fetched) fetch_row(ahead.row[fetched], bytes);
}

inline void pair_distances(RowPointers from, RowPointers rows, DType dtype, u32 width,
                           RowPointers ahead, float* out) noexcept {
  if (dtype == DType::f32) {
    pair_distances_of<float>(from, rows, width, ahead, out);
  } else if (dtype == DType::f16) {
    pair_distances_of<f16>(from, rows, width, ahead, out);
  } else {
    pair_distances_of<bf16>(from, rows, width, ahead, out);
  }
}

/// Squared norms of up to `rows` neighbouring rows and the products of each with the one before.
template <class E, u32 rows>
KVLEAN_SIMD_INLINE void neighbour_block(const E* const* row, u32 used, u32 width, float* squared,
                                        float* product) noexcept {
  Vector norm[rows][sum_vectors];
  Vector cross[rows][sum_vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) norm[r][v] = cross[r][v] = zero();
  }
  u32 i = 0;
  for (; i + 16 <= width; i += 16) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      Vector before = load(row[0] + i + v * lanes);
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector x = load(row[r + 1] + i + v * lanes);
        norm[r][v] = add(norm[r][v], rounded_product(x, x));
        cross[r][v] = add(cross[r][v], rounded_product(before, x));
        before = x;
      }
    }
  }
  if (i < width) {
    const u32 rest = width - i;
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < sum_vectors; ++v) {
      Vector before = load_part(row[0] + i, v * lanes, rest);
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector x = load_part(row[r + 1] + i, v * lanes, rest);
        norm[r][v] = add(norm[r][v], rounded_product(x, x));
        cross[r][v] = add(cross[r][v], rounded_product(before, x));
        before = x;
      }
    }
  }
  write_sums<rows>(norm, used, squared);
  write_sums<rows>(cross, used, product);
}

/// The same for whole tiles of rows of `vectors` vectors of 16 lanes: each row is widened once.
template <class E, u32 vectors>
inline void neighbours_held(const E* previous, RowPointers rows, RowPointers ahead, float* squared,
                            float* product) noexcept {
  constexpr u32 bytes = vectors * lanes * sizeof(E);
  Vector before[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 v = 0; v < vectors; ++v) before[v] = load(previous + v * lanes);
  const u32 step = (ahead.count + rows.count - 1) / rows.count;
  u32 fetched = 0;
  for (u32 t = 0; t < rows.count; t += neighbour_rows) {
    const u32 used = rows.count - t < neighbour_rows ? rows.count - t : neighbour_rows;
    Vector norm[neighbour_rows][sum_vectors];
    Vector cross[neighbour_rows][sum_vectors];
    KVLEAN_SIMD_UNROLL
    for (u32 r = 0; r < neighbour_rows; ++r) {
      const E* row = reinterpret_cast<const E*>(rows.row[t + (r < used ? r : used - 1)]);
      Vector own = zero();
      Vector both = zero();
      KVLEAN_SIMD_UNROLL
      for (u32 v = 0; v < vectors; ++v) {
        const Vector x = load(row + v * lanes);
        own = add(own, rounded_product(x, x));
        both = add(both, rounded_product(before[v], x));
        before[v] = x;
      }
      norm[r][0] = own;
      cross[r][0] = both;
      for (u32 i = 0; i < step && fetched < ahead.count; ++i) {
        fetch_row(ahead.row[fetched++], bytes);
      }
    }
    write_sums<neighbour_rows>(norm, used, squared + t);
    write_sums<neighbour_rows>(cross, used, product + t);
  }
}

template <class E>
inline void neighbours_of(const void* previous, RowPointers rows, u32 width, RowPointers ahead,
                          float* squared, float* product) noexcept {
  const E* before = static_cast<const E*>(previous != nullptr ? previous : rows.row[0]);
  if constexpr (held_vectors != 0) {
    if (width == held_vectors * lanes) {
      neighbours_held<E, held_vectors>(before, rows, ahead, squared, product);
      return;
    }
  }
  const u32 bytes = width * static_cast<u32>(sizeof(E));
  const u32 step = (ahead.count + rows.count - 1) / rows.count * neighbour_rows;
  u32 fetched = 0;
  for (u32 t = 0; t < rows.count; t += neighbour_rows) {
    for (u32 i = 0; i < step && fetched < ahead.count; ++i) fetch_row(ahead.row[fetched++], bytes);
    const u32 left = rows.count - t;
    const E* row[neighbour_rows + 1];
    row[0] = before;
    if (left >= neighbour_rows) {
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < neighbour_rows; ++r) {
        row[r + 1] = reinterpret_cast<const E*>(rows.row[t + r]);
      }
      neighbour_block<E, neighbour_rows>(row, neighbour_rows, width, squared + t, product + t);
    } else {
      for (u32 r = 0; r < neighbour_rows; ++r) {
        row[r + 1] = reinterpret_cast<const E*>(rows.row[t + (r < left ? r : left - 1)]);
      }
      neighbour_block<E, neighbour_rows>(row, left, width, squared + t, product + t);
    }
    before = row[neighbour_rows];
  }
}

inline void neighbours(const void* previous, RowPointers rows, DType dtype, u32 width,
                       RowPointers ahead, float* squared, float* product) noexcept {
  if (rows.count == 0) return;
  if (dtype == DType::f32) {
    neighbours_of<float>(previous, rows, width, ahead, squared, product);
  } else if (dtype == DType::f16) {
    neighbours_of<f16>(previous, rows, width, ahead, squared, product);
  } else {
    neighbours_of<bf16>(previous, rows, width, ahead, squared, product);
  }
}
