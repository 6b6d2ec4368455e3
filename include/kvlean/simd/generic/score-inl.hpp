// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Query rows times key rows.

/// What is left of rows to be fetched. Pairs of rows, one of each half, from a quarter of the
/// halves after the other; what does not fill quarters is left to the CPU.
struct Fetch {
  const std::byte* const* next = nullptr;
  const std::byte* const* end = nullptr;  ///< of the first half
  std::size_t half = 0;
  std::size_t quarter = 0;
  std::size_t pairs = 0;  ///< left to fetch
  u32 bytes = 0;

  explicit Fetch(const RowsAhead& ahead) noexcept {
    half = ahead.rows.count / 2;
    quarter = half / 4;
    const std::size_t done = ahead.begin / 2;
    if (done >= 4 * quarter) return;
    next = ahead.rows.row + done % 4 * quarter + done / 4;
    end = ahead.rows.row + 4 * quarter;
    pairs = 4 * quarter - done;
    bytes = ahead.bytes;
  }
};

/// Fetches a pair of rows, a line of each in turn, into the second cache level: the first has fewer
/// places for lines that are under way.
/// Always inlined: to g++ a call that only prefetches does nothing, and is dropped.
__attribute__((always_inline)) inline void fetch_pair(Fetch& fetch) noexcept {
  if (fetch.pairs == 0) return;
  --fetch.pairs;
  const std::byte* a = fetch.next[0];
  const std::byte* b = fetch.next[fetch.half];
  fetch.next += fetch.quarter;
  if (fetch.next >= fetch.end) fetch.next -= 4 * fetch.quarter - 1;
  for (const std::byte* const end = a + fetch.bytes; a < end; a += 64, b += 64) {
    __builtin_prefetch(a, 0, 2);
    __builtin_prefetch(b, 0, 2);
  }
}

/// out[r * stride + j] = the sum of the lanes of sum[r][j].
template <u32 rows>
inline void add_lanes(const Vector (*sum)[4], float* out, u64 stride) noexcept {
  if constexpr (rows == 4) {
    sum4x4(sum, out, stride);
  } else {
    KVLEAN_SIMD_UNROLL
    for (u32 r = 0; r < rows; ++r) {
      sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], out + r * stride);
    }
  }
}

/// Up to `rows` query rows with all keys, four keys at a time. Rows past the last repeat it and are
/// not written: fewer variants to compile, and the time goes to reading keys.
template <class E, u32 rows>
inline void score_row_block(ConstFloatRows queries, u32 used_rows, RowPointers keys, u32 width,
                            RowsAhead ahead, FloatRows out) noexcept {
  const float* query[rows];
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    query[r] = queries.data + (r < used_rows ? r : used_rows - 1) * queries.stride;
  }
  const u32 whole = width / lanes * lanes;
  const u32 rest = width - whole;
  const u32 middle = whole / (2 * lanes) * lanes;
  Fetch fetch(ahead);
  for (u32 t = 0; t < keys.count; t += 4) {
    const u32 here = keys.count - t < 4 ? keys.count - t : 4;
    // Past the last key the first is read again, and not written.
    const E* key0 = reinterpret_cast<const E*>(keys.row[t]);
    const E* key1 = reinterpret_cast<const E*>(keys.row[t + (here > 1 ? 1 : 0)]);
    const E* key2 = reinterpret_cast<const E*>(keys.row[t + (here > 2 ? 2 : 0)]);
    const E* key3 = reinterpret_cast<const E*>(keys.row[t + (here > 3 ? 3 : 0)]);
    Vector sum[rows][4];
    KVLEAN_SIMD_UNROLL
    for (u32 r = 0; r < rows; ++r) {
      KVLEAN_SIMD_UNROLL
      for (u32 j = 0; j < 4; ++j) sum[r][j] = zero();
    }
    fetch_pair(fetch);
    for (u32 i = 0; i < whole; i += lanes) {
      if (i == middle) fetch_pair(fetch);
      const Vector k[4] = {load(key0 + i), load(key1 + i), load(key2 + i), load(key3 + i)};
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector q = load(query[r] + i);
        KVLEAN_SIMD_UNROLL
        for (u32 j = 0; j < 4; ++j) sum[r][j] = fma(q, k[j], sum[r][j]);
      }
    }
    if (rest != 0) {
      const Vector k[4] = {load(key0 + whole, rest), load(key1 + whole, rest),
                           load(key2 + whole, rest), load(key3 + whole, rest)};
      KVLEAN_SIMD_UNROLL
      for (u32 r = 0; r < rows; ++r) {
        const Vector q = load(query[r] + whole, rest);
        KVLEAN_SIMD_UNROLL
        for (u32 j = 0; j < 4; ++j) sum[r][j] = fma(q, k[j], sum[r][j]);
      }
    }
    float* to = out.data + t;
    if (here == 4 && used_rows == rows) {
      add_lanes<rows>(sum, to, out.stride);
      continue;
    }
    float product[rows * 4];
    add_lanes<rows>(sum, product, 4);
    for (u32 r = 0; r < used_rows; ++r) {
      for (u32 j = 0; j < here; ++j) to[r * out.stride + j] = product[r * 4 + j];
    }
  }
}

template <class E>
inline void score_few_of(ConstFloatRows queries, u32 rows, RowPointers keys, u32 width,
                         RowsAhead ahead, FloatRows out) noexcept {
  if (ahead.bytes == 0) ahead.bytes = width * static_cast<u32>(sizeof(E));
  while (rows != 0) {
    const u32 step = rows < score_rows ? rows : score_rows;
    if (step == 1) {
      score_row_block<E, 1>(queries, 1, keys, width, ahead, out);
    } else {
      score_row_block<E, score_rows>(queries, step, keys, width, ahead, out);
    }
    ahead = {};
    queries.data += step * queries.stride;
    out.data += step * out.stride;
    rows -= step;
  }
}

inline void score_few(ConstFloatRows queries, u32 rows, RowPointers keys, DType dtype, u32 width,
                      RowsAhead ahead, FloatRows out) noexcept {
  if (dtype == DType::f32) {
    score_few_of<float>(queries, rows, keys, width, ahead, out);
  } else if (dtype == DType::f16) {
    score_few_of<f16>(queries, rows, keys, width, ahead, out);
  } else {
    score_few_of<bf16>(queries, rows, keys, width, ahead, out);
  }
}

/// products [key][lane] of `keys` keys with vectors * lanes query rows, one row a lane.
template <u32 vectors, u32 keys>
inline void score_key_block(const float* queries, u64 query_stride, const float* key,
                            u64 key_stride, u32 width, float* products) noexcept {
  Vector sum[keys][vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < keys; ++j) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) sum[j][v] = zero();
  }
  for (u32 d = 0; d < width; ++d) {
    Vector q[vectors];
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) q[v] = load(queries + d * query_stride + v * lanes);
    KVLEAN_SIMD_UNROLL
    for (u32 j = 0; j < keys; ++j) {
      const Vector k = set1(key[j * key_stride + d]);
      KVLEAN_SIMD_UNROLL
      for (u32 v = 0; v < vectors; ++v) sum[j][v] = fma(q[v], k, sum[j][v]);
    }
  }
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < keys; ++j) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) store(sum[j][v], products + (j * vectors + v) * lanes);
  }
}

/// Up to vectors * lanes query rows with all keys.
template <u32 vectors>
inline void score_lanes(const float* queries, u64 query_stride, u32 rows, ConstFloatRows keys,
                        u32 tokens, u32 width, FloatRows out) noexcept {
  constexpr u32 columns = vectors * lanes;
  constexpr u32 step = lanes > block_keys ? lanes : block_keys;  // keys between two transpositions
  float products[step * columns];
  for (u32 t = 0; t < tokens; t += step) {
    const u32 here = tokens - t < step ? tokens - t : step;
    u32 j = 0;
    for (; j + block_keys <= here; j += block_keys) {
      score_key_block<vectors, block_keys>(queries, query_stride, keys.data + (t + j) * keys.stride,
                                           keys.stride, width, products + j * columns);
    }
    for (; j < here; ++j) {
      score_key_block<vectors, 1>(queries, query_stride, keys.data + (t + j) * keys.stride,
                                  keys.stride, width, products + j * columns);
    }
    u32 r = 0;
    if (here == step) {
      for (; r + lanes <= rows; r += lanes) {
        for (u32 from = 0; from < step; from += lanes) {
          transpose(products + from * columns + r, columns, out.data + r * out.stride + t + from,
                    out.stride);
        }
      }
    }
    for (; r < rows; ++r) {
      float* to = out.data + r * out.stride + t;
      for (u32 i = 0; i < here; ++i) to[i] = products[i * columns + r];
    }
  }
}

inline void score_many(ConstFloatRows queries, u32 rows, ConstFloatRows keys, u32 tokens, u32 width,
                       FloatRows out) noexcept {
  constexpr u32 columns = block_vectors * lanes;
  static_assert(columns == query_block || columns == 2 * query_block || columns < query_block);
  u32 first = 0;
  while (first < rows) {
    const u32 left = rows - first;
    const float* q = queries.data + first;
    const FloatRows to{out.data + first * out.stride, out.stride};
    if (columns > query_block && left <= query_block) {
      score_lanes<(block_vectors + 1) / 2>(q, queries.stride, left, keys, tokens, width, to);
      return;
    }
    score_lanes<block_vectors>(q, queries.stride, left < columns ? left : columns, keys, tokens,
                               width, to);
    first += columns;
  }
}
