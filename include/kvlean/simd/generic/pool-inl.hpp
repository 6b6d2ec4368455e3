// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Means and maxima over heads, and sliding ones over the scores of a segment.

inline float larger_or_nan(float a, float b) noexcept { return b > a || b != b ? b : a; }

inline void mean_rows(const float* rows, u64 stride, u32 row_count, u32 count, float divisor,
                      float* out) noexcept {
  const Vector all = set1(divisor);
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    Vector sum = load(rows + t);
    for (u32 r = 1; r < row_count; ++r) sum = add(sum, load(rows + r * stride + t));
    store(div(sum, all), out + t);
  }
  for (; t < count; ++t) {
    float sum = rows[t];
    for (u32 r = 1; r < row_count; ++r) sum += rows[r * stride + t];
    out[t] = sum / divisor;
  }
}

inline void maximum_rows(const float* rows, u64 stride, u32 row_count, u32 count,
                         float* out) noexcept {
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    Vector largest = load(rows + t);
    for (u32 r = 1; r < row_count; ++r) {
      const Vector a = load(rows + r * stride + t);
      largest = where_number(largest, where_number(a, max(a, largest), a), largest);
    }
    store(largest, out + t);
  }
  for (; t < count; ++t) {
    float largest = rows[t];
    for (u32 r = 1; r < row_count; ++r) largest = larger_or_nan(largest, rows[r * stride + t]);
    out[t] = largest;
  }
}

inline void divide_by_counts(const float* x, const u32* counts, u32 count, float* out) noexcept {
  const Vector one = set1(1.0f);
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    store(div(load(x + t), max(load_counts(counts + t), one)), out + t);
  }
  for (; t < count; ++t) out[t] = counts[t] != 0 ? x[t] / static_cast<float>(counts[t]) : x[t];
}

/// One mean near an end, where the window is cut off.
inline float mean_at(const float* x, u32 count, u32 t, u32 width) noexcept {
  if (x[t] != x[t]) return x[t];
  const u32 half = width / 2;
  const u32 end = count - t > half ? t + half + 1 : count;
  float sum = 0.0f;
  for (u32 i = t > half ? t - half : 0; i < end; ++i) sum += x[i] == x[i] ? x[i] : 0.0f;
  return sum / static_cast<float>(width);
}

/// out[t] = the mean of whole windows, vectors * lanes of them.
template <u32 vectors>
inline void mean_block(const float* x, u32 width, Vector divisor, float* out) noexcept {
  const u32 half = width / 2;
  Vector sum[vectors];
  KVLEAN_SIMD_UNROLL
  for (u32 v = 0; v < vectors; ++v) sum[v] = zero();
  for (u32 i = 0; i < width; ++i) {
    KVLEAN_SIMD_UNROLL
    for (u32 v = 0; v < vectors; ++v) sum[v] = add_number(sum[v], load(x + i + v * lanes));
  }
  KVLEAN_SIMD_UNROLL
  for (u32 v = 0; v < vectors; ++v) {
    const Vector own = load(x + half + v * lanes);
    store(where_number(own, div(sum[v], divisor), own), out + half + v * lanes);
  }
}

/// Means of wide windows. Every window is the end of one block of `width` tokens and the start of
/// the next: ends are summed backwards into `out`, starts as the windows slide. No value is ever
/// subtracted, so an infinity or a large score leaves nothing behind.
inline void wide_means(const float* x, u32 count, u32 width, float* out) noexcept {
  const u32 half = width / 2;
  const auto number = [x](u32 t) noexcept { return x[t] == x[t] ? x[t] : 0.0f; };
  const auto end_of = [=](u32 begin) noexcept {
    return count - begin > width ? begin + width : count;
  };
  for (u32 begin = 0; begin < count; begin = end_of(begin)) {
    float sum = 0.0f;
    for (u32 t = end_of(begin); t-- > begin;) {
      sum += number(t);
      out[t] = sum;
    }
  }
  // out[t] becomes the window [t, t + width): whole at the start of a block.
  for (u32 begin = 0; end_of(begin) < count; begin = end_of(begin)) {
    float sum = 0.0f;
    u32 next = begin + width;
    for (u32 t = begin + 1; t < begin + width; ++t) {
      if (next < count) sum += number(next++);
      out[t] += sum;
    }
  }
  // Which belongs to token t + half.
  for (u32 t = count > half ? count - half : 0; t-- > 0;) out[t + half] = out[t];
  float sum = 0.0f;
  for (u32 t = 0; t < half && t < count; ++t) sum += number(t);
  for (u32 t = 0; t < half && t < count; ++t) {
    if (t + half < count) sum += number(t + half);
    out[t] = sum;
  }
  const float divisor = static_cast<float>(width);
  for (u32 t = 0; t < count; ++t) out[t] = x[t] == x[t] ? out[t] / divisor : x[t];
}

inline void pool_average(const float* x, u32 count, u32 width, float* out) noexcept {
  constexpr u32 widest = 256;  // where sums of two parts are faster in most targets
  if (width > widest && count > widest) return wide_means(x, count, width, out);
  const u32 half = width / 2;
  const Vector divisor = set1(static_cast<float>(width));
  u32 t = 0;
  for (; t < half && t < count; ++t) out[t] = mean_at(x, count, t, width);
  for (; t < count && count - t >= half + 4 * lanes; t += 4 * lanes) {
    mean_block<4>(x + t - half, width, divisor, out + t - half);
  }
  for (; t < count && count - t >= half + lanes; t += lanes) {
    mean_block<1>(x + t - half, width, divisor, out + t - half);
  }
  for (; t < count; ++t) out[t] = mean_at(x, count, t, width);
}

/// The larger of two numbers.
inline float larger(float a, float b) noexcept { return a > b ? a : b; }

/// Windows that start at their token double until one is at least half of `width`; two of those,
/// which may overlap, are a whole one.
inline void pool_maximum(const float* x, u32 count, u32 width, float* out) noexcept {
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const Vector lowest = set1(nothing);
  const u32 half = width / 2;
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = load(x + t);
    store(where_number(a, a, lowest), out + t);
  }
  for (; t < count; ++t) out[t] = x[t] == x[t] ? x[t] : nothing;
  u32 span = 1;  // out[t] = the largest of [t, t + span)
  for (; span < half + 1 && span < count; span *= 2) {
    const u32 end = count - span;
    for (t = 0; t + lanes <= end; t += lanes) {
      store(max(load(out + t), load(out + t + span)), out + t);
    }
    for (; t < end; ++t) out[t] = larger(out[t], out[t + span]);
  }
  // [t - half, t + half] is two spans that start at or before t: descending, none is overwritten
  // that is still needed. Before `half` windows are cut off and may be shorter than a span.
  if (span > half) {
    const u32 later = span - half - 1;  // the second span starts this much before t
    t = count;
    while (t >= lanes && t - lanes >= half) {
      t -= lanes;
      store(max(load(out + t - half), load(out + t - later)), out + t);
    }
    while (t > half) {
      --t;
      out[t] = larger(out[t - half], out[t - later]);
    }
  }
  const u32 cut_off = half < count ? half : count;
  float largest = nothing;
  for (u32 i = 0; i < cut_off; ++i) largest = x[i] > largest ? x[i] : largest;
  for (u32 i = 0; i < cut_off; ++i) {
    if (i + half < count && x[i + half] > largest) largest = x[i + half];
    out[i] = largest;
  }
  for (t = 0; t + lanes <= count; t += lanes) {
    const Vector own = load(x + t);
    store(where_number(own, load(out + t), own), out + t);
  }
  for (; t < count; ++t) out[t] = x[t] == x[t] ? out[t] : x[t];
}
