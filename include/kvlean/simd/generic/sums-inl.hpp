// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Scaling a row, adding rows.

inline void scale_row(float* x, u32 count, float factor) noexcept {
  const Vector f = set1(factor);
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) store(mul(load(x + t), f), x + t);
  if (t < count) store(mul(load(x + t, count - t), f), x + t, count - t);
}

/// Columns [0, vectors * lanes) of the sum of rows.
template <u32 vectors>
inline void add_columns(const float* rows, u64 stride, u32 row_count, float* total) noexcept {
  Vector sum[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 c = 0; c < vectors; ++c) sum[c] = zero();
  for (u32 r = 0; r < row_count; ++r) {
    const float* row = rows + r * stride;
    KVLEAN_SIMD_UNROLL
    for (u32 c = 0; c < vectors; ++c) sum[c] = add(sum[c], load(row + c * lanes));
  }
  KVLEAN_SIMD_UNROLL
  for (u32 c = 0; c < vectors; ++c) {
    store(add(load(total + c * lanes), sum[c]), total + c * lanes);
  }
}

inline void add_rows(ConstFloatRows rows, u32 row_count, u32 count, float* total) noexcept {
  u32 t = 0;
  for (; t + 4 * lanes <= count; t += 4 * lanes) {
    add_columns<4>(rows.data + t, rows.stride, row_count, total + t);
  }
  for (; t + lanes <= count; t += lanes) {
    add_columns<1>(rows.data + t, rows.stride, row_count, total + t);
  }
  if (t == count) return;
  const u32 rest = count - t;
  Vector sum = zero();
  for (u32 r = 0; r < row_count; ++r) {
    sum = add(sum, load(rows.data + r * rows.stride + t, rest));
  }
  store(add(load(total + t, rest), sum), total + t, rest);
}
