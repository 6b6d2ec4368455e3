// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Products, weighted sums and column sums of every target against double, at the edge of memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvlean/core/row_tile.hpp>
#include <kvlean/simd/attention_kernels.hpp>
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

/// Rows of a storage type, each of which ends at a guard page or begins at one, on odd addresses.
class GuardedRows {
 public:
  GuardedRows(u32 count, u32 width, DType dtype, u32 seed) : width_(width), dtype_(dtype) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (u32 t = 0; t < count; ++t) {
      storage_.push_back(std::make_unique<GuardedBytes>(width * size_bytes(dtype)));
      std::byte* at = t % 3 == 0 ? storage_.back()->first() : storage_.back()->last();
      for (u32 d = 0; d < width; ++d) {
        std::byte* element = at + d * size_bytes(dtype);
        store_element(element, dtype, normal(random));
        values_.push_back(load_element(element, dtype));
      }
      pointers_.push_back(at);
    }
  }
  [[nodiscard]] simd::RowPointers rows() const {
    return {pointers_.data(), static_cast<u32>(pointers_.size())};
  }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] double at(u32 t, u32 d) const {
    return static_cast<double>(values_[t * width_ + d]);
  }
  [[nodiscard]] const float* floats() const { return values_.data(); }

 private:
  u32 width_;
  DType dtype_;
  std::vector<std::unique_ptr<GuardedBytes>> storage_;
  std::vector<const std::byte*> pointers_;
  std::vector<float> values_;
};

std::vector<float> normals(std::size_t count, u32 seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

/// The error that a float sum of `count` products may have: |a||b| (count + 2) 2^-24.
double bound(double size, u32 count) { return size * (count + 2.0) * 0x1p-24 + 1e-30; }

constexpr u32 widths[] = {1, 3, 8, 15, 16, 17, 40, 64, 72, 128, 131};
constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

}  // namespace

TEST_CASE("products of few query rows, every width, type and count", "[simd]") {
  for (const DType dtype : dtypes) {
    for (const u32 width : widths) {
      for (const u32 tokens : {1u, 3u, 4u, 9u}) {
        const GuardedRows keys(tokens, width, dtype, 11 + width);
        for (const u32 rows : {1u, 2u, 4u, 7u, 8u}) {
          const std::vector<float> queries = normals(rows * width, 12);
          const GuardedBytes query_memory(queries.size() * sizeof(float));
          std::memcpy(query_memory.last(), queries.data(), queries.size() * sizeof(float));
          for (const simd::Target target : targets()) {
            CAPTURE(simd::name(target), name(dtype), width, tokens, rows);
            const u32 stride = tokens + 2;
            std::vector<float> out(rows * stride, 7.0f);
            simd::attention_kernels(target).score_few(
                {reinterpret_cast<const float*>(query_memory.last()), width}, rows, keys.rows(),
                dtype, width, {}, {out.data(), stride});
            bool right = true;
            for (u32 r = 0; r < rows; ++r) {
              for (u32 t = 0; t < tokens; ++t) {
                double exact = 0.0;
                double size = 0.0;
                for (u32 d = 0; d < width; ++d) {
                  const double product =
                      static_cast<double>(queries[r * width + d]) * keys.at(t, d);
                  exact += product;
                  size += std::abs(product);
                }
                right = right && std::abs(static_cast<double>(out[r * stride + t]) - exact) <=
                                     bound(size, width);
              }
              right =
                  right && out[r * stride + tokens] == 7.0f && out[r * stride + tokens + 1] == 7.0f;
            }
            REQUIRE(right);
          }
        }
      }
    }
  }
}

TEST_CASE("a product does not depend on its neighbours", "[simd]") {
  const u32 width = 72;
  const GuardedRows keys(11, width, DType::f16, 3);
  const std::vector<float> queries = normals(8 * width, 4);
  for (const simd::Target target : targets()) {
    const simd::AttentionKernels& kernels = simd::attention_kernels(target);
    std::vector<float> together(8 * 11);
    kernels.score_few({queries.data(), width}, 8, keys.rows(), DType::f16, width, {},
                      {together.data(), 11});
    for (u32 r = 0; r < 8; ++r) {
      for (u32 t = 0; t < 11; ++t) {
        float alone = 0.0f;
        kernels.score_few({queries.data() + r * width, width}, 1, {keys.rows().row + t, 1},
                          DType::f16, width, {}, {&alone, 1});
        CAPTURE(simd::name(target), r, t);
        REQUIRE(alone == together[r * 11 + t]);
      }
    }
  }
}

TEST_CASE("products of many query rows", "[simd]") {
  for (const u32 width : widths) {
    for (const u32 tokens : {1u, 7u, 8u, 16u, 29u, 32u}) {
      const std::vector<float> keys = normals(tokens * width, 21);
      const GuardedBytes key_memory(keys.size() * sizeof(float));
      std::memcpy(key_memory.last(), keys.data(), keys.size() * sizeof(float));
      for (const u32 rows : {1u, 9u, 15u, 16u, 17u, 25u, 32u}) {
        const u32 padded = detail::padded_query_rows(rows);
        const std::vector<float> queries = normals(rows * width, 22);
        std::vector<float> columns(padded * width, 0.0f);
        for (u32 r = 0; r < rows; ++r) {
          detail::put_query_column(queries.data() + r * width, width, r, columns.data(), padded);
        }
        for (const simd::Target target : targets()) {
          CAPTURE(simd::name(target), width, tokens, rows);
          const u32 stride = tokens + 1;
          const GuardedBytes out_memory((rows * stride - 1) * sizeof(float));
          float* out = reinterpret_cast<float*>(out_memory.last());
          for (u32 i = 0; i < rows * stride - 1; ++i) out[i] = 7.0f;
          simd::attention_kernels(target).score_many(
              {columns.data(), padded}, rows,
              {reinterpret_cast<const float*>(key_memory.last()), width}, tokens, width,
              {out, stride});
          bool right = true;
          for (u32 r = 0; r < rows; ++r) {
            for (u32 t = 0; t < tokens; ++t) {
              double exact = 0.0;
              double size = 0.0;
              for (u32 d = 0; d < width; ++d) {
                const double product = static_cast<double>(queries[r * width + d]) *
                                       static_cast<double>(keys[t * width + d]);
                exact += product;
                size += std::abs(product);
              }
              right = right && std::abs(static_cast<double>(out[r * stride + t]) - exact) <=
                                   bound(size, width);
            }
            right = right && (r + 1 == rows || out[r * stride + tokens] == 7.0f);
          }
          REQUIRE(right);
        }
      }
    }
  }
}

TEST_CASE("weighted sums of value rows, every width, type and count", "[simd]") {
  for (const DType dtype : dtypes) {
    for (const u32 width : widths) {
      for (const u32 tokens : {1u, 5u, 32u}) {
        const GuardedRows values(tokens, width, dtype, 31);
        for (const u32 rows : {1u, 2u, 3u, 4u, 6u, 32u}) {
          const std::vector<float> weight = normals(rows * tokens, 32);
          const std::vector<float> start = normals(rows * width, 33);
          for (const simd::Target target : targets()) {
            CAPTURE(simd::name(target), name(dtype), width, tokens, rows);
            const GuardedBytes memory(start.size() * sizeof(float));
            float* sum = reinterpret_cast<float*>(memory.last());
            std::memcpy(sum, start.data(), start.size() * sizeof(float));
            simd::attention_kernels(target).blend({weight.data(), tokens}, rows, values.rows(),
                                                  dtype, width, {}, {sum, width});
            bool right = true;
            for (u32 r = 0; r < rows; ++r) {
              for (u32 d = 0; d < width; ++d) {
                double exact = static_cast<double>(start[r * width + d]);
                double size = std::abs(exact);
                for (u32 t = 0; t < tokens; ++t) {
                  const double product =
                      static_cast<double>(weight[r * tokens + t]) * values.at(t, d);
                  exact += product;
                  size += std::abs(product);
                }
                right = right && std::abs(static_cast<double>(sum[r * width + d]) - exact) <=
                                     bound(size, tokens);
              }
            }
            REQUIRE(right);
          }
        }
      }
    }
  }
}

TEST_CASE("rows add up, and scale, to the last element", "[simd]") {
  for (u32 count = 1; count < 140; count += count < 40 ? 1 : 17) {
    for (const u32 rows : {1u, 2u, 32u}) {
      const std::vector<float> data = normals(rows * count, 41);
      const std::vector<float> start = normals(count, 42);
      const GuardedBytes row_memory(data.size() * sizeof(float));
      std::memcpy(row_memory.last(), data.data(), data.size() * sizeof(float));
      for (const simd::Target target : targets()) {
        CAPTURE(simd::name(target), count, rows);
        const GuardedBytes memory(count * sizeof(float));
        float* total = reinterpret_cast<float*>(memory.last());
        std::memcpy(total, start.data(), count * sizeof(float));
        const simd::AttentionKernels& kernels = simd::attention_kernels(target);
        kernels.add_rows({reinterpret_cast<const float*>(row_memory.last()), count}, rows, count,
                         total);
        bool right = true;
        for (u32 t = 0; t < count; ++t) {
          double exact = 0.0;
          double size = std::abs(static_cast<double>(start[t]));
          for (u32 r = 0; r < rows; ++r) {
            exact += static_cast<double>(data[r * count + t]);
            size += std::abs(static_cast<double>(data[r * count + t]));
          }
          exact += static_cast<double>(start[t]);
          right = right && std::abs(static_cast<double>(total[t]) - exact) <= bound(size, rows);
        }
        REQUIRE(right);
        const std::vector<float> before(total, total + count);
        kernels.scale(total, count, 0.5f);
        for (u32 t = 0; t < count; ++t) right = right && total[t] == 0.5f * before[t];
        REQUIRE(right);
        float largest = before[0];
        for (const float x : before) largest = std::max(largest, x);
        REQUIRE(kernels.maximum(total, count) == 0.5f * largest);
      }
    }
  }
}

TEST_CASE("an online softmax of few rows takes one step", "[simd]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const simd::Target target : targets()) {
    const simd::AttentionKernels& kernels = simd::attention_kernels(target);
    for (const u32 count : {1u, 3u, 16u, 17u, 33u, 128u}) {
      for (u32 rows = 1; rows <= simd::few_rows; ++rows) {
        for (const bool with_mass : {false, true}) {
          CAPTURE(simd::name(target), count, rows, with_mass);
          const u64 stride = count + 5;
          const std::vector<float> logits = normals(rows * stride, 61 + count);
          const std::vector<float> mass = normals(count, 62);
          std::vector<float> x = logits;
          std::vector<float> maximum(rows);
          std::vector<double> sum(rows);
          // Rows by turns: nothing seen before, a larger logit, and a smaller one.
          for (u32 r = 0; r < rows; ++r) {
            maximum[r] = r % 3 == 0 ? -infinity : r % 3 == 1 ? 20.0f : -20.0f;
          }
          const u32 grown =
              kernels.weigh_few({x.data(), stride}, rows, count, 0.0f,
                                with_mass ? mass.data() : nullptr, maximum.data(), sum.data());
          for (u32 r = 0; r < rows; ++r) {
            float largest = r % 3 == 1 ? 20.0f : -infinity;
            const auto logit = [&](u32 t) {
              return with_mass ? logits[r * stride + t] + mass[t] : logits[r * stride + t];
            };
            for (u32 t = 0; t < count; ++t) largest = std::max(largest, logit(t));
            REQUIRE((grown >> r & 1) == (r % 3 == 1 ? 0u : 1u));
            REQUIRE(maximum[r] == largest);
            double total = 0.0;
            for (u32 t = 0; t < count; ++t) {
              const double want = std::exp(static_cast<double>(logit(t) - largest));
              REQUIRE(std::abs(x[r * stride + t] - want) <= 3e-7 * want);
              total += want;
            }
            REQUIRE(std::abs(sum[r] - total) <= 1e-6 * total);
            for (u64 t = count; t < stride; ++t)
              REQUIRE(x[r * stride + t] == logits[r * stride + t]);
          }
        }
      }
    }
  }
}

TEST_CASE("rows ahead are fetched, not read", "[simd]") {
  const u32 width = 40;
  const u32 rows = 5;
  const GuardedRows read(9, width, DType::f16, 51);
  const std::vector<float> queries = normals(rows * width, 52);
  const std::vector<float> start = normals(rows * width, 53);
  const GuardedBytes unmapped(1);  // its guards may be fetched, and fault when they are read
  const std::byte* guard = unmapped.first() - 64;
  for (const simd::Target target : targets()) {
    const simd::AttentionKernels& kernels = simd::attention_kernels(target);
    std::vector<float> products(rows * 9);
    kernels.score_few({queries.data(), width}, rows, read.rows(), DType::f16, width, {},
                      {products.data(), 9});
    std::vector<float> sums = start;
    kernels.blend({products.data(), 9}, rows, read.rows(), DType::f16, width, {},
                  {sums.data(), width});
    for (u32 count = 1; count <= 33; ++count) {
      const GuardedBytes list(count * sizeof guard);  // the pointers too end at a guard
      for (u32 i = 0; i < count; ++i) {
        std::memcpy(list.last() + i * sizeof guard, &guard, sizeof guard);
      }
      const simd::RowPointers pointers{reinterpret_cast<const std::byte* const*>(list.last()),
                                       count};
      for (const u32 begin : {0u, 2u, 4u, 12u, 40u}) {
        for (const u32 bytes : {0u, 64u, 1000u}) {
          CAPTURE(simd::name(target), count, begin, bytes);
          const simd::RowsAhead ahead(pointers, bytes, begin);
          std::vector<float> fetching(rows * 9);
          kernels.score_few({queries.data(), width}, rows, read.rows(), DType::f16, width, ahead,
                            {fetching.data(), 9});
          REQUIRE(fetching == products);
          std::vector<float> blended = start;
          kernels.blend({products.data(), 9}, rows, read.rows(), DType::f16, width, ahead,
                        {blended.data(), width});
          REQUIRE(blended == sums);
        }
      }
    }
  }
}
