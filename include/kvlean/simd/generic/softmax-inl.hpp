// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The parts of a softmax over one row.

inline Vector load_some(const float* x, u32 n) noexcept {
  return n == lanes ? load(x) : load(x, n);
}
inline void store_some(Vector a, float* x, u32 n) noexcept {
  if (n == lanes) {
    store(a, x);
  } else {
    store(a, x, n);
  }
}

inline float row_maximum(const float* x, u32 count) noexcept {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Vector first = set1(-infinity);
  Vector second = first;
  u32 t = 0;
  for (; t + 2 * lanes <= count; t += 2 * lanes) {
    first = max(load(x + t), first);
    second = max(load(x + t + lanes), second);
  }
  if (t + lanes <= count) {
    first = max(load(x + t), first);
    t += lanes;
  }
  float largest = reduce_max(max(first, second));
  for (; t < count; ++t) largest = x[t] > largest ? x[t] : largest;  // masked lanes would be zeros
  return largest;
}

/// Scales, caps and shifts one vector of logits.
template <bool capped>
inline Vector finish_logits(Vector x, Vector factor, Vector cap, const float* log_mass,
                            u32 n) noexcept {
  x = mul(x, factor);
  if (capped) x = mul(cap, hyperbolic_tangent(x));
  return log_mass != nullptr ? add(x, load_some(log_mass, n)) : x;
}

template <bool capped>
inline float row_logits_of(float* x, u32 count, float scale, float softcap,
                           const float* log_mass) noexcept {
  const Vector factor = set1(capped ? scale / softcap : scale);
  const Vector cap = set1(softcap);
  Vector largest = set1(-std::numeric_limits<float>::infinity());
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = finish_logits<capped>(load(x + t), factor, cap,
                                           log_mass != nullptr ? log_mass + t : nullptr, lanes);
    store(a, x + t);
    largest = max(a, largest);
  }
  float result = reduce_max(largest);
  if (t < count) {
    const u32 n = count - t;
    store(finish_logits<capped>(load(x + t, n), factor, cap,
                                log_mass != nullptr ? log_mass + t : nullptr, n),
          x + t, n);
    for (; t < count; ++t) result = x[t] > result ? x[t] : result;
  }
  return result;
}

inline float row_logits(float* x, u32 count, float scale, float softcap,
                        const float* log_mass) noexcept {
  if (softcap > 0.0f) return row_logits_of<true>(x, count, scale, softcap, log_mass);
  if (scale != 1.0f || log_mass != nullptr) {
    return row_logits_of<false>(x, count, scale, softcap, log_mass);
  }
  return row_maximum(x, count);
}

template <bool keep_nan>
inline double row_exponentials(float* x, u32 count, float shift) noexcept {
  constexpr u32 block = 512;  // elements that are summed in float
  const Vector down = set1(shift);
  double total = 0.0;
  for (u32 begin = 0; begin < count; begin += block) {
    const u32 end = count - begin < block ? count : begin + block;
    Vector first = zero();
    Vector second = zero();
    u32 t = begin;
    for (; t + 2 * lanes <= end; t += 2 * lanes) {
      const Vector a = exponential(sub(load(x + t), down));
      const Vector b = exponential(sub(load(x + t + lanes), down));
      store(a, x + t);
      store(b, x + t + lanes);
      first = keep_nan ? add(first, a) : add_number(first, a);
      second = keep_nan ? add(second, b) : add_number(second, b);
    }
    if (t + lanes <= end) {
      const Vector a = exponential(sub(load(x + t), down));
      store(a, x + t);
      first = keep_nan ? add(first, a) : add_number(first, a);
      t += lanes;
    }
    total += static_cast<double>(reduce_add(add(first, second)));
    if (t < end) {
      float rest[lanes];
      store(exponential(sub(load(x + t, end - t), down)), rest);
      std::memcpy(x + t, rest, (end - t) * sizeof(float));
      float sum = 0.0f;
      for (u32 i = 0; i < end - t; ++i) {
        sum += keep_nan || rest[i] == rest[i] ? rest[i] : 0.0f;
      }
      total += static_cast<double>(sum);
    }
  }
  return total;
}
