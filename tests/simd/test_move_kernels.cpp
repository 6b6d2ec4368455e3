// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Rows that are moved and turned, on every target, against the plainest way, at the edge of memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <kvlean/simd/move_kernels.hpp>
#include <limits>
#include <random>
#include <vector>

#include "tests/simd/targets.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::GuardedBytes;
using kvlean_test::targets;

constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

std::vector<std::byte> random_bytes(std::size_t count, u32 seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 0xffu);
  return bytes;
}

/// Ascending tokens of [0, tokens): scattered ones, and every `gap` a run of 40.
std::vector<u32> some_tokens(u32 tokens, u32 seed) {
  std::mt19937 random(seed);
  std::vector<u32> kept;
  for (u32 t = 0; t < tokens; ++t) {
    if (t % 100 >= 60 || random() % 3 == 0) kept.push_back(t);
  }
  return kept;
}

/// A head of rows in some layout, with bytes between the rows that nobody may touch.
struct Layout {
  const char* name;
  simd::RowPlaces places;
  std::vector<std::byte> memory;
  std::vector<u32> order;
  std::vector<i32> pages;
  bool packed = false;
};

enum class Kind { packed, apart, backwards, pages_16, pages_24, cells };

Layout layout_of(Kind kind, u32 tokens, std::size_t bytes, u32 seed) {
  std::mt19937 random(seed);
  Layout layout;
  const u32 page = kind == Kind::pages_16 ? 16 : 24;
  const std::size_t stride = kind == Kind::packed ? bytes : bytes + 10;
  const u32 num_pages = (tokens + page - 1) / page + 1;
  layout.memory = random_bytes((num_pages * page + 1) * stride + 64, seed);
  layout.places.stride = static_cast<i64>(stride);
  layout.places.data = layout.memory.data() + 3;
  layout.packed = kind == Kind::packed;
  if (kind == Kind::backwards) {
    layout.places.data += tokens * stride;
    layout.places.stride = -layout.places.stride;
  }
  if (kind == Kind::cells) {
    layout.order.resize(tokens);
    for (u32 t = 0; t < tokens; ++t) layout.order[t] = t;
    std::shuffle(layout.order.begin(), layout.order.end(), random);
    layout.places.order = layout.order.data();
  }
  if (kind == Kind::pages_16 || kind == Kind::pages_24) {
    layout.pages.resize(num_pages);
    for (u32 p = 0; p < num_pages; ++p) layout.pages[p] = static_cast<i32>(p);
    std::shuffle(layout.pages.begin(), layout.pages.end(), random);
    layout.places.page_table = layout.pages.data();
    layout.places.page_tokens = page;
    layout.places.page_shift = kind == Kind::pages_16 ? 4 : simd::RowPlaces::not_a_power;
    layout.places.page_stride = static_cast<i64>(page * stride);
  }
  return layout;
}

/// The same layout in a copy of its memory.
simd::RowPlaces places_in(const Layout& layout, std::vector<std::byte>& memory) {
  simd::RowPlaces places = layout.places;
  places.data = memory.data() + (layout.places.data - layout.memory.data());
  return places;
}

struct Angles {
  std::vector<double> cosine;
  std::vector<double> sine;
};

Angles angles(simd::Target target, const std::vector<double>& frequency, double position) {
  const auto pairs = static_cast<u32>(frequency.size());
  Angles result{std::vector<double>(pairs), std::vector<double>(pairs)};
  simd::move_kernels(target).angles(frequency.data(), position, pairs, result.cosine.data(),
                                    result.sine.data());
  return result;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

TEST_CASE("rows are gathered from any layout into any", "[simd][move]") {
  constexpr Kind kinds[] = {Kind::packed,   Kind::apart,    Kind::backwards,
                            Kind::pages_16, Kind::pages_24, Kind::cells};
  constexpr u32 tokens = 300;
  const std::vector<u32> kept = some_tokens(tokens, 1);
  const auto count = static_cast<u32>(kept.size());
  for (const simd::Target target : targets()) {
    for (const std::size_t bytes : {2u, 6u, 32u, 63u, 64u, 66u, 130u, 256u}) {
      for (const Kind from_kind : kinds) {
        for (const Kind to_kind : kinds) {
          for (const bool stream : {false, true}) {
            CAPTURE(simd::name(target), bytes, static_cast<int>(from_kind),
                    static_cast<int>(to_kind), stream);
            const Layout source = layout_of(from_kind, tokens, bytes, 2);
            const Layout target_layout = layout_of(to_kind, tokens, bytes, 3);
            std::vector<std::byte> source_memory = source.memory;
            std::vector<std::byte> expected = target_layout.memory;
            std::vector<std::byte> result = target_layout.memory;
            simd::RowMoves moves;
            moves.from = places_in(source, source_memory);
            moves.to = places_in(target_layout, expected);
            moves.bytes = bytes;
            for (u32 j = 2; j < count; ++j) {
              std::memcpy(moves.to.at(j), moves.from.at(kept[j]), bytes);
            }
            moves.to = places_in(target_layout, result);
            moves.packed = source.packed && target_layout.packed;
            const simd::MoveKernels& kernels = simd::move_kernels(target);
            kernels.gather(&moves, 1, kept.data(), 2, 50, count, stream);
            kernels.gather(&moves, 1, kept.data(), 50, count, count, stream);
            kernels.gather(nullptr, 0, nullptr, 0, 0, 0, stream);
            REQUIRE(same_bits(result, expected));
          }
        }
      }
    }
  }
}

TEST_CASE("rows are gathered in place, two sets at once", "[simd][move]") {
  constexpr Kind kinds[] = {Kind::packed,   Kind::apart,    Kind::backwards,
                            Kind::pages_16, Kind::pages_24, Kind::cells};
  constexpr u32 tokens = 500;
  for (const simd::Target target : targets()) {
    for (u32 seed = 0; seed < 6; ++seed) {
      const std::vector<u32> kept = some_tokens(tokens, seed);
      const auto count = static_cast<u32>(kept.size());
      for (const Kind kind : kinds) {
        for (const std::size_t bytes : {2u, 24u, 64u, 72u, 200u, 256u, 1000u}) {
          CAPTURE(simd::name(target), seed, static_cast<int>(kind), bytes);
          const Layout first = layout_of(kind, tokens, bytes, seed);
          const Layout second = layout_of(Kind::packed, tokens, bytes + 6, seed + 7);
          simd::RowMoves sets[2];
          std::vector<std::byte> result[2] = {first.memory, second.memory};
          std::vector<std::byte> expected[2] = {first.memory, second.memory};
          const Layout* const layouts[2] = {&first, &second};
          for (u32 i = 0; i < 2; ++i) {
            sets[i].from = sets[i].to = places_in(*layouts[i], expected[i]);
            sets[i].bytes = bytes + 6 * i;
            sets[i].packed = layouts[i]->packed;
            for (u32 j = 0; j < count; ++j) {
              std::memmove(sets[i].to.at(j), sets[i].from.at(kept[j]), sets[i].bytes);
            }
            sets[i].from = sets[i].to = places_in(*layouts[i], result[i]);
          }
          simd::move_kernels(target).gather(sets, 2, kept.data(), 0, count, count, false);
          REQUIRE(same_bits(result[0], expected[0]));
          REQUIRE(same_bits(result[1], expected[1]));
        }
      }
    }
  }
}

TEST_CASE("gathering reads and writes nothing beyond the rows", "[simd][move]") {
  const std::vector<u32> kept = some_tokens(120, 5);
  for (const simd::Target target : targets()) {
    for (const std::size_t bytes : {2u, 62u, 64u, 96u, 128u, 258u}) {
      CAPTURE(simd::name(target), bytes);
      const GuardedBytes source(120 * bytes);
      const GuardedBytes result(kept.size() * bytes);
      for (const bool stream : {false, true}) {
        for (const bool last : {false, true}) {
          simd::RowMoves moves;
          moves.from.data = last ? source.last() : source.first();
          moves.to.data = last ? result.last() : result.first();
          moves.from.stride = moves.to.stride = static_cast<i64>(bytes);
          moves.bytes = bytes;
          moves.packed = true;
          const auto random = random_bytes(120 * bytes, 9);
          std::memcpy(moves.from.data, random.data(), random.size());
          const auto count = static_cast<u32>(kept.size());
          simd::move_kernels(target).gather(&moves, 1, kept.data(), 0, count, count, stream);
          for (u32 j = 0; j < count; ++j) {
            REQUIRE(std::memcmp(moves.to.at(j), random.data() + kept[j] * bytes, bytes) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("values of slots are gathered, in place too", "[simd][move]") {
  for (const simd::Target target : targets()) {
    for (const u32 tokens : {1u, 7u, 16u, 40u, 333u, 1000u}) {
      for (u32 seed = 0; seed < 4; ++seed) {
        CAPTURE(simd::name(target), tokens, seed);
        const std::vector<u32> kept = some_tokens(tokens, seed);
        const auto count = static_cast<u32>(kept.size());
        std::vector<u32> values(tokens);
        for (u32 t = 0; t < tokens; ++t) values[t] = 0x7f800001u + 977u * t;  // any bits
        std::vector<u32> expected = values;
        for (u32 j = std::min(2u, count); j < count; ++j) expected[j] = values[kept[j]];
        const GuardedBytes away(tokens * 4);
        std::memcpy(away.last(), values.data(), tokens * 4);
        const simd::MoveKernels& kernels = simd::move_kernels(target);
        kernels.gather_values(values.data(), kept.data(), std::min(2u, count), count, away.last());
        CHECK(std::memcmp(away.last(), expected.data(), tokens * 4) == 0);
        kernels.gather_values(values.data(), kept.data(), std::min(2u, count), count,
                              values.data());
        CHECK(values == expected);
      }
    }
  }
}

TEST_CASE("angles have the cosines and sines of double, and the same bits", "[simd][move]") {
  std::mt19937_64 random(3);
  double worst = 0.0;
  for (u32 round = 0; round < 4000; ++round) {
    std::vector<double> frequency(32);
    for (double& f : frequency) f = std::pow(10.0, -static_cast<double>(random() % 6000) / 1000.0);
    const u64 range = round % 2 == 0 ? 4096 : 4000000;
    const double position = static_cast<double>(random() % range) - static_cast<double>(range / 2);
    const Angles scalar = angles(simd::Target::scalar, frequency, position);
    for (std::size_t i = 0; i < frequency.size(); ++i) {
      const double angle = frequency[i] * position;
      const double allowed = 4e-15 + 4e-16 * std::fabs(angle);
      worst = std::max({worst, std::fabs(scalar.cosine[i] - std::cos(angle)) / allowed,
                        std::fabs(scalar.sine[i] - std::sin(angle)) / allowed});
    }
    for (const simd::Target target : targets()) {
      const Angles wide = angles(target, frequency, position);
      REQUIRE(same_bits(wide.cosine, scalar.cosine));
      REQUIRE(same_bits(wide.sine, scalar.sine));
    }
  }
  CHECK(worst <= 1.0);
  CHECK(worst > 1e-3);  // or nothing was compared
}

TEST_CASE("angles at position 0, and without an end, are exact", "[simd][move]") {
  std::vector<double> frequency(16, 0.7);
  frequency[3] = 1e300;
  frequency[5] = std::numeric_limits<double>::infinity();
  for (const simd::Target target : targets()) {
    CAPTURE(simd::name(target));
    frequency[5] = 1.0;
    const Angles none = angles(target, frequency, 0.0);
    CHECK(none.cosine == std::vector<double>(16, 1.0));
    CHECK(none.sine == std::vector<double>(16, 0.0));
    frequency[5] = std::numeric_limits<double>::infinity();
    const Angles far = angles(target, frequency, 1000.0);
    CHECK(std::fabs(far.cosine[3]) <= 1.0);  // no angle at all, but a turn
    CHECK(std::fabs(far.sine[3]) <= 1.0);
    CHECK(std::isnan(far.cosine[5]));
  }
}

TEST_CASE("two angles are added and rounded once", "[simd][move]") {
  std::mt19937_64 random(4);
  std::vector<double> frequency(48);
  for (double& f : frequency) f = static_cast<double>(random() % 1000000) * 1e-6;
  for (u32 round = 0; round < 300; ++round) {
    const double a = static_cast<double>(random() % 300000) - 150000.0;
    const double b = static_cast<double>(random() % 32);
    std::vector<float> first;
    for (const simd::Target target : targets()) {
      const Angles of_a = angles(target, frequency, a);
      const Angles of_b = angles(target, frequency, b);
      std::vector<float> sum(96);
      simd::move_kernels(target).add_angles(of_a.cosine.data(), of_a.sine.data(),
                                            of_b.cosine.data(), of_b.sine.data(), 48, sum.data(),
                                            sum.data() + 48);
      if (first.empty()) first = sum;
      REQUIRE(same_bits(sum, first));
      for (std::size_t i = 0; i < 48; ++i) {
        const double angle = (a + b) * frequency[i];
        REQUIRE(std::fabs(static_cast<double>(sum[i]) - std::cos(angle)) <= 6e-8);
        REQUIRE(std::fabs(static_cast<double>(sum[48 + i]) - std::sin(angle)) <= 6e-8);
      }
    }
  }
}

TEST_CASE("rows are turned in any type, anywhere, with the same bits", "[simd][move]") {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const DType dtype : dtypes) {
    const std::size_t element = size_bytes(dtype);
    for (const u32 pairs : {1u, 3u, 7u, 8u, 15u, 16u, 17u, 33u, 64u, 70u}) {
      for (const u32 first : {0u, 5u}) {
        for (const u32 behind : {0u, 3u}) {
          for (const bool adjacent : {false, true}) {
            CAPTURE(name(dtype), pairs, first, behind, adjacent);
            simd::TurnedRow row;
            row.dtype = dtype;
            row.adjacent = adjacent;
            row.first = first;
            row.pairs = pairs;
            row.width = first + 2 * pairs + behind;
            std::vector<float> cosine(simd::padded_pairs(pairs), 9.0f);
            std::vector<float> sine(simd::padded_pairs(pairs), 9.0f);
            for (u32 i = 0; i < pairs; ++i) {
              const double angle = static_cast<double>(normal(random));
              cosine[i] = static_cast<float>(std::cos(angle));
              sine[i] = static_cast<float>(std::sin(angle));
            }
            const GuardedBytes source(row.width * element);
            const GuardedBytes away(row.width * element);
            for (u32 d = 0; d < row.width; ++d) {
              store_element(source.last() + d * element, dtype, normal(random));
            }
            std::vector<std::byte> before(source.last(), source.last() + row.width * element);
            // Against double, element by element.
            std::vector<double> exact(row.width);
            for (u32 d = 0; d < row.width; ++d) {
              exact[d] = static_cast<double>(load_element(before.data() + d * element, dtype));
            }
            for (u32 i = 0; i < pairs; ++i) {
              double& x = exact[first + (adjacent ? 2 * i : i)];
              double& y = exact[first + (adjacent ? 2 * i + 1 : pairs + i)];
              const double c = static_cast<double>(cosine[i]);
              const double s = static_cast<double>(sine[i]);
              const double turned = x * c - y * s;
              y = x * s + y * c;
              x = turned;
            }
            std::vector<std::byte> scalar;
            for (const simd::Target target : targets()) {
              std::memcpy(source.last(), before.data(), before.size());
              std::memset(away.last(), 0, before.size());
              const simd::MoveKernels& kernels = simd::move_kernels(target);
              kernels.turn(row, cosine.data(), sine.data(), source.last(), away.last());
              REQUIRE(std::memcmp(source.last(), before.data(), before.size()) == 0);
              std::vector<std::byte> result(away.last(), away.last() + before.size());
              kernels.turn(row, cosine.data(), sine.data(), source.last(), source.last());
              REQUIRE(std::memcmp(source.last(), result.data(), result.size()) == 0);
              if (scalar.empty()) scalar = result;
              REQUIRE(same_bits(result, scalar));
            }
            const double unit = dtype == DType::f32 ? 2e-7 : dtype == DType::f16 ? 5e-4 : 4e-3;
            for (u32 d = 0; d < row.width; ++d) {
              const double got =
                  static_cast<double>(load_element(scalar.data() + d * element, dtype));
              if (d < first || d >= first + 2 * pairs) {
                REQUIRE(std::memcmp(scalar.data() + d * element, before.data() + d * element,
                                    element) == 0);
              } else {
                REQUIRE(std::fabs(got - exact[d]) <= unit * std::fabs(exact[d]) + 1e-6);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("turning keeps what is not a number to its own pair", "[simd][move]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  simd::TurnedRow row;
  row.pairs = 20;
  row.width = 40;
  const std::vector<float> cosine(32, 0.6f);
  const std::vector<float> sine(32, 0.8f);
  for (const simd::Target target : targets()) {
    for (const bool adjacent : {false, true}) {
      CAPTURE(simd::name(target), adjacent);
      row.adjacent = adjacent;
      std::vector<float> values(40, 1.0f);
      values[adjacent ? 6 : 3] = std::numeric_limits<float>::quiet_NaN();
      values[adjacent ? 36 : 18] = infinity;
      simd::move_kernels(target).turn(row, cosine.data(), sine.data(), values.data(),
                                      values.data());
      for (u32 i = 0; i < 20; ++i) {
        const float x = values[adjacent ? 2 * i : i];
        const float y = values[adjacent ? 2 * i + 1 : 20 + i];
        CHECK(std::isnan(x) == (i == 3));
        CHECK(std::isnan(y) == (i == 3));
        CHECK((x == infinity && y == infinity) == (i == 18));
      }
    }
  }
}
