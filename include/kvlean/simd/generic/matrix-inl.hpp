// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Column sums of attention: lanes hold query rows.

/// Products of `keys` keys with vectors * lanes query rows.
template <u32 vectors, u32 keys>
inline void lane_products(const float* queries, u64 row_lanes, const float* key, u64 key_stride,
                          u32 width, const StridedAhead& ahead, float* x) noexcept {
  constexpr u32 part = 16;  // elements between two prefetches of a row
  Vector sum[keys][vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < keys; ++j) {
    __builtin_prefetch(x + j * row_lanes, 1);
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) sum[j][v] = zero();
  }
  for (u32 from = 0; from < width; from += part) {
    const u32 to = width - from < part ? width : from + part;
    if (from * 4 < ahead.bytes) {
      for (u32 j = 0; j < ahead.rows; ++j) {
        __builtin_prefetch(ahead.first + j * ahead.stride + from * 4);
      }
    }
    for (u32 d = from; d < to; ++d) {
      Vector q[vectors];
      KVLEAN_SIMD_UNROLL
      for (u32 v = 0; v < vectors; ++v) q[v] = load(queries + d * row_lanes + v * lanes);
      KVLEAN_SIMD_UNROLL
      for (u32 j = 0; j < keys; ++j) {
        const Vector k = set1(key[j * key_stride + d]);
        KVLEAN_SIMD_UNROLL
        for (u32 v = 0; v < vectors; ++v) sum[j][v] = fma(q[v], k, sum[j][v]);
      }
    }
  }
  KVLEAN_SIMD_UNROLL
  for (u32 j = 0; j < keys; ++j) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) store(sum[j][v], x + j * row_lanes + v * lanes);
  }
}

template <u32 vectors>
inline void products_of(ConstFloatRows queries, ConstFloatRows keys, u32 tokens, u32 width,
                        StridedAhead ahead, float* x) noexcept {
  for (u32 first = 0; first < queries.stride; first += vectors * lanes) {
    const float* q = queries.data + first;
    u32 t = 0;
    for (; t + block_keys <= tokens; t += block_keys) {
      StridedAhead some = ahead;
      some.first += t * ahead.stride;
      some.rows = t >= ahead.rows ? 0 : (ahead.rows - t < block_keys ? ahead.rows - t : block_keys);
      lane_products<vectors, block_keys>(q, queries.stride, keys.data + t * keys.stride,
                                         keys.stride, width, some, x + t * queries.stride + first);
    }
    for (; t < tokens; ++t) {
      lane_products<vectors, 1>(q, queries.stride, keys.data + t * keys.stride, keys.stride, width,
                                {}, x + t * queries.stride + first);
    }
    ahead = {};
  }
}

inline void matrix_products(ConstFloatRows queries, ConstFloatRows keys, u32 tokens, u32 width,
                            StridedAhead ahead, float* x) noexcept {
  constexpr u32 columns = block_vectors * lanes;
  static_assert(lane_rows % columns == 0);
  if (columns > 16 && queries.stride == 16) {
    products_of<(block_vectors + 1) / 2>(queries, keys, tokens, width, ahead, x);
  } else {
    products_of<block_vectors>(queries, keys, tokens, width, ahead, x);
  }
}

/// y - shift of one vector of rows; `token` is the token's number in every lane.
template <bool general>
inline Vector lane_exponent(const float* x, u32 lane, u32 t, const LaneLogits& logits,
                            Vector minus_shift) noexcept {
  if (!general) return fma(load(x), set1(logits.factor), minus_shift);
  Vector y = mul(load(x), set1(logits.factor));
  if (logits.cap > 0.0f) y = mul(set1(logits.cap), hyperbolic_tangent(y));
  if (logits.log_mass != nullptr) y = add(y, set1(1.44269504f * logits.log_mass[t]));
  y = add(y, minus_shift);
  if (logits.begin == nullptr) return y;
  const Vector unseen = set1(-std::numeric_limits<float>::infinity());
  const Vector token = set1(static_cast<float>(t));
  y = select_less(token, load(logits.begin + lane), unseen, y);
  return select_less(token, load(logits.end + lane), y, unseen);
}

template <bool general>
inline void lane_maxima_of(const float* x, u32 tokens, u32 row_lanes, const LaneLogits& logits,
                           float* largest) noexcept {
  for (u32 lane = 0; lane < row_lanes; lane += lanes) {
    Vector most = load(largest + lane);
    for (u32 t = 0; t < tokens; ++t) {
      most = max(lane_exponent<general>(x + t * row_lanes + lane, lane, t, logits, zero()), most);
    }
    store(most, largest + lane);
  }
}

inline void lane_maxima(const float* x, u32 tokens, u32 row_lanes, const LaneLogits& logits,
                        float* largest) noexcept {
  if (logits.plain()) {
    lane_maxima_of<false>(x, tokens, row_lanes, logits, largest);
  } else {
    lane_maxima_of<true>(x, tokens, row_lanes, logits, largest);
  }
}

template <bool general>
inline void lane_powers_of(float* x, u32 tokens, u32 row_lanes, const LaneLogits& logits,
                           float* sums) noexcept {
  for (u32 lane = 0; lane < row_lanes; lane += lanes) {
    const Vector shift = load(logits.minus_shift + lane);
    Vector even = zero();
    Vector odd = zero();
    u32 t = 0;
    for (; t + 2 <= tokens; t += 2) {
      float* at = x + t * row_lanes + lane;
      const Vector a = exponential2(lane_exponent<general>(at, lane, t, logits, shift));
      const Vector b =
          exponential2(lane_exponent<general>(at + row_lanes, lane, t + 1, logits, shift));
      store(a, at);
      store(b, at + row_lanes);
      even = add(even, a);
      odd = add(odd, b);
    }
    if (t < tokens) {
      float* at = x + t * row_lanes + lane;
      const Vector a = exponential2(lane_exponent<general>(at, lane, t, logits, shift));
      store(a, at);
      even = add(even, a);
    }
    store(add(load(sums + lane), add(even, odd)), sums + lane);
  }
}

inline void lane_powers(float* x, u32 tokens, u32 row_lanes, const LaneLogits& logits,
                        float* sums) noexcept {
  if (logits.plain()) {
    lane_powers_of<false>(x, tokens, row_lanes, logits, sums);
  } else {
    lane_powers_of<true>(x, tokens, row_lanes, logits, sums);
  }
}

/// The weighted sum of a token's lanes, one for each lane of a vector.
inline Vector weigh_lanes(const float* x, u32 row_lanes, const float* weights) noexcept {
  Vector sum = zero();
  for (u32 lane = 0; lane < row_lanes; lane += lanes) {
    const Vector w = load(weights + lane);
    sum = select_less(zero(), w, fma(load(x + lane), w, sum), sum);
  }
  return sum;
}

inline void lane_columns(const float* x, u32 tokens, u32 row_lanes, const float* weights,
                         float* out) noexcept {
  u32 t = 0;
  for (; t + 4 <= tokens; t += 4, x += 4 * row_lanes) {
    float sum[4];
    sum4(weigh_lanes(x, row_lanes, weights), weigh_lanes(x + row_lanes, row_lanes, weights),
         weigh_lanes(x + 2 * row_lanes, row_lanes, weights),
         weigh_lanes(x + 3 * row_lanes, row_lanes, weights), sum);
    for (u32 j = 0; j < 4; ++j) out[t + j] += sum[j];
  }
  for (; t < tokens; ++t, x += row_lanes) {
    float sum[4];
    sum4(weigh_lanes(x, row_lanes, weights), zero(), zero(), zero(), sum);
    out[t] += sum[0];
  }
}

[[nodiscard]] constexpr MatrixKernels matrix_kernels_here() noexcept {
  return {matrix_products, lane_maxima, lane_powers, lane_columns};
}
