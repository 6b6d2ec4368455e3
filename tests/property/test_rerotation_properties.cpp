// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/layouts.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr double two_pi = 6.283185307179586;
constexpr RopeScaling scalings[] = {RopeScaling::none, RopeScaling::linear, RopeScaling::ntk,
                                    RopeScaling::yarn, RopeScaling::llama3};

// Rotation from scratch in double, written from the published formulas by wavelength and ramp.
struct Reference {
  RopeSpec rope;
  std::vector<double> frequency;
  u32 dims;

  Reference(const RopeSpec& spec, u32 width) : rope(spec) {
    dims = rope.rotary_dims == 0 ? width - rope.first_dim : rope.rotary_dims;
    const double d = dims;
    double theta = rope.theta;
    if (rope.scaling == RopeScaling::ntk) theta *= std::pow(rope.factor, d / (d - 2));
    const auto turns_pair = [&](double turns) {
      return d * std::log(rope.original_context / (turns * two_pi)) / (2 * std::log(rope.theta));
    };
    for (u32 i = 0; i < dims / 2; ++i) {
      double f = 1.0 / std::pow(theta, 2.0 * i / d);
      if (rope.frequency_factors != nullptr) f /= static_cast<double>(rope.frequency_factors[i]);
      if (rope.scaling == RopeScaling::linear) f /= rope.factor;
      if (rope.scaling == RopeScaling::yarn) {
        const double low = std::max(std::floor(turns_pair(rope.beta_fast)), 0.0);
        const double high = std::min(std::ceil(turns_pair(rope.beta_slow)), d - 1);
        double ramp = (i - low) / std::max(high - low, 0.001);
        ramp = std::min(std::max(ramp, 0.0), 1.0);
        f = f * (1 - ramp) + f / rope.factor * ramp;
      }
      if (rope.scaling == RopeScaling::llama3) {
        const double wavelength = two_pi / f;
        const double old = rope.original_context;
        const double smooth = (old / wavelength - rope.low_freq_factor) /
                              (rope.high_freq_factor - rope.low_freq_factor);
        const double scaled = (1 - smooth) * f / rope.factor + smooth * f;
        if (wavelength > old / rope.low_freq_factor) {
          f /= rope.factor;
        } else if (wavelength >= old / rope.high_freq_factor) {
          f = scaled;
        }
      }
      frequency.push_back(f);
    }
  }

  void rotate(std::vector<double>& row, double position, bool from_scratch = true) const {
    if (rope.pairing == RopePairing::none) return;
    for (u32 i = 0; i < dims / 2; ++i) {
      const bool norm = rope.pairing == RopePairing::norm;
      double& x = row[rope.first_dim + (norm ? 2 * i : i)];
      double& y = row[rope.first_dim + (norm ? 2 * i + 1 : i + dims / 2)];
      const double c = std::cos(position * frequency[i]);
      const double s = std::sin(position * frequency[i]);
      const double m = from_scratch ? rope.magnitude() : 1.0;
      const double turned = m * (x * c - y * s);
      y = m * (x * s + y * c);
      x = turned;
    }
  }
};

// A random spec for rows of `width` elements; `factors` is what it may point at.
RopeSpec random_rope(Random& random, u32 width, std::vector<float>& factors) {
  RopeSpec rope;
  rope.pairing = random.chance(50) ? RopePairing::norm : RopePairing::neox;
  rope.scaling = scalings[random.between(0, 4)];
  rope.theta = random.chance(50) ? 10000.0 : 500000.0;
  rope.factor = static_cast<double>(random.between(1, 32));
  rope.original_context = 1u << random.between(9, 13);
  rope.first_dim = random.chance(60) ? 0 : random.between(0, (width - 4) / 2);
  const u32 room = width - rope.first_dim;
  rope.rotary_dims = room % 2 == 0 && random.chance(40) ? 0 : 2 * random.between(2, room / 2);
  if (random.chance(20)) rope.attention_factor = static_cast<double>(random.real(0.5f, 1.5f));
  if (rope.scaling != RopeScaling::llama3 && random.chance(30)) {
    for (u32 i = 0; i < width / 2; ++i) factors.push_back(random.real(1.0f, 8.0f));
    rope.frequency_factors = factors.data();
  }
  return rope;
}

double largest(const std::vector<double>& row) {
  double most = 0.0;
  for (const double x : row) most = std::max(most, std::abs(x));
  return most;
}
double largest_difference(const std::vector<double>& a, const float* b) {
  double most = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::abs(a[i] - static_cast<double>(b[i])));
  }
  return most;
}

/// Relative error of a store: half a unit in the last place.
double unit(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// Unrotated keys of a head and where they stand; the cache holds them rotated, rounded once.
struct RotatedCache {
  TensorMemory keys;
  TensorMemory values;
  std::vector<i32> positions;
  std::vector<u32> lengths;
  std::vector<float> factors;
  RopeSpec rope;
  CacheView view;

  explicit RotatedCache(u32 seed) {
    Random random(seed);
    const u32 heads = random.between(1, 3);
    const u32 tokens = random.between(2, 24);
    const u32 width = random.between(4, 40);
    const auto tensor = [&](u32 w) {
      const auto layout =
          static_cast<Layout>(random.between(0, static_cast<u32>(Layout::count) - 1));
      const DType dtype = random.chance(50)   ? DType::f32
                          : random.chance(50) ? DType::f16
                                              : DType::bf16;
      return make_tensor(layout, dtype, heads, tokens, w, random.between(1, 5), random);
    };
    keys = tensor(width);
    values = tensor(random.between(1, 8));
    view.keys = keys.rows;
    view.values = values.rows;
    view.segments = heads;
    view.capacity = tokens;
    for (u32 s = 0; s < heads; ++s) {
      i32 position = static_cast<i32>(random.between(0, 3));
      lengths.push_back(random.between(1, tokens));
      for (u32 t = 0; t < tokens; ++t) {
        positions.push_back(position);
        position += static_cast<i32>(random.between(1, 500));
      }
    }
    view.lengths = lengths.data();
    if (random.chance(30)) {
      view.frozen = random.between(0, *std::min_element(lengths.begin(), lengths.end()));
    }
    view.positions = Ragged<i32>(positions.data(), tokens);
    view.next_position = 20000;
    rope = random_rope(random, width, factors);
    view.rope = &rope;
    view.rope_pairing = rope.pairing;
  }
};

std::vector<double> key_row(const Rows& rows, u32 s, u32 token) {
  std::vector<float> row(rows.width);
  load_row(rows, s, token, row.data());
  return {row.begin(), row.end()};
}

// Keeps a random part of a cache and blends some of the rest, with self weights.
PlanBuilder random_plan(const CacheView& cache, Random& random, bool blends) {
  PlanBuilder builder;
  for (u32 s = 0; s < cache.segments; ++s) {
    std::vector<u32> anchors(cache.frozen);
    std::iota(anchors.begin(), anchors.end(), 0u);
    const u32 rest = cache.length(s) - cache.frozen;
    for (const u32 t : random.subset(rest, random.between(0, rest))) {
      anchors.push_back(cache.frozen + t);
    }
    builder.add_segment(anchors);
  }
  if (!blends) return builder;
  builder.moves_keys = true;
  for (u32 s = 0; s < cache.segments; ++s) {
    const auto begin = builder.anchor.begin() + static_cast<std::ptrdiff_t>(builder.first[s]);
    const auto end = begin + static_cast<std::ptrdiff_t>(builder.length[s]);
    std::vector<u32> dropped;
    for (u32 t = 0; t < cache.length(s); ++t) {
      if (!std::binary_search(begin, end, t)) dropped.push_back(t);
    }
    for (u32 j = 0; j < builder.length[s]; ++j) {
      const bool folds = j >= cache.frozen && !dropped.empty() && random.chance(60);
      builder.self_weight.push_back(folds ? random.real(0.2f, 1.0f) : 1.0f);
      builder.term_begin.push_back(builder.term_token.size());
      for (u32 i = 0; folds && i < random.between(1, 3); ++i) {
        builder.term_token.push_back(
            dropped[random.between(0, static_cast<u32>(dropped.size()) - 1)]);
        builder.term_weight.push_back(random.real(-0.3f, 0.8f));
        builder.term_value_weight.push_back(random.real(-0.3f, 0.8f));
      }
      builder.term_end.push_back(builder.term_token.size());
    }
  }
  return builder;
}

// The slot's key in double by the plan's definition, and the weight of rounding in it.
std::vector<double> reference_key(const CompressionPlan& plan, const CacheView& cache,
                                  const Reference& reference, u32 s, u32 j, double& scale) {
  const u64 slot = plan.first[s] + j;
  const i32 at =
      plan.position != nullptr ? plan.position[slot] : cache.position(s, plan.anchor[slot]);
  const bool aligned = (plan.needs & needs_aligned_terms) != 0;
  const bool blends = (plan.needs & needs_moved_keys) != 0;
  const i32 anchor_at = cache.position(s, plan.anchor[slot]);
  std::vector<double> sum = key_row(cache.keys, s, plan.anchor[slot]);
  reference.rotate(sum, at - anchor_at, false);
  const double self = blends ? static_cast<double>(plan.key_self_weight(slot)) : 1.0;
  scale = largest(sum) * std::abs(self);
  for (double& x : sum) x *= self;
  if (!blends || !plan.has_terms()) return sum;
  for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
    const u32 token = plan.term_token[term];
    std::vector<double> row = key_row(cache.keys, s, token);
    reference.rotate(row, at - (aligned ? cache.position(s, token) : anchor_at), false);
    const double weight = static_cast<double>(plan.term_weight[term]);
    for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += weight * row[d];
    scale += largest(row) * std::abs(weight);
  }
  return sum;
}

bool same_bits(const Rows& a, const Rows& b, u32 s, u32 token) {
  std::vector<float> left(a.width);
  std::vector<float> right(b.width);
  load_row(a, s, token, left.data());
  load_row(b, s, token, right.data());
  return std::memcmp(left.data(), right.data(), a.width * sizeof(float)) == 0;
}

RopeSpec common_rope(RopePairing pairing, RopeScaling scaling) {
  RopeSpec rope;
  rope.pairing = pairing;
  rope.scaling = scaling;
  rope.theta = 500000.0;
  rope.factor = scaling == RopeScaling::none ? 1.0 : 8.0;
  rope.original_context = 8192;
  return rope;
}

}  // namespace

TEST_CASE("re-rotating equals rotating from scratch at the new position", "[rope]") {
  Random random(1);
  double worst[3] = {};
  for (const RopePairing pairing : {RopePairing::norm, RopePairing::neox}) {
    for (const RopeScaling scaling : scalings) {
      for (const u32 rotary : {0u, 2u * 16, 2u * 5}) {
        for (const u32 first : {0u, 7u}) {
          for (const bool with_factors : {false, true}) {
            const u32 width = rotary == 0 ? first + 64 : 80;
            RopeSpec rope = common_rope(pairing, scaling);
            rope.rotary_dims = rotary;
            rope.first_dim = first;
            std::vector<float> factors;
            if (with_factors && scaling != RopeScaling::llama3) {
              for (u32 i = 0; i < 32; ++i) factors.push_back(random.real(1.0f, 6.0f));
              rope.frequency_factors = factors.data();
            }
            CAPTURE(static_cast<u32>(pairing), static_cast<u32>(scaling), rotary, first);
            const Reference reference(rope, width);
            RopeRotation rotation;
            REQUIRE(rotation.prepare(rope, width));
            RopeTurn turn;
            for (u32 round = 0; round < 12; ++round) {
              const i32 from = static_cast<i32>(random.between(0, 131072));
              const i32 to = round == 0   ? from
                             : round == 1 ? 0
                                          : static_cast<i32>(random.between(0, 131072));
              std::vector<double> raw(width);
              for (double& x : raw) x = static_cast<double>(random.real(-2.0f, 2.0f));
              std::vector<double> old = raw;
              reference.rotate(old, from);
              std::vector<double> expected = raw;
              reference.rotate(expected, to);
              const double size = largest(expected);

              std::vector<float> scratch(raw.begin(), raw.end());
              rotation.turn_from_scratch(to, turn);
              rotation.rotate(turn, scratch.data());
              CHECK(largest_difference(expected, scratch.data()) <= 1e-6 * size);

              rotation.turn_by(i64{to} - i64{from}, turn);
              for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
                std::vector<std::byte> bytes(width * 4);
                Rows rows;
                rows.data = bytes.data();
                rows.dtype = dtype;
                rows.writable = true;
                rows.width = width;
                rows.heads = 1;
                rows.tokens = 1;
                std::vector<float> row(old.begin(), old.end());
                store_row(rows, 0, 0, row.data());
                load_row(rows, 0, 0, row.data());
                rotation.rotate(turn, row.data());
                store_row(rows, 0, 0, row.data());
                load_row(rows, 0, 0, row.data());
                const double error = largest_difference(expected, row.data()) / size;
                double& most = worst[static_cast<u32>(dtype)];
                most = std::max(most, error);
              }
            }
          }
        }
      }
    }
  }
  // Of a row's largest element. 16 bits: one rounding before the move and one after it, each at
  // most a unit times sqrt(2) of a pair's norm. Measured: 1.5e-7, 8.5e-4, 6.9e-3.
  CHECK(worst[static_cast<u32>(DType::f32)] <= 3e-7);
  CHECK(worst[static_cast<u32>(DType::f16)] <= 3 * unit(DType::f16));
  CHECK(worst[static_cast<u32>(DType::bf16)] <= 3 * unit(DType::bf16));
}

TEST_CASE("turns compose: a then b is a + b, and back again is nothing", "[rope]") {
  for (u32 seed = 0; seed < 300; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    std::vector<float> factors;
    const u32 width = random.between(4, 70);
    const RopeSpec rope = random_rope(random, width, factors);
    RopeRotation rotation;
    REQUIRE(rotation.prepare(rope, width));
    const auto turn = [&](std::vector<float>& row, i64 shift) {
      RopeTurn by;
      rotation.turn_by(shift, by);
      rotation.rotate(by, row.data());
    };
    const i64 a = i64{random.between(0, 200000)} - 100000;
    const i64 b = i64{random.between(0, 200000)} - 100000;
    std::vector<float> start(width);
    for (float& x : start) x = random.real(-2.0f, 2.0f);
    std::vector<float> twice = start;
    turn(twice, a);
    turn(twice, b);
    std::vector<float> once = start;
    turn(once, a + b);
    REQUIRE(largest_difference({once.begin(), once.end()}, twice.data()) <= 2e-6);
    turn(twice, -a - b);
    REQUIRE(largest_difference({start.begin(), start.end()}, twice.data()) <= 3e-6);
    std::vector<float> still = start;
    turn(still, 0);
    REQUIRE(still == start);
  }
}

TEST_CASE("moved plans: in place, out of place and a double reference agree", "[rope][apply]") {
  u32 kinds[4] = {};
  for (u32 seed = 0; seed < 1500; ++seed) {
    CAPTURE(seed);
    const RotatedCache source(seed);
    Random random(seed + 5000000);
    const u32 kind = random.between(0, 3);
    ++kinds[kind];
    PlanBuilder builder = random_plan(source.view, random, kind >= 1);
    const bool aligned = kind >= 2;
    const bool moves = kind != 3;
    if (moves && !builder.anchor.empty()) {
      for (u32 s = 0; s < source.view.segments; ++s) {
        i32 position = -1;
        for (u32 j = 0; j < builder.length[s]; ++j) {
          const i32 old = source.view.position(s, builder.anchor[builder.first[s] + j]);
          // Mostly renumbered, some slots where they were.
          const bool stays = j < source.view.frozen || (old > position && random.chance(20));
          position = stays ? old : position + static_cast<i32>(random.between(1, 2));
          builder.position.push_back(position);
        }
      }
    }
    CompressionPlan plan = builder.plan();
    if (aligned) plan.needs |= needs_aligned_terms;
    if (random.chance(50)) plan.next_position = 30000;
    REQUIRE(validate_plan(plan, source.view) == Status());

    RaggedKVCache destination;
    REQUIRE(destination.allocate(ragged_shape(plan, source.view)));
    REQUIRE(apply(plan, source.view, destination) == Status());
    const CacheView result = destination.view();
    REQUIRE(result.next_position == (plan.next_position < 0 ? 20000 : 30000));

    const Reference reference(source.rope, source.view.keys.width);
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u32 j = 0; j < plan.length[s]; ++j) {
        double scale = 0.0;
        const auto expected = reference_key(plan, source.view, reference, s, j, scale);
        std::vector<float> row(expected.size());
        load_row(result.keys, s, j, row.data());
        const double allowed = scale * 4e-6 + largest(expected) * unit(result.keys.dtype);
        REQUIRE(largest_difference(expected, row.data()) <= allowed);
      }
    }

    RotatedCache changed(seed);
    REQUIRE(apply(plan, changed.view, in_place) == Status());
    REQUIRE(changed.view.next_position == result.next_position);
    u64 wrong = 0;
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u32 j = 0; j < plan.length[s]; ++j) {
        wrong += same_bits(changed.view.keys, result.keys, s, j) ? 0u : 1u;
        wrong += same_bits(changed.view.values, result.values, s, j) ? 0u : 1u;
        wrong += changed.view.position(s, j) == result.position(s, j) ? 0u : 1u;
        if (j < source.view.frozen) {
          wrong += same_bits(changed.view.keys, source.view.keys, s, j) ? 0u : 1u;
        }
      }
    }
    REQUIRE(wrong == 0);
  }
  for (const u32 count : kinds) CHECK(count > 100);
}

TEST_CASE("merging and renumbering commute", "[rope][renumber]") {
  for (u32 seed = 0; seed < 300; ++seed) {
    CAPTURE(seed);
    RotatedCache source(seed);
    if (source.view.keys.dtype != DType::f32) continue;
    Random random(seed + 9000000);
    PlanBuilder builder = random_plan(source.view, random, true);
    CompressionPlan plan = builder.plan();
    if (random.chance(50)) plan.needs |= needs_aligned_terms;

    RaggedKVCache merged;
    REQUIRE(merged.allocate(ragged_shape(plan, source.view)));
    REQUIRE(apply(plan, source.view, merged));
    CacheView first = merged.view();
    first.rope = &source.rope;
    first.frozen = source.view.frozen;
    PlanBuilder all;
    for (u32 s = 0; s < plan.segments; ++s) {
      std::vector<u32> every(plan.length[s]);
      std::iota(every.begin(), every.end(), 0u);
      all.add_segment(every);
    }
    Workspace workspace;
    CompressionPlan later = all.plan();
    REQUIRE(renumber(later, first, workspace, {.sinks = 2}));
    REQUIRE(apply(later, first, in_place));

    REQUIRE(renumber(plan, source.view, workspace, {.sinks = 2}));
    REQUIRE(apply(plan, source.view, in_place));
    REQUIRE(first.next_position == source.view.next_position);
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u32 j = 0; j < plan.length[s]; ++j) {
        REQUIRE(first.position(s, j) == source.view.position(s, j));
        const auto one = key_row(source.view.keys, s, j);
        std::vector<float> two(one.size());
        load_row(first.keys, s, j, two.data());
        REQUIRE(largest_difference(one, two.data()) <= 2e-5);
      }
    }
  }
}

TEST_CASE("attention sees only distances: keys and queries may move together", "[rope]") {
  for (const RopePairing pairing : {RopePairing::norm, RopePairing::neox}) {
    for (const RopeScaling scaling : scalings) {
      const u32 width = 32;
      const u32 tokens = 40;
      const u32 heads = 2;
      const RopeSpec rope = common_rope(pairing, scaling);
      const Reference reference(rope, width);
      Random random(7);
      std::vector<float> keys(heads * tokens * width);
      std::vector<float> values(heads * tokens * width);
      std::vector<float> query(heads * width);
      std::vector<i32> positions(tokens);
      const auto fill = [&](std::vector<float>& rows, const auto& position) {
        for (std::size_t r = 0; r < rows.size() / width; ++r) {
          std::vector<double> row(width);
          for (double& x : row) x = static_cast<double>(random.real(-1.0f, 1.0f));
          reference.rotate(row, position(r));
          for (u32 d = 0; d < width; ++d) rows[r * width + d] = static_cast<float>(row[d]);
        }
      };
      for (u32 t = 0; t < tokens; ++t) positions[t] = 100000 + static_cast<i32>(t);
      fill(keys, [&](std::size_t r) { return positions[r % tokens]; });
      fill(values, [](std::size_t) { return 0; });
      fill(query, [](std::size_t) { return 100000.0 + tokens; });
      KVCache cache(strided(keys.data(), Extents{heads, tokens, width}),
                    strided(values.data(), Extents{heads, tokens, width}));
      cache.set_positions(Ragged<i32>(positions.data(), u64{0}), 100000 + tokens).set_rope(&rope);
      const auto attend_rows = [&] {
        std::vector<double> output;
        for (u32 h = 0; h < heads; ++h) {
          std::vector<double> weight(tokens);
          double sum = 0.0;
          for (u32 t = 0; t < tokens; ++t) {
            double dot = 0.0;
            for (u32 d = 0; d < width; ++d) {
              dot += static_cast<double>(query[h * width + d]) *
                     static_cast<double>(keys[(h * tokens + t) * width + d]);
            }
            sum += weight[t] = std::exp(dot);
          }
          for (u32 d = 0; d < width; ++d) {
            double x = 0.0;
            for (u32 t = 0; t < tokens; ++t) {
              x += weight[t] / sum * static_cast<double>(values[(h * tokens + t) * width + d]);
            }
            output.push_back(x);
          }
        }
        return output;
      };
      const auto before = attend_rows();

      PlanBuilder builder;
      std::vector<u32> every(tokens);
      std::iota(every.begin(), every.end(), 0u);
      for (u32 s = 0; s < heads; ++s) builder.add_segment(every);
      CompressionPlan plan = builder.plan();
      Workspace workspace;
      REQUIRE(renumber(plan, cache, workspace));
      const i64 shift = query_shift(plan, cache);
      REQUIRE(shift == -100000);
      REQUIRE(apply(plan, cache, in_place));
      REQUIRE(rotate_rows(strided(query.data(), Extents{heads, 1, width}), 1, rope, shift));
      const auto after = attend_rows();
      for (std::size_t i = 0; i < before.size(); ++i) {
        REQUIRE(after[i] == Approx(before[i]).margin(2e-5));
      }
      CHECK(positions[0] == 0);
      // Only keys moved would be something else.
      REQUIRE(rotate_rows(strided(query.data(), Extents{heads, 1, width}), 1, rope, -shift));
      const auto apart = attend_rows();
      double difference = 0.0;
      for (std::size_t i = 0; i < before.size(); ++i) {
        difference = std::max(difference, std::abs(apart[i] - before[i]));
      }
      CHECK(difference > 1e-3);
    }
  }
}

TEST_CASE("a thousand moves drift as far as stated", "[rope]") {
  // A stream that evicts and renumbers at every step: each row is turned a thousand times.
  const u32 width = 128;
  const u32 steps = 1000;
  for (const RopePairing pairing : {RopePairing::norm, RopePairing::neox}) {
    const RopeSpec rope = common_rope(pairing, RopeScaling::llama3);
    const Reference reference(rope, width);
    RopeRotation rotation;
    REQUIRE(rotation.prepare(rope, width));
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const i64 shift : {i64{-1}, i64{-16}}) {
        const u32 tokens = 8;
        Random random(3);
        TensorMemory memory = make_tensor(Layout::contiguous, dtype, 1, tokens, width, 1, random);
        std::vector<std::vector<double>> expected;
        for (u32 t = 0; t < tokens; ++t) {
          expected.push_back(key_row(memory.rows, 0, t));
          reference.rotate(expected.back(), static_cast<double>(shift * steps), false);
        }
        for (u32 i = 0; i < steps; ++i) REQUIRE(rotate_rows(memory.rows, tokens, rope, shift));
        double error = 0.0;
        double norm = 0.0;
        for (u32 t = 0; t < tokens; ++t) {
          const auto row = key_row(memory.rows, 0, t);
          for (u32 d = 0; d < width; ++d) {
            error += (row[d] - expected[t][d]) * (row[d] - expected[t][d]);
            norm += expected[t][d] * expected[t][d];
          }
        }
        const double relative = std::sqrt(error / norm);
        CAPTURE(static_cast<u32>(dtype), shift, relative);
        // What RopeRotation states, and that 16 bits do drift: else the advice there is void.
        CHECK(relative < (dtype == DType::f32 ? 3e-5 : dtype == DType::f16 ? 0.08 : 0.5));
        CHECK(relative > (dtype == DType::f32 ? 0.0 : 0.01));
      }
    }
  }
}
