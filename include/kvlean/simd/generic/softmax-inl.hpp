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

/// Scales, caps and shifts one vector of logits.
template <bool capped>
inline Vector finish_logits(Vector x, Vector factor, Vector cap, const float* log_mass,
                            u32 n) noexcept {
  x = mul(x, factor);
  if (capped) x = mul(cap, hyperbolic_tangent(x));
  return log_mass != nullptr ? add(x, load_some(log_mass, n)) : x;
}

/// The largest of a row that are not NaN: by lane, and of the last elements.
struct Largest {
  Vector lane;
  float rest;

  [[nodiscard]] float value() const noexcept {
    const float whole = reduce_max(lane);
    return rest > whole ? rest : whole;
  }
  [[nodiscard]] bool exceeds(float x) const noexcept {
    return at_least(set1(x), lane) != (1u << lanes) - 1 || rest > x;
  }
};

inline Largest largest_of_row(const float* x, u32 count) noexcept {
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
  Largest largest{max(first, second), -infinity};
  // Masked lanes would be zeros.
  for (; t < count; ++t) largest.rest = x[t] > largest.rest ? x[t] : largest.rest;
  return largest;
}
inline float row_maximum(const float* x, u32 count) noexcept {
  return largest_of_row(x, count).value();
}

template <bool capped>
inline Largest row_logits_of(float* x, u32 count, float scale, float softcap,
                             const float* log_mass) noexcept {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const Vector factor = set1(capped ? scale / softcap : scale);
  const Vector cap = set1(softcap);
  Largest largest{set1(-infinity), -infinity};
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    const Vector a = finish_logits<capped>(load(x + t), factor, cap,
                                           log_mass != nullptr ? log_mass + t : nullptr, lanes);
    store(a, x + t);
    largest.lane = max(a, largest.lane);
  }
  if (t < count) {
    const u32 n = count - t;
    store(finish_logits<capped>(load(x + t, n), factor, cap,
                                log_mass != nullptr ? log_mass + t : nullptr, n),
          x + t, n);
    for (; t < count; ++t) largest.rest = x[t] > largest.rest ? x[t] : largest.rest;
  }
  return largest;
}

inline Largest row_largest(float* x, u32 count, float scale, float softcap,
                           const float* log_mass) noexcept {
  if (softcap > 0.0f) return row_logits_of<true>(x, count, scale, softcap, log_mass);
  if (scale != 1.0f || log_mass != nullptr) {
    return row_logits_of<false>(x, count, scale, softcap, log_mass);
  }
  return largest_of_row(x, count);
}

inline float row_logits(float* x, u32 count, float scale, float softcap,
                        const float* log_mass) noexcept {
  return row_largest(x, count, scale, softcap, log_mass).value();
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

inline u32 weigh_few(FloatRows x, u32 rows, u32 count, float softcap, const float* log_mass,
                     float* maximum, double* sum) noexcept {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  u32 grown = 0;
  for (u32 r = 0; r < rows; ++r) {
    const Largest largest = row_largest(x.data + r * x.stride, count, 1.0f, softcap, log_mass);
    if (!largest.exceeds(maximum[r])) continue;
    const float value = largest.value();
    if (!(value > maximum[r])) continue;
    maximum[r] = value;
    grown |= 1u << r;
  }
  for (u32 r = 0; r < rows; ++r) {
    // Only logits of -inf (or NaN, which must show) so far: -inf - -inf would make them NaN.
    const float shift = maximum[r] == -infinity ? 0.0f : maximum[r];
    sum[r] = row_exponentials<true>(x.data + r * x.stride, count, shift);
  }
  return grown;
}
