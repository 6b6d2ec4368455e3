// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Norms, products, distances and weighted sums: the bits of row_math on every target, and what they
// are against double, at the edge of memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvlean/simd/merge_kernels.hpp>
#include <kvlean/simd/row_kernels.hpp>
#include <kvlean/simd/row_math.hpp>
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

/// Rows that end at a guard page or begin at one, mostly not aligned, and their values as float.
class GuardedRows {
 public:
  GuardedRows(u32 count, u32 width, DType dtype, u32 seed) : width_(width) {
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
  [[nodiscard]] const float* row(u32 t) const { return values_.data() + std::size_t{t} * width_; }

 private:
  u32 width_;
  std::vector<std::unique_ptr<GuardedBytes>> storage_;
  std::vector<const std::byte*> pointers_;
  std::vector<float> values_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

constexpr u32 widths[] = {1, 3, 8, 15, 16, 17, 31, 40, 64, 72, 128, 131, 192};
constexpr u32 counts[] = {0, 1, 2, 3, 4, 5, 9};
constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

/// Calls body(target, dtype, width, count, rows) for all of them, with a row more than `count`.
template <class Body>
void for_each_shape(Body&& body) {
  for (const DType dtype : dtypes) {
    for (const u32 width : widths) {
      for (const u32 count : counts) {
        const GuardedRows rows(count + 1, width, dtype, 7 * width + count);
        for (const simd::Target target : targets()) {
          CAPTURE(simd::name(target), name(dtype), width, count);
          body(simd::merge_kernels(target), dtype, width, count, rows);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("Norms, products and distances have row_math's bits on every target", "[simd]") {
  for_each_shape([](const simd::MergeKernels& kernels, DType dtype, u32 width, u32 count,
                    const GuardedRows& all) {
    const simd::RowPointers rows{all.rows().row + 1, count};
    const void* first = all.rows().row[0];
    std::vector<float> norms(count), products(count), distances(count), squared(count),
        crossed(count);
    std::vector<float> norms_seen(count), products_seen(count), distances_seen(count),
        squared_seen(count), crossed_seen(count);
    for (u32 t = 0; t < count; ++t) {
      norms[t] = squared[t] = row_math::squared_norm(all.row(t + 1), width);
      products[t] = row_math::dot(all.row(0), all.row(t + 1), width);
      distances[t] = row_math::squared_distance(all.row(0), all.row(t + 1), width);
      crossed[t] = row_math::dot(all.row(t), all.row(t + 1), width);
      double exact = 0.0;
      double size = 0.0;
      for (u32 d = 0; d < width; ++d) {
        const double product = static_cast<double>(all.row(0)[d]) * all.row(t + 1)[d];
        exact += product;
        size += std::fabs(product);
      }
      REQUIRE(std::fabs(products[t] - exact) <= (width / 16.0 + 6.0) * 0x1p-24 * size);
    }
    kernels.squared_norms(rows, dtype, width, norms_seen.data());
    kernels.products(all.row(0), rows, dtype, width, products_seen.data());
    kernels.squared_distances(first, rows, dtype, width, distances_seen.data());
    kernels.neighbours(first, rows, dtype, width, all.rows(), squared_seen.data(),
                       crossed_seen.data());
    CHECK(same_bits(norms, norms_seen));
    CHECK(same_bits(products, products_seen));
    CHECK(same_bits(distances, distances_seen));
    CHECK(same_bits(squared, squared_seen));
    CHECK(same_bits(crossed, crossed_seen));
    if (count == 0) return;
    kernels.neighbours(nullptr, rows, dtype, width, {}, squared_seen.data(), crossed_seen.data());
    crossed[0] = norms[0];
    CHECK(same_bits(crossed, crossed_seen));
  });
}

TEST_CASE("Weighted sums have the bits of a plain loop and one rounding on every target",
          "[simd]") {
  for_each_shape([](const simd::MergeKernels& kernels, DType dtype, u32 width, u32 count,
                    const GuardedRows& all) {
    std::vector<float> weight(count);
    for (u32 t = 0; t < count; ++t) weight[t] = 0.37f / static_cast<float>(t + 1);
    const simd::WeighedRows rows{
        all.rows().row[0], 0.61f, {all.rows().row + 1, count}, weight.data()};
    std::vector<float> sum(all.row(0), all.row(0) + width);
    row_math::scale(sum.data(), rows.self, width);
    for (u32 t = 0; t < count; ++t) {
      row_math::add_scaled(sum.data(), all.row(t + 1), weight[t], width);
    }
    const std::size_t bytes = width * size_bytes(dtype);
    std::vector<std::byte> rounded(bytes);
    simd::row_kernels(simd::Target::scalar).store(sum.data(), rounded.data(), dtype, width);

    const GuardedBytes floats(width * sizeof(float));
    kernels.weigh(rows, dtype, width, true, false, floats.last());
    CHECK(std::memcmp(floats.last(), sum.data(), width * sizeof(float)) == 0);
    const GuardedBytes out(bytes);
    kernels.weigh(rows, dtype, width, false, false, out.last());
    CHECK(std::memcmp(out.last(), rounded.data(), bytes) == 0);
    if (bytes % 64 == 0) {
      std::memset(out.first(), 0, bytes);  // page aligned
      kernels.weigh(rows, dtype, width, false, true, out.first());
      kernels.stream_end();
      CHECK(std::memcmp(out.first(), rounded.data(), bytes) == 0);
      const GuardedBytes copy(bytes);
      kernels.stream_row(all.rows().row[0], copy.first(), static_cast<u32>(bytes));
      kernels.stream_end();
      CHECK(std::memcmp(copy.first(), all.rows().row[0], bytes) == 0);
    }

    std::vector<float> added(all.row(0), all.row(0) + width);
    std::vector<float> added_seen = added;
    for (u32 t = 0; t < count; ++t) {
      row_math::add_scaled(added.data(), all.row(t + 1), weight[t], width);
    }
    kernels.add_weighed(rows.terms, weight.data(), dtype, width, added_seen.data());
    CHECK(same_bits(added, added_seen));
    row_math::add_scaled(added.data(), all.row(0), -0.3f, width);
    kernels.add_scaled(added_seen.data(), all.row(0), -0.3f, width);
    CHECK(same_bits(added, added_seen));
  });
}

TEST_CASE("A sum may be written over its anchor, and NaN stays in its row", "[simd]") {
  constexpr u32 width = 72;
  for (const DType dtype : dtypes) {
    for (const simd::Target target : targets()) {
      CAPTURE(simd::name(target), name(dtype));
      const simd::MergeKernels& kernels = simd::merge_kernels(target);
      const GuardedRows all(3, width, dtype, 5);
      const float weight[2] = {0.25f, 0.5f};
      const simd::WeighedRows rows{all.rows().row[0], 0.25f, {all.rows().row + 1, 2}, weight};
      const std::size_t bytes = width * size_bytes(dtype);
      std::vector<std::byte> apart(bytes);
      kernels.weigh(rows, dtype, width, false, false, apart.data());
      std::byte* anchor = const_cast<std::byte*>(all.rows().row[0]);
      kernels.weigh(rows, dtype, width, false, false, anchor);
      CHECK(std::memcmp(anchor, apart.data(), bytes) == 0);

      store_element(const_cast<std::byte*>(all.rows().row[1]), dtype,
                    std::numeric_limits<float>::quiet_NaN());
      float squared[3];
      float crossed[3];
      kernels.neighbours(nullptr, all.rows(), dtype, width, {}, squared, crossed);
      CHECK(std::isfinite(squared[0]));
      CHECK(std::isnan(squared[1]));
      CHECK(std::isfinite(squared[2]));
      CHECK(std::isnan(crossed[1]));
      CHECK(std::isnan(crossed[2]));
    }
  }
}

TEST_CASE("Distances of pairs have row_math's bits, whatever is prefetched", "[simd]") {
  for_each_shape([](const simd::MergeKernels& kernels, DType dtype, u32 width, u32 count,
                    const GuardedRows& all) {
    std::vector<float> expected(count);
    std::vector<float> seen(count);
    for (u32 t = 0; t < count; ++t) {
      expected[t] = row_math::squared_distance(all.row(t), all.row(t + 1), width);
    }
    for (const u32 ahead : {0u, 1u, count + 1}) {
      kernels.pair_distances({all.rows().row, count}, {all.rows().row + 1, count}, dtype, width,
                             {all.rows().row, ahead}, seen.data());
      CHECK(same_bits(expected, seen));
    }
  });
}

TEST_CASE("Cosines, roots and Gaussians: the same bits on every target, near the exact ones",
          "[simd]") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0.0f, 20.0f);
  for (u32 count = 0; count < 40; ++count) {
    std::vector<float> squared(count + 1), product(count), width(count), distance(count);
    for (float& x : squared) x = uniform(random);
    for (u32 i = 0; i < count; ++i) {
      product[i] = uniform(random) - 10.0f;
      distance[i] = uniform(random);
      width[i] = uniform(random);
    }
    if (count > 8) {
      squared[2] = 0.0f;
      squared[5] = nan;
      squared[7] = inf;
      width[1] = 0.0f;
      distance[2] = 0.0f;
      width[3] = 1e-4f;
      distance[4] = nan;
      distance[5] = 79.9f;
      width[5] = 1.0f;
      distance[6] = inf;
    }
    const GuardedBytes squared_at((count + 1) * sizeof(float));
    const GuardedBytes out((count + 1) * sizeof(float));
    std::memcpy(squared_at.last(), squared.data(), squared.size() * sizeof(float));
    float* seen = reinterpret_cast<float*>(out.last()) + 1;
    std::vector<float> scalar_seen;
    for (const simd::Target target : targets()) {
      CAPTURE(simd::name(target), count);
      const simd::MergeKernels& kernels = simd::merge_kernels(target);
      kernels.cosines(reinterpret_cast<const float*>(squared_at.last()), product.data(), count,
                      seen);
      for (u32 i = 0; i < count; ++i) {
        const float scale = std::sqrt(squared[i]) * std::sqrt(squared[i + 1]);
        const float expected = scale != 0.0f ? product[i] / scale : 0.0f;
        CHECK((seen[i] == expected || (std::isnan(seen[i]) && std::isnan(expected))));
      }
      kernels.roots(distance.data(), count, seen);
      for (u32 i = 0; i < count; ++i) {
        const float expected = std::sqrt(distance[i]);
        CHECK((seen[i] == expected || (std::isnan(seen[i]) && std::isnan(expected))));
      }
      kernels.gaussians(distance.data(), width.data(), count, seen);
      for (u32 i = 0; i < count; ++i) {
        if (width[i] == 0.0f) {
          CHECK(seen[i] == 1.0f);
          continue;
        }
        const double x = static_cast<double>(distance[i]) / static_cast<double>(width[i]);
        if (std::isnan(x)) {
          CHECK(std::isnan(seen[i]));
        } else if (x > 80.0) {
          CHECK(seen[i] == 0.0f);
        } else {
          CHECK(std::fabs(seen[i] - std::exp(-x)) <= 3.0 * 0x1p-24 * (1.0 + x) * std::exp(-x));
        }
      }
      std::vector<float> bits(seen, seen + count);
      for (float& x : bits) {
        if (x != x) x = nan;  // its bits are anyone's
      }
      if (target == targets().front()) scalar_seen = bits;
      CHECK(same_bits(scalar_seen, bits));
    }
  }
}

namespace {

/// Slots over `tokens` tokens from `first` on: runs of one to `longest`, some anchors in the
/// middle.
struct RandomSlots {
  std::vector<u32> anchor;
  std::vector<u64> begin;
  std::vector<u64> end;
  std::vector<u32> token;
  std::vector<float> self;
  std::vector<float> weight;

  RandomSlots(u32 first, u32 tokens, u32 longest, u32 seed) {
    std::mt19937 random(seed);
    for (u32 t = first; t < first + tokens;) {
      const u32 members =
          std::min<u32>(1 + static_cast<u32>(random() % longest), first + tokens - t);
      const u32 pivot = t + static_cast<u32>(random() % members);
      anchor.push_back(pivot);
      begin.push_back(token.size());
      for (u32 i = t; i < t + members; ++i) {
        if (i == pivot) continue;
        token.push_back(i);
        weight.push_back(0.3f / static_cast<float>(1 + random() % 5));
      }
      end.push_back(token.size());
      self.push_back(members == 1 && random() % 3 != 0 ? 1.0f : 0.6f);
      t += members;
    }
  }
  [[nodiscard]] simd::MergedSlots slots() const {
    return {anchor.data(), begin.data(), end.data(), token.data()};
  }
};

}  // namespace

TEST_CASE("Slots are merged in place as one by one, K and V, streamed or not", "[simd]") {
  struct Shape {
    u32 tokens, longest;
    bool pages;
  };
  constexpr Shape shapes[] = {
      {1, 1, false}, {70, 1, false}, {150, 4, false}, {90, 3, true}, {700, 500, false}};
  for (const DType dtype : dtypes) {
    for (const u32 width : {5u, 32u, 64u, 131u}) {
      for (const Shape& shape : shapes) {
        const RandomSlots chosen(0, shape.tokens, shape.longest, width + shape.tokens);
        const u32 count = static_cast<u32>(chosen.anchor.size());
        const std::size_t bytes = width * size_bytes(dtype);
        const GuardedRows all(shape.tokens, width, dtype, 3);
        std::vector<i32> table(shape.tokens / 16 + 1);
        for (u32 page = 0; page < table.size(); ++page) {
          table[page] = static_cast<i32>(table.size() - 1 - page);
        }
        const auto places = [&](std::byte* data) {
          simd::RowPlaces rows;
          rows.data = data;
          rows.stride = static_cast<i64>(bytes);
          if (shape.pages) {
            rows.page_table = table.data();
            rows.page_stride = static_cast<i64>(16 * bytes);
            rows.page_tokens = 16;
            rows.page_shift = 4;
          }
          return rows;
        };
        for (const simd::Target target : targets()) {
          const simd::MergeKernels& kernels = simd::merge_kernels(target);
          for (const bool streams : {false, true}) {
            if (streams && bytes % 64 != 0) continue;
            CAPTURE(simd::name(target), name(dtype), width, shape.tokens, streams);
            const std::size_t room = table.size() * 16 * bytes;
            GuardedBytes memory[2] = {GuardedBytes(room), GuardedBytes(room)};
            simd::MergedRows rows[2];
            for (u32 r = 0; r < 2; ++r) {
              rows[r].from = rows[r].to = places(streams ? memory[r].first() : memory[r].last());
              for (u32 t = 0; t < shape.tokens; ++t) {
                std::memcpy(rows[r].from.at(t), all.rows().row[t], bytes);
              }
              rows[r].dtype = dtype;
              rows[r].width = width;
              rows[r].self = chosen.self.data();
              rows[r].weight = chosen.weight.data();
              rows[r].ahead = {all.rows().row, r * shape.tokens};
            }
            rows[0].blends = shape.tokens != 150;
            kernels.merge(rows, 2, chosen.slots(), 0, count / 2, 0, streams);
            kernels.merge(rows, 2, chosen.slots(), count / 2, count, count / 2, streams);
            kernels.stream_end();
            std::vector<std::byte> expected(bytes);
            for (u32 j = 0; j < count; ++j) {
              for (u32 r = 0; r < 2; ++r) {
                std::vector<const std::byte*> terms;
                for (u64 t = chosen.begin[j]; t < chosen.end[j] && rows[r].blends; ++t) {
                  terms.push_back(all.rows().row[chosen.token[t]]);
                }
                const float self = rows[r].blends ? chosen.self[j] : 1.0f;
                std::memcpy(expected.data(), all.rows().row[chosen.anchor[j]], bytes);
                if (!terms.empty() || self != 1.0f) {
                  simd::merge_kernels(simd::Target::scalar)
                      .weigh({all.rows().row[chosen.anchor[j]],
                              self,
                              {terms.data(), static_cast<u32>(terms.size())},
                              chosen.weight.data() + chosen.begin[j]},
                             dtype, width, false, false, expected.data());
                }
                REQUIRE(std::memcmp(expected.data(), rows[r].to.at(j), bytes) == 0);
              }
            }
          }
        }
      }
    }
  }
}

namespace {

/// Windows of up to `longest` terms over rows `tokens`, `tokens` + 1, ..; anchors are those before.
struct RandomWindows {
  std::vector<u32> anchor, token;
  std::vector<u64> begin, end;
  std::vector<float> self, weight;

  RandomWindows(u32 tokens, u32 longest, bool ahead, u32 seed) {
    std::mt19937 random(seed);
    const auto below = [&](u64 n) { return n == 0 ? u64{0} : u64{random() % n}; };
    for (u32 t = 0; t < tokens; ++t) {
      token.push_back(tokens + t);
      weight.push_back(0.3f / static_cast<float>(1 + random() % 5));
    }
    for (u32 t = 0; t < tokens; ++t) {
      u64 low = ahead && t != 0 ? begin.back() : below(tokens);
      u64 high = low + 1 + below(std::min<u64>(longest, tokens - low));
      if (ahead && t != 0 && random() % 2 == 0) {
        high = end.back();
      } else if (ahead && t != 0) {
        low = std::min<u64>(low + below(longest / 2), tokens - 1);
        high = std::min<u64>(std::max<u64>(end.back(), low + 1) + below(3), tokens);
      }
      anchor.push_back(t);
      self.push_back(random() % 3 != 0 ? 1.0f : 0.6f);
      begin.push_back(low);
      end.push_back(std::min<u64>(high, tokens));
    }
  }
};

}  // namespace

TEST_CASE("Windows have the bits of their two parts on every target, in any pieces", "[simd]") {
  constexpr u32 tokens = 90;
  for (const DType dtype : dtypes) {
    for (const u32 width : {1u, 5u, 32u, 64u, 131u, 200u, 1100u}) {
      for (u32 form = 0; form < 6; ++form) {
        const u32 longest = form < 2 ? 4 : form < 4 ? 20 : 70;
        const RandomWindows chosen(tokens, longest, form % 2 == 0, width + form);
        const std::size_t bytes = width * size_bytes(dtype);
        const GuardedBytes data(2 * tokens * bytes);
        std::mt19937 random(form);
        std::normal_distribution<float> normal;
        std::vector<float> value;
        for (u32 i = 0; i < 2 * tokens * width; ++i) {
          std::byte* element = data.last() + i * size_bytes(dtype);
          store_element(element, dtype, normal(random));
          value.push_back(load_element(element, dtype));
        }
        std::vector<float> expected;
        for (u32 slot = 0; slot < tokens; ++slot) {
          const u64 begin = chosen.begin[slot];
          const u64 end = chosen.end[slot];
          u64 cut = begin;
          for (u64 step = 1; step <= 128; step *= 2) {
            if ((begin + step - 1) / step * step < end) cut = (end - 1) / step * step;
          }
          if (begin == 0) cut = 0;
          std::vector<float> front(width), back(width), sum(width);
          const auto add = [&](u64 term, std::vector<float>& to) {
            row_math::add_scaled(to.data(), value.data() + std::size_t{chosen.token[term]} * width,
                                 chosen.weight[term], width);
          };
          for (u64 term = cut; term < end; ++term) add(term, front);
          for (u64 term = cut; term-- > begin;) add(term, back);
          for (u32 d = 0; d < width; ++d) {
            const float product = chosen.self[slot] * value[std::size_t{slot} * width + d];
            sum[d] = product + (back[d] + front[d]);
          }
          expected.insert(expected.end(), sum.begin(), sum.end());
        }
        std::vector<std::byte> rounded(tokens * bytes);
        simd::row_kernels(simd::Target::scalar)
            .store(expected.data(), rounded.data(), dtype, tokens * width);
        for (const simd::Target target : targets()) {
          CAPTURE(simd::name(target), name(dtype), width, form);
          const simd::MergeKernels& kernels = simd::merge_kernels(target);
          simd::WindowedRows rows;
          rows.slots = {chosen.anchor.data(), chosen.begin.data(), chosen.end.data(),
                        chosen.token.data()};
          rows.end = tokens;
          rows.from.data = data.last();
          rows.from.stride = static_cast<i64>(bytes);
          rows.dtype = dtype;
          rows.width = width;
          rows.self = chosen.self.data();
          rows.weight = chosen.weight.data();
          const auto run = [&](const simd::WindowedRows& from, bool as_float, std::byte* out,
                               u32 piece) {
            auto sums = std::make_unique<simd::WindowSums>();
            simd::RowPlaces to;
            to.data = out;
            to.stride = static_cast<i64>(as_float ? width * sizeof(float) : bytes);
            for (u32 slot = 0; slot < tokens; slot += piece) {
              kernels.add_windows(from, *sums, slot, std::min(slot + piece, tokens), to, slot,
                                  as_float);
            }
          };
          const GuardedBytes floats(tokens * width * sizeof(float));
          const GuardedBytes out(tokens * bytes);
          run(rows, true, floats.last(), 1);
          CHECK(std::memcmp(floats.last(), expected.data(), expected.size() * sizeof(float)) == 0);
          run(rows, false, out.last(), 7);
          CHECK(std::memcmp(out.last(), rounded.data(), rounded.size()) == 0);

          struct Loaded {
            const std::vector<float>& value;
            u32 width;
          } const loaded{value, width};
          simd::WindowedRows by_call = rows;
          by_call.from = {};
          by_call.dtype = DType::f32;
          by_call.source = &loaded;
          by_call.load = [](const void* source, u32 token, float* row) noexcept {
            const Loaded& all = *static_cast<const Loaded*>(source);
            std::copy_n(all.value.data() + std::size_t{token} * all.width, all.width, row);
          };
          run(by_call, true, floats.last(), tokens);
          CHECK(std::memcmp(floats.last(), expected.data(), expected.size() * sizeof(float)) == 0);

          // Over the anchors, whose rows are nobody's term.
          std::vector<std::byte> before(data.last(), data.last() + tokens * bytes);
          run(rows, false, data.last(), tokens);
          CHECK(std::memcmp(data.last(), rounded.data(), rounded.size()) == 0);
          std::copy(before.begin(), before.end(), data.last());
        }
      }
    }
  }
}
