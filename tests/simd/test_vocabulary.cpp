// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Conversions and exp of every target, over their whole range.
#include <bit>
#include <cmath>
#include <cstring>
#include <kvlean/simd/attention_kernels.hpp>
#include <limits>
#include <random>
#include <vector>

#include "tests/simd/targets.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::GuardedBytes;
using kvlean_test::targets;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// Floats at every rounding decision of f16 and bf16: each representable value, the midpoints to
/// its neighbours and the floats just beside those; NaNs, subnormals; and random bits.
std::vector<float> hard_floats() {
  std::vector<u32> bits;
  for (u32 half = 0; half < 0x10000u; ++half) {
    for (const float value :
         {detail::f16_bits_to_f32(static_cast<u16>(half)), std::bit_cast<float>(half << 16)}) {
      const u32 exact = std::bit_cast<u32>(value);
      for (const u32 step : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
        bits.push_back(exact + step);
      }
    }
  }
  for (u32 i = 0; i < 26; ++i) {  // around the subnormals of f16
    for (u32 low = 0; low < 64; ++low) bits.push_back(((101 + i % 14) << 23) + (low << 17) + i % 3);
  }
  std::mt19937 random(5);
  for (u32 i = 0; i < 200000; ++i) bits.push_back(static_cast<u32>(random()));
  std::vector<float> values(bits.size());
  std::memcpy(values.data(), bits.data(), bits.size() * sizeof(float));
  return values;
}

/// |a - b| in units of the last place of the exact value.
double ulps(float got, double exact) {
  if (exact > static_cast<double>(std::numeric_limits<float>::max())) return got == inf ? 0 : 1e9;
  int exponent = 0;
  std::frexp(exact, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 24, -149));
  return std::abs(static_cast<double>(got) - exact) / unit;
}

}  // namespace

TEST_CASE("the CPU is asked once and gives a target that it supports", "[simd]") {
  REQUIRE(simd::best() != simd::Target::best);
  REQUIRE(simd::best() == simd::best());
  REQUIRE(simd::supported(simd::best()));
  REQUIRE(simd::supported(simd::Target::scalar));
  REQUIRE(&simd::attention_kernels() == &simd::attention_kernels(simd::best()));
  for (const simd::Target target : {simd::Target::avx2, simd::Target::avx512, simd::Target::neon}) {
    INFO(simd::name(target));
    if (!simd::supported(target)) {
      REQUIRE(&simd::row_kernels(target) == &simd::row_kernels(simd::Target::scalar));
    } else {
      REQUIRE(&simd::row_kernels(target) != &simd::row_kernels(simd::Target::scalar));
    }
  }
}

TEST_CASE("every half converts as in core/dtype", "[simd]") {
  std::vector<u16> halves(0x10000);
  for (u32 i = 0; i < 0x10000u; ++i) halves[i] = static_cast<u16>(i);
  std::vector<float> f16_values(halves.size());
  std::vector<float> bf16_values(halves.size());
  for (u32 i = 0; i < 0x10000u; ++i) {
    f16_values[i] = detail::f16_bits_to_f32(halves[i]);
    bf16_values[i] = detail::bf16_bits_to_f32(halves[i]);
  }
  for (const simd::Target target : targets()) {
    INFO(simd::name(target));
    std::vector<float> got(halves.size());
    simd::row_kernels(target).load(halves.data(), DType::f16, got.data(), 0x10000);
    REQUIRE(same_bits(got, f16_values));
    simd::row_kernels(target).load(halves.data(), DType::bf16, got.data(), 0x10000);
    REQUIRE(same_bits(got, bf16_values));
  }
}

TEST_CASE("floats round to halves as in core/dtype, NaN, ties and subnormals included", "[simd]") {
  const std::vector<float> values = hard_floats();
  const u32 count = static_cast<u32>(values.size());
  std::vector<u16> f16_bits(count);
  std::vector<u16> bf16_bits(count);
  for (u32 i = 0; i < count; ++i) {
    f16_bits[i] = detail::f32_to_f16_bits(values[i]);
    bf16_bits[i] = detail::f32_to_bf16_bits(values[i]);
  }
  for (const simd::Target target : targets()) {
    INFO(simd::name(target));
    std::vector<u16> got(count);
    simd::row_kernels(target).store(values.data(), got.data(), DType::f16, count);
    REQUIRE(got == f16_bits);
    simd::row_kernels(target).store(values.data(), got.data(), DType::bf16, count);
    REQUIRE(got == bf16_bits);
  }
}

TEST_CASE("rows of any length and alignment stay within their bytes", "[simd]") {
  std::mt19937 random(6);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (u32 count = 0; count < 70; ++count) {
      std::vector<float> values(count);
      for (float& x : values) x = static_cast<float>(random() % 2048) * 0.25f - 100.0f;
      const std::size_t bytes = count * size_bytes(dtype);
      const GuardedBytes storage(bytes + 1);
      const GuardedBytes floats(count * sizeof(float) + 1);
      // At the upper guard, at the lower one, and one byte beside alignment.
      for (std::byte* at : {storage.last() + 1, storage.first(), storage.first() + 1}) {
        for (std::byte* to : {floats.last() + 1, floats.first(), floats.first() + 1}) {
          for (const simd::Target target : targets()) {
            CAPTURE(simd::name(target), name(dtype), count);
            const simd::RowKernels& kernels = simd::row_kernels(target);
            if (count != 0) std::memcpy(to, values.data(), count * sizeof(float));
            kernels.store(reinterpret_cast<const float*>(to), at, dtype, count);
            std::memset(to, 0xff, count * sizeof(float));
            kernels.load(at, dtype, reinterpret_cast<float*>(to), count);
            bool exact = true;
            for (u32 i = 0; i < count; ++i) {
              float x;
              std::memcpy(&x, to + i * sizeof(float), sizeof x);
              float want = values[i];
              if (dtype == DType::f16) want = static_cast<float>(f16(want));
              if (dtype == DType::bf16) want = static_cast<float>(bf16(want));
              exact = exact && x == want;
            }
            REQUIRE(exact);
          }
        }
      }
    }
  }
}

TEST_CASE("exp is within 2 ulp over the whole range, subnormal results within one step", "[simd]") {
  std::vector<float> x;
  for (double v = -106.0; v < 90.0; v += 0.000731) x.push_back(static_cast<float>(v));
  for (float v = 1e-42f; v < 1.0f; v *= 1.37f) {
    x.push_back(v);
    x.push_back(-v);
  }
  std::mt19937 random(7);
  for (u32 i = 0; i < 100000; ++i) {
    const float v = std::bit_cast<float>(static_cast<u32>(random()));
    if (v == v) x.push_back(v);
  }
  for (const float v :
       {0.0f, -0.0f, inf, -inf, 88.72283f, 88.72284f, -87.33655f, -103.97208f, -103.97209f,
        std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest()}) {
    x.push_back(v);
  }
  for (const simd::Target target : targets()) {
    std::vector<float> y = x;
    simd::attention_kernels(target).exponentials(y.data(), static_cast<u32>(y.size()), 0.0f);
    double worst = 0.0;
    float at = 0.0f;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double error = ulps(y[i], std::exp(static_cast<double>(x[i])));
      if (!(error <= worst)) {
        worst = error;
        at = x[i];
      }
    }
    CAPTURE(simd::name(target), at);
    CHECK(worst <= 2.0);
    std::vector<float> special{-inf, inf, nan_value, 0.0f};
    simd::attention_kernels(target).exponentials(special.data(), 4, 0.0f);
    CHECK(special[0] == 0.0f);
    CHECK(special[1] == inf);
    CHECK(special[2] != special[2]);
    CHECK(special[3] == 1.0f);
  }
}

TEST_CASE("softcap follows tanh to 4 ulp and keeps NaN and infinity", "[simd]") {
  std::vector<float> x{0.0f, -0.0f, inf, -inf, nan_value};
  for (float v = 1e-40f; v < 1e4f; v *= 1.003f) {
    x.push_back(v);
    x.push_back(-v);
  }
  for (const simd::Target target : targets()) {
    std::vector<float> y = x;
    simd::attention_kernels(target).logits(y.data(), static_cast<u32>(y.size()), 1.0f, 1.0f,
                                           nullptr);
    double worst = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (x[i] != x[i]) {
        REQUIRE(y[i] != y[i]);
        continue;
      }
      worst = std::max(worst, ulps(y[i], std::tanh(static_cast<double>(x[i]))));
    }
    CAPTURE(simd::name(target));
    CHECK(worst <= 4.0);
  }
}

TEST_CASE("sums of exponentials leave NaN out, or show it", "[simd]") {
  for (const simd::Target target : targets()) {
    for (u32 count = 1; count < 40; ++count) {
      for (u32 bad = 0; bad < count; ++bad) {
        CAPTURE(simd::name(target), count, bad);
        std::vector<float> x(count, 0.0f);
        x[bad] = nan_value;
        std::vector<float> again = x;
        const simd::AttentionKernels& kernels = simd::attention_kernels(target);
        REQUIRE(kernels.maximum(x.data(), count) == (count == 1 ? -inf : 0.0f));
        REQUIRE(kernels.exponentials(x.data(), count, 0.0f) == count - 1.0);
        float maximum = -inf;
        double sum = 0.0;
        const u32 grown =
            kernels.weigh_few({again.data(), count}, 1, count, 0.0f, nullptr, &maximum, &sum);
        REQUIRE(grown == (count == 1 ? 0u : 1u));
        REQUIRE(maximum == (count == 1 ? -inf : 0.0f));
        REQUIRE(std::isnan(sum));
        REQUIRE(std::isnan(x[bad]));
      }
    }
  }
}
