// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Cosines, roots and Gaussians of numbers, each operation rounded by itself: the same bits on every
// target.

inline Vector cosine(Vector squared, Vector other, Vector product) noexcept {
  const Vector scale = mul(square_root(squared), square_root(other));
  constexpr float least = std::numeric_limits<float>::denorm_min();
  return select_less(scale, set1(least), zero(), div(product, scale));
}
inline void cosines(const float* squared, const float* product, u32 count, float* out) noexcept {
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) {
    store(cosine(load(squared + t), load(squared + t + 1), load(product + t)), out + t);
  }
  if (t == count) return;
  const u32 rest = count - t;
  store(cosine(load(squared + t, rest), load(squared + t + 1, rest), load(product + t, rest)),
        out + t, rest);
}

inline void roots(const float* x, u32 count, float* out) noexcept {
  u32 t = 0;
  for (; t + lanes <= count; t += lanes) store(square_root(load(x + t)), out + t);
  if (t != count) store(square_root(load(x + t, count - t)), out + t, count - t);
}

/// exponential() for x <= 0 in operations that are rounded one by one: the same bits everywhere.
inline Vector rounded_exponential(Vector x) noexcept {
  constexpr float least = -80.0f;
  const Vector large = set1(0x1.8p23f);  // the sum keeps no fraction bits
  const Vector y = max(set1(least), x);
  const Vector n = sub(add(rounded_product(y, set1(1.44269504f)), large), large);
  // ln 2 in two parts, the first exact for any n
  Vector r = sub(y, rounded_product(n, set1(0.693359375f)));
  r = add(r, rounded_product(n, set1(2.12194440e-4f)));
  Vector p = add(rounded_product(set1(0x1.6a2434p-10f), r), set1(0x1.1239e2p-7f));
  p = add(rounded_product(p, r), set1(0x1.5558f2p-5f));
  p = add(rounded_product(p, r), set1(0x1.555492p-3f));
  p = add(rounded_product(p, r), set1(0x1.fffffcp-2f));
  p = add(add(rounded_product(p, rounded_product(r, r)), r), set1(1.0f));
  return select_less(x, set1(least), zero(), scale_pow2(p, n));
}
inline Vector gaussian(Vector distance, Vector width) noexcept {
  const Vector value = rounded_exponential(sub(zero(), div(distance, width)));
  return select_less(zero(), width, value, set1(1.0f));
}
inline void gaussians(const float* distance, const float* width, u32 count, float* out) noexcept {
  u32 i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(gaussian(load(distance + i), load(width + i)), out + i);
  }
  if (i == count) return;
  const u32 rest = count - i;
  store(gaussian(load(distance + i, rest), load(width + i, rest)), out + i, rest);
}
