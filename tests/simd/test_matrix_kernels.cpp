// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Products in lanes and in tiles, powers and column sums, against double and at the edge of memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvlean/simd/matrix_kernels.hpp>
#include <kvlean/simd/row_kernels.hpp>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "tests/simd/targets.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::GuardedBytes;
using kvlean_test::targets;

constexpr float inf = std::numeric_limits<float>::infinity();

std::vector<float> normals(std::size_t count, u32 seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

/// Floats that end at a guard page.
class GuardedFloats {
 public:
  explicit GuardedFloats(const std::vector<float>& values)
      : memory_(values.size() * sizeof(float)) {
    std::memcpy(memory_.last(), values.data(), values.size() * sizeof(float));
  }
  [[nodiscard]] float* data() { return reinterpret_cast<float*>(memory_.last()); }

 private:
  GuardedBytes memory_;
};

/// log2(e) times the logit of a product, in double.
double exponent(double product, u32 t, const simd::LaneLogits& logits) {
  double y = product * static_cast<double>(logits.factor);
  if (logits.cap > 0.0f) y = static_cast<double>(logits.cap) * std::tanh(y);
  if (logits.log_mass != nullptr) {
    y += static_cast<double>(logits.log_mass[t]) * 1.4426950408889634;
  }
  return y;
}
bool sees(u32 r, u32 t, const simd::LaneLogits& logits) {
  const float token = static_cast<float>(t);
  return logits.begin == nullptr || (logits.begin[r] <= token && token < logits.end[r]);
}

}  // namespace

TEST_CASE("powers of two of every target", "[simd]") {
  std::vector<float> y;
  for (float x = -160.0f; x < 129.0f; x += 0.0371f) y.push_back(x);
  for (const float x : {0.0f, -0.0f, 1.0f, -1.0f, 127.0f, 127.9999f, 128.0f, 1000.0f, -126.0f,
                        -149.0f, -151.0f, -1000.0f, inf, -inf}) {
    y.push_back(x);
  }
  y.push_back(std::numeric_limits<float>::quiet_NaN());
  while (y.size() % 16 != 0) y.push_back(0.0f);
  const u32 tokens = static_cast<u32>(y.size() / 16);
  const std::vector<float> zeros(16, 0.0f);
  simd::LaneLogits logits;
  logits.minus_shift = zeros.data();
  for (const simd::Target target : targets()) {
    CAPTURE(simd::name(target));
    GuardedFloats x(y);
    std::vector<float> sums(16);
    simd::matrix_kernels(target).powers(x.data(), tokens, 16, logits, sums.data());
    bool right = true;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(y[i]));
      const float got = x.data()[i];
      if (std::isnan(y[i])) {
        right = right && std::isnan(got);
      } else if (exact >= 0x1p128) {
        right = right && (got == inf || (exact == 0x1p128 && got >= 0x1.fffffcp127f));
      } else if (exact < 0x1p-126) {
        right = right && std::abs(static_cast<double>(got) - exact) <= 2.1 * 0x1p-149;
      } else {
        right = right && std::abs(static_cast<double>(got) - exact) <= 2.5e-7 * exact;
      }
    }
    CHECK(right);
  }
}

TEST_CASE("products, maxima, powers and columns in lanes, at the edge of memory", "[simd]") {
  for (const u32 width : {1u, 8u, 33u, 128u}) {
    for (const u32 tokens : {1u, 3u, 8u, 21u}) {
      for (const u32 lanes : {16u, 32u}) {
        const std::vector<float> q = normals(std::size_t{width} * lanes, 1);
        const std::vector<float> k = normals(std::size_t{width} * tokens, 2);
        const std::vector<float> mass = normals(tokens, 3);
        std::vector<float> minus_shift(lanes, -0.5f);
        std::vector<float> begin(lanes);
        std::vector<float> end(lanes);
        std::vector<float> weights(lanes);
        for (u32 r = 0; r < lanes; ++r) {
          begin[r] = static_cast<float>(r % 3);
          end[r] = static_cast<float>(std::min(tokens, 1 + r % 23));
          weights[r] = r % 5 == 0 ? 0.0f : 0.1f * static_cast<float>(r);
        }
        minus_shift[1] = -inf;
        simd::LaneLogits plain;
        plain.factor = 0.3f;
        plain.minus_shift = minus_shift.data();
        simd::LaneLogits general = plain;
        general.cap = 3.0f;
        general.log_mass = mass.data();
        general.begin = begin.data();
        general.end = end.data();
        for (const simd::Target target : targets()) {
          const simd::MatrixKernels& kernels = simd::matrix_kernels(target);
          for (const simd::LaneLogits& logits : {plain, general}) {
            CAPTURE(simd::name(target), width, tokens, lanes, logits.plain());
            GuardedFloats queries(q);
            GuardedFloats keys(k);
            GuardedFloats x(std::vector<float>(std::size_t{tokens} * lanes, 7.0f));
            kernels.products({queries.data(), lanes}, {keys.data(), width}, tokens, width,
                             {reinterpret_cast<const std::byte*>(keys.data()), i64{width} * 4,
                              tokens, width * 4},
                             x.data());
            GuardedFloats largest(std::vector<float>(lanes, -inf));
            kernels.maxima(x.data(), tokens, lanes, logits, largest.data());
            GuardedFloats sums(std::vector<float>(lanes, 1.0f));
            kernels.powers(x.data(), tokens, lanes, logits, sums.data());
            GuardedFloats out(std::vector<float>(tokens, 2.0f));
            GuardedFloats guarded_weights(weights);
            kernels.columns(x.data(), tokens, lanes, guarded_weights.data(), out.data());
            double worst = 0.0;
            std::vector<double> columns(tokens, 2.0);
            for (u32 r = 0; r < lanes; ++r) {
              double most = -std::numeric_limits<double>::infinity();
              double sum = 1.0;
              for (u32 t = 0; t < tokens; ++t) {
                double product = 0.0;
                for (u32 d = 0; d < width; ++d) {
                  product += static_cast<double>(q[std::size_t{d} * lanes + r]) *
                             static_cast<double>(k[std::size_t{t} * width + d]);
                }
                double power = 0.0;
                if (sees(r, t, logits)) {
                  const double y = exponent(product, t, logits);
                  most = std::max(most, y);
                  power = std::exp2(y + static_cast<double>(minus_shift[r]));
                }
                sum += power;
                columns[t] += static_cast<double>(weights[r]) * power;
                worst =
                    std::max(worst, std::abs(static_cast<double>(x.data()[t * lanes + r]) - power) /
                                        (1.0 + power));
              }
              worst = std::max(worst, std::abs(static_cast<double>(sums.data()[r]) - sum) / sum);
              if (std::isinf(most)) {
                worst = largest.data()[r] == -inf ? worst : 1.0;
              } else {
                worst = std::max(worst, std::abs(static_cast<double>(largest.data()[r]) - most) /
                                            (1.0 + std::abs(most)));
              }
            }
            for (u32 t = 0; t < tokens; ++t) {
              worst = std::max(
                  worst, std::abs(static_cast<double>(out.data()[t]) - columns[t]) / columns[t]);
            }
            REQUIRE(worst < 5e-6);
          }
        }
      }
    }
  }
}

TEST_CASE("tiles at the edge of memory, spans that share them", "[simd]") {
  const simd::TileKernels* kernels = simd::tile_kernels();
  CHECK((kernels != nullptr) == simd::supported(simd::Target::amx));
  CHECK(simd::tile_kernels(simd::Target::avx512) == nullptr);
  CHECK(simd::tile_kernels(simd::Target::scalar) == nullptr);
  if (kernels == nullptr) return;
  for (const u32 width : {32u, 64u, 96u, 128u, 160u, 256u}) {
    for (const u32 tokens : {1u, 16u, 40u, 256u}) {
      for (const u32 count : {1u, 32u, 45u, 128u}) {
        for (const u32 terms : {1u, 2u}) {
          CAPTURE(width, tokens, count, terms);
          const u32 steps = width / 32;
          const u32 tiles = (tokens + 15) / 16;
          // Keys end at a guard page: a tile reads its 16 rows and nothing else.
          GuardedBytes key_memory(std::size_t{tiles} * 16 * width * 2);
          std::vector<float> k = normals(std::size_t{tiles} * 16 * width, 5);
          const simd::RowKernels& rows = simd::row_kernels();
          for (u32 t = 0; t < tiles * 16; ++t) {
            std::byte* at = key_memory.last() + std::size_t{t} * width * 2;
            rows.store(k.data() + std::size_t{t} * width, at, DType::bf16, width);
            rows.load(at, DType::bf16, k.data() + std::size_t{t} * width, width);
          }
          std::vector<float> q = normals(std::size_t{count} * width, 6);
          if (terms == 1) {
            std::vector<u16> bits(q.size());
            rows.store(q.data(), bits.data(), DType::bf16, static_cast<u32>(q.size()));
            rows.load(bits.data(), DType::bf16, q.data(), static_cast<u32>(q.size()));
          }
          GuardedBytes packed(simd::tile_rows_bytes(count, steps, terms));
          for (u32 first = 0; first < count; first += 32) {
            GuardedFloats some(std::vector<float>(
                q.begin() + first * width,
                q.begin() + static_cast<std::ptrdiff_t>(std::min(first + 32, count)) * width));
            kernels->pack({some.data(), width}, std::min(32u, count - first), width, terms,
                          packed.last() + simd::tile_rows_bytes(first, steps, terms));
          }
          std::vector<const std::byte*> tile;
          std::vector<i64> stride(tiles, i64{width} * 2);
          for (u32 i = 0; i < tiles; ++i) {
            tile.push_back(key_memory.last() + std::size_t{i} * 16 * width * 2);
          }
          const u32 padded = (count + 31) / 32 * 32;
          std::vector<float> minus_shift(padded, -inf);
          std::vector<float> weights(padded, 0.0f);
          for (u32 r = 0; r < count; ++r) {
            minus_shift[r] = -1.0f;
            weights[r] = 0.01f * static_cast<float>(1 + r % 7);
          }
          simd::LaneLogits logits;
          logits.factor = 0.1f;
          logits.minus_shift = minus_shift.data();
          const simd::TileRows queries{packed.last(), count, steps, terms};
          const simd::TileKeys keys{tile.data(), stride.data(), tokens, 0};
          std::vector<float> largest(padded, -inf);
          std::vector<float> sums(padded, 0.0f);
          kernels->maxima(queries, keys, logits, largest.data());
          kernels->sums(queries, keys, logits, sums.data());
          // Three spans, borders inside tiles, the rows of none in between.
          const u32 border = count / 3;
          const u32 gap = count > 40 ? border + 3 : border;
          std::vector<std::vector<float>> out(3, std::vector<float>(tokens, 0.5f));
          std::vector<std::unique_ptr<GuardedFloats>> guarded;
          for (const auto& o : out) guarded.push_back(std::make_unique<GuardedFloats>(o));
          std::vector<simd::TileSpan> spans;
          if (border != 0) spans.push_back({0, border, guarded[0]->data()});
          if (count > 100) spans.push_back({gap, 99, guarded[1]->data()});
          const u32 rest = count > 100 ? 99 : gap;
          spans.push_back({rest, count, guarded[2]->data()});
          kernels->columns(queries, keys, logits, weights.data(), spans.data(),
                           static_cast<u32>(spans.size()));
          double worst = 0.0;
          std::vector<double> columns(std::size_t{3} * tokens, 0.5);
          for (u32 r = 0; r < count; ++r) {
            double most = -1e30;
            double sum = 0.0;
            for (u32 t = 0; t < tokens; ++t) {
              double product = 0.0;
              for (u32 d = 0; d < width; ++d) {
                product += static_cast<double>(q[std::size_t{r} * width + d]) *
                           static_cast<double>(k[std::size_t{t} * width + d]);
              }
              const double y = exponent(product, t, logits);
              most = std::max(most, y);
              const double power = std::exp2(y - 1.0);
              sum += power;
              const u32 span = r < border ? 0 : (count > 100 && r >= gap && r < 99 ? 1 : 2);
              if (span != 2 || r >= rest) {
                columns[span * tokens + t] += static_cast<double>(weights[r]) * power;
              }
            }
            worst = std::max(worst, std::abs(static_cast<double>(sums[r]) - sum) / sum);
            worst = std::max(
                worst, std::abs(static_cast<double>(largest[r]) - most) / (1.0 + std::abs(most)));
          }
          for (u32 s = 0; s < 3; ++s) {
            for (u32 t = 0; t < tokens; ++t) {
              worst = std::max(worst, std::abs(static_cast<double>(guarded[s]->data()[t]) -
                                               columns[s * tokens + t]) /
                                          columns[s * tokens + t]);
            }
          }
          REQUIRE(worst < (terms == 1 ? 5e-6 : 3e-5));
        }
      }
    }
  }
}

TEST_CASE("powers of tiles, where rows are unit vectors", "[simd]") {
  const simd::TileKernels* kernels = simd::tile_kernels();
  if (kernels == nullptr) return;
  constexpr u32 width = 32;
  constexpr u32 runs = 40;
  std::vector<float> units(width * width, 0.0f);
  for (u32 r = 0; r < width; ++r) units[r * width + r] = 1.0f;
  GuardedBytes packed(simd::tile_rows_bytes(width, 1, 1));
  kernels->pack({units.data(), width}, width, width, 1, packed.last());
  std::vector<float> shift(width, 0.0f);
  shift[3] = -inf;
  shift[4] = std::numeric_limits<float>::quiet_NaN();
  shift[5] = 1e30f;
  shift[6] = -1e30f;
  shift[7] = inf;
  const std::vector<float> weights(width, 0.375f);
  simd::LaneLogits logits;
  logits.minus_shift = shift.data();
  logits.factor = 1.0371f;
  bool right = true;
  for (u32 run = 0; run < runs; ++run) {
    GuardedBytes key_memory(std::size_t{16} * width * 2);
    std::vector<float> k = normals(std::size_t{16} * width, 7 + run);
    for (float& x : k) x *= run % 2 == 0 ? 1.0f : 40.0f;
    const simd::RowKernels& rows = simd::row_kernels();
    rows.store(k.data(), key_memory.last(), DType::bf16, 16 * width);
    rows.load(key_memory.last(), DType::bf16, k.data(), 16 * width);
    const std::byte* tile = key_memory.last();
    const i64 stride = i64{width} * 2;
    for (const u32 tokens : {1u, 16u}) {
      const simd::TileKeys keys{&tile, &stride, tokens, 0};
      std::vector<float> sums(width, 0.0f);
      kernels->sums({packed.last(), width, 1, 1}, keys, logits, sums.data());
      for (u32 r = 0; r < width; ++r) {
        double sum = 0.0;
        double largest = 0.0;
        for (u32 t = 0; t < tokens; ++t) {
          const double y =
              static_cast<double>(logits.factor) * static_cast<double>(k[t * width + r]);
          largest = std::max(largest, std::abs(y));
          sum += std::exp2(y + static_cast<double>(shift[r]));
        }
        const double got = static_cast<double>(sums[r]);
        if (std::isnan(sum)) {
          right = right && std::isnan(got);
        } else if (sum >= 0x1p127) {
          right = right && got >= 0x1p126;
        } else {
          right = right && std::abs(got - sum) <=
                               (7e-7 + 1.2e-7 * largest + 1e-7 * tokens) * sum + 16 * 0x1p-149;
        }
      }
      // The rows whose shifts are zero.
      std::vector<float> out(tokens, 0.0f);
      const simd::TileSpan span{8, width, out.data()};
      kernels->columns({packed.last(), width, 1, 1}, keys, logits, weights.data(), &span, 1);
      for (u32 t = 0; t < tokens; ++t) {
        double sum = 0.0;
        double largest = 0.0;
        for (u32 r = 8; r < width; ++r) {
          const double y =
              static_cast<double>(logits.factor) * static_cast<double>(k[t * width + r]);
          largest = std::max(largest, std::abs(y));
          sum += 0.375 * std::exp2(y);
        }
        right = right && (sum >= 0x1p126 || std::abs(static_cast<double>(out[t]) - sum) <=
                                                (1e-6 + 1.2e-7 * largest) * sum);
      }
    }
  }
  CHECK(right);
}
