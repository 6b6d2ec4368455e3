// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// exp and tanh of a vector.

/// e^x. Within 2 ulp of the exact value wherever that is a normal float; a subnormal result is
/// within one step. exp(-inf) is 0, exp(+inf) and overflow are +inf, NaN stays NaN.
/// x = n ln 2 + r with |r| <= ln 2 / 2, and a minimax polynomial for e^r (3.1e-9 relative).
inline Vector exponential(Vector x) noexcept {
  x = min(set1(104.0f), max(set1(-105.0f), x));  // this order keeps NaN
  const Vector n = round_product(x, set1(1.44269504f));
  Vector r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts, the first exact for any n
  r = fma(n, set1(2.12194440e-4f), r);
  Vector p = fma(set1(0x1.6a2434p-10f), r, set1(0x1.1239e2p-7f));
  p = fma(p, r, set1(0x1.5558f2p-5f));
  p = fma(p, r, set1(0x1.555492p-3f));
  p = fma(p, r, set1(0x1.fffffcp-2f));
  return scale_pow2(add(fma(p, mul(r, r), r), set1(1.0f)), n);
}

/// A minimax polynomial of degree 5 for 2^x, x in [0, 1) (7.5e-8 relative): highest degree first.
inline constexpr float power_polynomial[6] = {0x1.ec320ap-10f, 0x1.26900ep-7f, 0x1.c95446p-5f,
                                              0x1.ebd5a8p-3f,  0x1.62e4f6p-1f, 0x1.fffffep-1f};

/// 2^y. Within 2.5e-7 of the exact value, relative, wherever that is a normal float; a subnormal
/// result is within two steps. 2^-inf is 0, 2^+inf and overflow are +inf, NaN stays NaN.
inline Vector exponential2(Vector y) noexcept {
  Vector whole;
  const Vector x = split_power(y, whole);
  Vector p = set1(power_polynomial[0]);
  KVLEAN_SIMD_UNROLL
  for (u32 i = 1; i < 6; ++i) p = fma(p, x, set1(power_polynomial[i]));
  return scale_pow2(p, whole);
}

/// tanh x, 4 ulp. An odd minimax polynomial near zero, 1 - 2 / (e^2|x| + 1) elsewhere.
inline Vector hyperbolic_tangent(Vector x) noexcept {
  const Vector size = abs(x);
  const Vector square = mul(x, x);
  Vector p = fma(set1(-5.66477536e-3f), square, set1(2.06159962e-2f));
  p = fma(p, square, set1(-5.37386242e-2f));
  p = fma(p, square, set1(1.33315420e-1f));
  p = fma(p, square, set1(-3.33332926e-1f));
  const Vector near = fma(mul(p, square), x, x);
  const Vector e = exponential(add(size, size));
  const Vector far = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  return select_less(size, set1(0.625f), near, copysign(far, x));
}
