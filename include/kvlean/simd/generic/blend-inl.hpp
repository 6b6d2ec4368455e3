// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Weighted sums of value rows.

/// sum[r][column, column + vectors * lanes) += weight[r][t] value_t for all t. Rows past the last
/// repeat it and are not written.
template <class E, u32 rows, u32 vectors>
inline void blend_block(ConstFloatRows weight, u32 used_rows, RowPointers values, u32 column,
                        Fetch& ahead, u32 every, FloatRows out) noexcept {
  Fetch fetch = ahead;  // in registers
  const float* weights[rows];
  Vector sum[rows][vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    const u32 row = r < used_rows ? r : used_rows - 1;
    weights[r] = weight.data + row * weight.stride;
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) {
      sum[r][c] = load(out.data + row * out.stride + column + c * lanes);
    }
  }
  const auto add_value = [&](u32 t) noexcept {
    const E* value = reinterpret_cast<const E*>(values.row[t]) + column;
    Vector v[vectors];
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) v[c] = load(value + c * lanes);
    KVLEAN_SIMD_UNROLL
    for (u32 r = 0; r < rows; ++r) {
      const Vector w = set1(weights[r][t]);
      KVLEAN_SIMD_UNROLL
      for (u32 c = 0; c < vectors; ++c) sum[r][c] = fma(w, v[c], sum[r][c]);
    }
  };
  u32 wait = 1;
  u32 t = 0;
  for (; t + 4 <= values.count; t += 4) {
    if (--wait == 0) {
      fetch_pair(fetch);
      if (every == 0) fetch_pair(fetch);
      wait = every == 0 ? 1 : every;
    }
    KVLEAN_SIMD_UNROLL
    for (u32 i = 0; i < 4; ++i) add_value(t + i);
  }
  for (; t < values.count; ++t) add_value(t);
  ahead = fetch;
  KVLEAN_SIMD_UNROLL
  for (u32 r = 0; r < rows; ++r) {
    if (r >= used_rows) break;
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) {
      store(sum[r][c], out.data + r * out.stride + column + c * lanes);
    }
  }
}

/// The last columns, less than a vector.
template <class E>
inline void blend_rest(ConstFloatRows weight, u32 rows, RowPointers values, u32 column, u32 rest,
                       FloatRows out) noexcept {
  for (u32 r = 0; r < rows; ++r) {
    float* to = out.data + r * out.stride + column;
    const float* w = weight.data + r * weight.stride;
    Vector sum = load(to, rest);
    for (u32 t = 0; t < values.count; ++t) {
      sum = fma(set1(w[t]), load(reinterpret_cast<const E*>(values.row[t]) + column, rest), sum);
    }
    store(sum, to, rest);
  }
}

template <class E, u32 rows>
inline void blend_rows_of(ConstFloatRows weight, u32 used_rows, RowPointers values, u32 width,
                          RowsAhead ahead, FloatRows sum) noexcept {
  constexpr u32 step = blend_width * lanes;
  u32 column = 0;
  // Two pairs of rows ahead for four values, spread over the passes.
  const u32 passes = width / step + width % step / lanes;
  const u32 every = passes / 2;
  Fetch fetch(ahead);
  for (; column + step <= width; column += step) {
    blend_block<E, rows, blend_width>(weight, used_rows, values, column, fetch, every, sum);
  }
  for (; column + lanes <= width; column += lanes) {
    blend_block<E, rows, 1>(weight, used_rows, values, column, fetch, every, sum);
  }
  if (column < width) blend_rest<E>(weight, used_rows, values, column, width - column, sum);
}

template <class E>
inline void blend_of(ConstFloatRows weight, u32 rows, RowPointers values, u32 width,
                     RowsAhead ahead, FloatRows sum) noexcept {
  if (ahead.bytes == 0) ahead.bytes = width * static_cast<u32>(sizeof(E));
  while (rows != 0) {
    const u32 step = rows < blend_rows ? rows : blend_rows;
    if (step == 1) {
      blend_rows_of<E, 1>(weight, 1, values, width, ahead, sum);
    } else {
      blend_rows_of<E, blend_rows>(weight, step, values, width, ahead, sum);
    }
    ahead = {};
    weight.data += step * weight.stride;
    sum.data += step * sum.stride;
    rows -= step;
  }
}

inline void blend(ConstFloatRows weight, u32 rows, RowPointers values, DType dtype, u32 width,
                  RowsAhead ahead, FloatRows sum) noexcept {
  if (dtype == DType::f32) {
    blend_of<float>(weight, rows, values, width, ahead, sum);
  } else if (dtype == DType::f16) {
    blend_of<f16>(weight, rows, values, width, ahead, sum);
  } else {
    blend_of<bf16>(weight, rows, values, width, ahead, sum);
  }
}
