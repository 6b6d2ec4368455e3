// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr double pi = 3.14159265358979323846;

std::vector<double> frequencies(const RopeSpec& rope, u32 width) {
  REQUIRE(rope.check(width));
  std::vector<double> result(rope.dims(width) / 2);
  rope_frequencies(rope, width, result.data());
  return result;
}

// Llama 3.1 8B.
RopeSpec llama31() {
  RopeSpec rope;
  rope.scaling = RopeScaling::llama3;
  rope.theta = 500000.0;
  rope.factor = 8.0;
  rope.original_context = 8192;
  rope.low_freq_factor = 1.0;
  rope.high_freq_factor = 4.0;
  return rope;
}

RopeSpec yarn() {
  RopeSpec rope;
  rope.scaling = RopeScaling::yarn;
  rope.theta = 10000.0;
  rope.factor = 16.0;
  rope.original_context = 4096;
  return rope;
}

// One layer of one head whose key t is row t of `keys` [tokens][width]; V is one column, t.
struct Layer {
  std::size_t tokens;
  std::size_t width;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<i32> positions;

  Layer(std::size_t heads, std::size_t n, std::size_t w)
      : tokens(n), width(w), keys(heads * n * w), values(heads * n), positions(heads * n) {
    for (std::size_t i = 0; i < keys.size(); ++i) {
      keys[i] = std::sin(static_cast<float>(i) * 0.7f) * 2.0f;
    }
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(i);
      positions[i] = static_cast<i32>(i % n);
    }
  }
  [[nodiscard]] KVCache<Strided<float>> cache(const RopeSpec* rope) {
    const std::size_t heads = values.size() / tokens;
    KVCache cache(strided(keys.data(), Extents{heads, tokens, width}),
                  strided(values.data(), Extents{heads, tokens, 1}));
    cache.set_rope(rope);
    return cache;
  }
  [[nodiscard]] const float* key(std::size_t head, std::size_t token) const {
    return keys.data() + (head * tokens + token) * width;
  }
  bool operator==(const Layer&) const = default;
};

std::vector<float> turned(const RopeSpec& rope, const float* row, std::size_t width, i64 shift) {
  RopeRotation rotation;
  REQUIRE(rotation.prepare(rope, static_cast<u32>(width)));
  RopeTurn turn;
  rotation.turn_by(shift, turn);
  std::vector<float> result(row, row + width);
  rotation.rotate(turn, result.data());
  return result;
}

bool same_row(const std::vector<float>& a, const float* b) {
  return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("frequencies without scaling are powers of theta", "[rope]") {
  RopeSpec rope;
  const auto f = frequencies(rope, 8);
  REQUIRE(f.size() == 4);
  CHECK(f[0] == 1.0);
  CHECK(f[1] == Approx(0.1).epsilon(1e-14));
  CHECK(f[2] == Approx(0.01).epsilon(1e-14));
  CHECK(f[3] == Approx(0.001).epsilon(1e-14));
  rope.rotary_dims = 4;  // the exponent counts rotated dimensions, not the row
  rope.first_dim = 2;
  CHECK(frequencies(rope, 8)[1] == Approx(0.01).epsilon(1e-14));
  const float factors[] = {1.0f, 4.0f};
  rope.frequency_factors = factors;
  CHECK(frequencies(rope, 8)[1] == Approx(0.0025).epsilon(1e-14));
}

TEST_CASE("linear divides, NTK changes the base", "[rope]") {
  RopeSpec rope;
  const auto plain = frequencies(rope, 128);
  rope.scaling = RopeScaling::linear;
  rope.factor = 4.0;
  const auto linear = frequencies(rope, 128);
  rope.scaling = RopeScaling::ntk;
  const auto ntk = frequencies(rope, 128);
  for (std::size_t i = 0; i < 64; ++i) CHECK(linear[i] == Approx(plain[i] / 4.0).epsilon(1e-14));
  // The fastest pair stays, the slowest is stretched by just the factor.
  CHECK(ntk[0] == 1.0);
  CHECK(ntk[63] == Approx(plain[63] / 4.0).epsilon(1e-12));
  CHECK(ntk[1] == Approx(std::pow(10000.0 * std::pow(4.0, 128.0 / 126.0), -2.0 / 128.0)));
}

TEST_CASE("Llama 3 scaling goes by wavelength", "[rope]") {
  const RopeSpec rope = llama31();
  RopeSpec unscaled;
  unscaled.theta = rope.theta;
  const auto plain = frequencies(unscaled, 128);
  const auto f = frequencies(rope, 128);
  u32 kept = 0;
  u32 stretched = 0;
  for (std::size_t i = 0; i < 64; ++i) {
    const double wavelength = 2.0 * pi / plain[i];
    if (wavelength < 8192.0 / 4.0) {
      CHECK(f[i] == plain[i]);
      ++kept;
    } else if (wavelength > 8192.0 / 1.0) {
      CHECK(f[i] == Approx(plain[i] / 8.0).epsilon(1e-14));
      ++stretched;
    } else {
      const double smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
      CHECK(f[i] == Approx((1.0 - smooth) * plain[i] / 8.0 + smooth * plain[i]).epsilon(1e-13));
    }
  }
  // Counted by hand: 128 ln(8192 / (2 pi turns)) / (2 ln 500000) is 28.2 and 34.98.
  CHECK(kept == 29);
  CHECK(stretched == 29);
  CHECK(rope.magnitude() == 1.0);
}

TEST_CASE("YaRN's ramp keeps fast pairs and stretches slow ones", "[rope]") {
  RopeSpec rope = yarn();
  const auto plain = frequencies(RopeSpec{}, 128);
  const auto f = frequencies(rope, 128);
  // 128 ln(4096 / (2 pi beta)) / (2 ln 10000) is 20.9 for beta 32 and 45.03 for beta 1.
  CHECK(f[20] == plain[20]);
  CHECK(f[46] == Approx(plain[46] / 16.0).epsilon(1e-14));
  for (std::size_t i = 20; i <= 46; ++i) {
    const double keep = 1.0 - (static_cast<double>(i) - 20.0) / 26.0;
    CHECK(f[i] == Approx(plain[i] * keep + plain[i] / 16.0 * (1.0 - keep)).epsilon(1e-13));
  }
  CHECK(rope.magnitude() == Approx(0.1 * std::log(16.0) + 1.0).epsilon(1e-14));

  SECTION("the ramp may begin and end between pairs") {
    rope.whole_ramp_pairs = false;
    const auto exact = frequencies(rope, 128);
    const double low = 128.0 * std::log(4096.0 / (32.0 * 2.0 * pi)) / (2.0 * std::log(10000.0));
    const double high = 128.0 * std::log(4096.0 / (2.0 * pi)) / (2.0 * std::log(10000.0));
    const double keep = 1.0 - (30.0 - low) / (high - low);
    CHECK(exact[30] == Approx(plain[30] * keep + plain[30] / 16.0 * (1.0 - keep)).epsilon(1e-12));
    CHECK(exact[30] != f[30]);
  }
  SECTION("without extrapolation it is linear") {
    rope.extrapolation = 0.0;
    const auto linear = frequencies(rope, 128);
    for (std::size_t i = 0; i < 64; ++i) {
      CHECK(linear[i] == Approx(plain[i] / 16.0).epsilon(1e-14));
    }
  }
  SECTION("a magnitude may be given, with any scaling") {
    rope.attention_factor = 1.5;
    CHECK(rope.magnitude() == 1.5);
    rope.scaling = RopeScaling::none;
    CHECK(rope.magnitude() == 1.5);
  }
}

TEST_CASE("a spec that cannot be is refused", "[rope]") {
  RopeSpec rope;
  const auto bad = [&rope](u32 width = 16) {
    return rope.check(width) == StatusCode::invalid_rope;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(rope.check(16));
  CHECK(rope.check(max_row_width + 1) == StatusCode::row_too_wide);
  CHECK(bad(15));
  rope.rotary_dims = 18;
  CHECK(bad());
  rope.rotary_dims = 8;
  rope.first_dim = 9;
  CHECK(bad());
  rope.first_dim = 8;
  CHECK(rope.check(16));
  rope.first_dim = 16;
  CHECK(bad());
  rope.first_dim = 0xffffffffu;
  CHECK(bad());
  rope = {};
  for (const double theta : {0.0, -1.0, nan, infinity}) {
    rope.theta = theta;
    CHECK(bad());
  }
  rope = {};
  for (const double magnitude : {-1.0, nan, infinity}) {
    rope.attention_factor = magnitude;
    CHECK(bad());
  }
  for (const RopeScaling scaling :
       {RopeScaling::linear, RopeScaling::ntk, RopeScaling::yarn, RopeScaling::llama3}) {
    rope = llama31();
    rope.scaling = scaling;
    CHECK(rope.check(16));
    for (const double factor : {0.5, nan, infinity}) {
      rope.factor = factor;
      CHECK(bad());
    }
  }
  rope = {};
  rope.scaling = RopeScaling::ntk;
  CHECK(rope.check(4));
  CHECK(bad(2));
  rope = yarn();
  rope.original_context = 0;
  CHECK(bad());
  rope = yarn();
  rope.theta = 1.0;
  CHECK(bad());
  rope = yarn();
  rope.beta_fast = 0.5;
  CHECK(bad());
  rope = yarn();
  rope.beta_slow = 0.0;
  CHECK(bad());
  for (const double extrapolation : {-0.1, 1.1, nan}) {
    rope = yarn();
    rope.extrapolation = extrapolation;
    CHECK(bad());
  }
  rope = llama31();
  rope.original_context = 0;
  CHECK(bad());
  rope = llama31();
  rope.high_freq_factor = 1.0;
  CHECK(bad());
  rope = llama31();
  rope.low_freq_factor = 0.0;
  CHECK(bad());
  float factors[] = {1.0f, 2.0f};
  rope = llama31();
  rope.frequency_factors = factors;
  CHECK(bad(4));
  rope.scaling = RopeScaling::none;
  CHECK(rope.check(4));
  for (const float factor : {0.0f, -1.0f, std::numeric_limits<float>::infinity()}) {
    factors[1] = factor;
    CHECK(bad(4));
  }
  rope = {};
  rope.scaling = static_cast<RopeScaling>(9);
  CHECK(bad());
  rope.pairing = static_cast<RopePairing>(9);
  CHECK(bad());
  rope = {};
  rope.pairing = RopePairing::none;
  rope.theta = nan;  // says nothing then
  CHECK(rope.check(15));
  CHECK(rope.dims(15) == 0);
}

TEST_CASE("pairings turn the pairs they name and nothing else", "[rope]") {
  RopeSpec rope;
  rope.theta = 4.0;  // frequencies 1 and 1 / 2
  rope.first_dim = 1;
  rope.rotary_dims = 4;
  const float row[] = {9.0f, 1.0f, 2.0f, 3.0f, 4.0f, 7.0f};
  const auto expect = [&](i64 shift, std::size_t a, std::size_t b, double frequency) {
    const auto result = turned(rope, row, 6, shift);
    const double angle = static_cast<double>(shift) * frequency;
    const double x = static_cast<double>(row[a]);
    const double y = static_cast<double>(row[b]);
    CHECK(result[a] == Approx(x * std::cos(angle) - y * std::sin(angle)).margin(1e-6));
    CHECK(result[b] == Approx(x * std::sin(angle) + y * std::cos(angle)).margin(1e-6));
    CHECK((result[0] == 9.0f && result[5] == 7.0f));
  };
  for (const i64 shift : {i64{3}, i64{-5}}) {
    rope.pairing = RopePairing::neox;
    expect(shift, 1, 3, 1.0);
    expect(shift, 2, 4, 0.5);
    rope.pairing = RopePairing::norm;
    expect(shift, 1, 2, 1.0);
    expect(shift, 3, 4, 0.5);
  }
  rope.pairing = RopePairing::none;
  CHECK(same_row(turned(rope, row, 6, 3), row));
  RopeRotation nothing;
  CHECK(nothing.pairs() == 0);
}

TEST_CASE("a magnitude counts from scratch only", "[rope]") {
  RopeSpec rope = yarn();
  RopeRotation rotation;
  REQUIRE(rotation.prepare(rope, 2));
  RopeTurn turn;
  float row[] = {3.0f, 4.0f};
  rotation.turn_from_scratch(7, turn);
  rotation.rotate(turn, row);
  const double norm = 5.0 * (0.1 * std::log(16.0) + 1.0);
  CHECK(std::hypot(static_cast<double>(row[0]), static_cast<double>(row[1])) == Approx(norm));
  rotation.turn_by(100, turn);
  rotation.rotate(turn, row);
  CHECK(std::hypot(static_cast<double>(row[0]), static_cast<double>(row[1])) == Approx(norm));
  rope.theta = -1.0;
  CHECK(rotation.prepare(rope, 2) == StatusCode::invalid_rope);
  CHECK(rotation.pairs() == 1);
}

TEST_CASE("new positions turn keys when the rotation is known, and only then", "[rope][apply]") {
  RopeSpec rope;
  Layer layer(1, 6, 4);
  const Layer before = layer;
  PlanBuilder builder{{0, 2, 3, 5}};
  builder.position = {0, 1, 2, 3};
  CompressionPlan plan = builder.plan();
  plan.next_position = 4;

  SECTION("known; without a positions array, because the indices are the positions") {
    auto cache = layer.cache(&rope);
    REQUIRE(apply(plan, cache, in_place));
    CHECK(same_row(turned(rope, before.key(0, 0), 4, 0), layer.key(0, 0)));
    CHECK(same_row(turned(rope, before.key(0, 2), 4, -1), layer.key(0, 1)));
    CHECK(same_row(turned(rope, before.key(0, 3), 4, -1), layer.key(0, 2)));
    CHECK(same_row(turned(rope, before.key(0, 5), 4, -2), layer.key(0, 3)));
    CHECK(layer.values[3] == 5.0f);
    CHECK(cache.length() == 4);
    CHECK(cache.view().next_position == 4);
  }
  SECTION("not known") {
    auto cache = layer.cache(nullptr);
    cache.set_positions(Ragged<i32>(layer.positions.data(), u64{6}), 6);
    REQUIRE(apply(plan, cache, in_place));
    CHECK(same_row(turned(rope, before.key(0, 5), 4, 0), layer.key(0, 3)));
    CHECK(cache.view().position(0, 3) == 3);
    CHECK(cache.view().next_position == 4);
  }
  SECTION("known to be none") {
    rope.pairing = RopePairing::none;
    auto cache = layer.cache(&rope);
    REQUIRE(apply(plan, cache, in_place));
    CHECK(same_row(turned(rope, before.key(0, 5), 4, 0), layer.key(0, 3)));
  }
  SECTION("into a ragged cache, which takes over the next position") {
    const auto cache = layer.cache(&rope);
    RaggedKVCache out;
    REQUIRE(out.allocate(ragged_shape(plan, cache)));
    REQUIRE(apply(plan, cache, out));
    float row[4];
    load_row(out.view().keys, 0, 3, row);
    CHECK(same_row(turned(rope, before.key(0, 5), 4, -2), row));
    CHECK(out.view().position(0, 3) == 3);
    CHECK(out.view().next_position == 4);
    CHECK(out.view().rope == &rope);
    CHECK(out.view().rope_pairing == RopePairing::neox);
    CHECK(layer == before);
    PlanBuilder again{{1, 3}};
    CompressionPlan next = again.plan();
    next.next_position = 9;
    REQUIRE(apply(next, out, in_place));
    CHECK(out.view().next_position == 9);
  }
}

TEST_CASE("whole pages stay and their keys turn", "[rope][apply]") {
  RopeSpec rope;
  Layer layer(1, 6, 4);
  const Layer before = layer;
  std::vector<i32> table{2, 0, 1};  // tokens 0, 1 in rows 4, 5 and so on
  const auto keys = paged(layer.keys.data(), {1, 6, 4}, {0, 4, 1}, 8, 2, table);
  const auto values = paged(layer.values.data(), {1, 6, 1}, {0, 1, 1}, 2, 2, table);
  KVCache cache(keys, values);
  cache.set_rope(&rope);
  PlanBuilder builder{{0, 1, 4, 5}};
  builder.position = {0, 1, 2, 3};
  builder.page_tokens = 2;
  CompressionPlan plan = builder.plan();
  plan.next_position = 4;
  std::size_t kept = 0;
  REQUIRE(apply_to_page_table(plan, cache, table, kept));
  CHECK(kept == 2);
  CHECK((table == std::vector<i32>{2, 1, 0}));
  CHECK(cache.length() == 4);
  CHECK(cache.view().next_position == 4);
  CHECK(same_row(turned(rope, before.key(0, 4), 4, 0), layer.key(0, 4)));
  CHECK(same_row(turned(rope, before.key(0, 2), 4, -2), layer.key(0, 2)));
  CHECK(same_row(turned(rope, before.key(0, 3), 4, -2), layer.key(0, 3)));
}

TEST_CASE("turned keys of a latent cache leave its values alone", "[rope][apply]") {
  RopeSpec rope;
  rope.first_dim = 4;  // values are columns 0 to 3
  Layer layer(1, 5, 6);
  const Layer before = layer;
  KVCache cache(strided(layer.keys.data(), Extents{1, 5, 6}),
                strided(layer.keys.data(), Extents{1, 5, 4}, {30, 6, 1}));
  cache.set_rope(&rope);
  PlanBuilder builder{{1, 2, 4}};
  builder.position = {0, 1, 2};
  REQUIRE(apply(builder.plan(), cache, in_place));
  CHECK(same_row(turned(rope, before.key(0, 1), 6, -1), layer.key(0, 0)));
  CHECK(same_row(turned(rope, before.key(0, 4), 6, -2), layer.key(0, 2)));
  CHECK(std::memcmp(before.key(0, 4), layer.key(0, 2), 4 * sizeof(float)) == 0);
}

TEST_CASE("literal keys are taken to stand at their slots", "[rope][apply]") {
  RopeSpec rope;
  Layer layer(1, 4, 4);
  auto cache = layer.cache(&rope);
  std::vector<float> fitted(8, 0.5f);
  PlanBuilder builder{{1, 3}};
  builder.position = {0, 1};
  builder.literal_keys = strided(fitted.data(), Extents{1, 2, 4}).rows();
  REQUIRE(apply(builder.plan(), cache, in_place));
  for (std::size_t i = 0; i < 8; ++i) CHECK(layer.keys[i] == 0.5f);
}

TEST_CASE("a turn that cannot be leaves everything as it was", "[rope][apply]") {
  RopeSpec rope;
  Layer layer(1, 6, 4);
  const Layer before = layer;
  auto cache = layer.cache(&rope);
  cache.set_positions(Ragged<i32>(layer.positions.data(), u64{6}), 6);
  PlanBuilder builder{{0, 2, 3, 5}};
  builder.position = {0, 1, 2, 3};
  CompressionPlan plan = builder.plan();
  plan.next_position = 4;
  CacheView view = cache.view();
  StatusCode expected = StatusCode::ok;
  SECTION("bad spec") {
    rope.theta = 0.0;
    expected = StatusCode::invalid_rope;
  }
  SECTION("a spec of another width") {
    rope.rotary_dims = 6;
    expected = StatusCode::invalid_rope;
  }
  SECTION("a pairing that contradicts the spec") {
    view.rope_pairing = RopePairing::norm;
    expected = StatusCode::invalid_rope;
  }
  SECTION("aligned terms without a rotation") {
    plan.needs |= needs_aligned_terms;
    view.rope = nullptr;
    expected = StatusCode::needs_rope;
  }
  SECTION("a frozen token is given another position") {
    view.frozen = 2;  // token 1 is dropped
    expected = StatusCode::frozen_token_changed;
  }
  SECTION("a frozen token is given another position, its row being the same") {
    view.frozen = 1;
    builder.position[0] = -1;
    expected = StatusCode::frozen_token_changed;
  }
  SECTION("positions do not ascend") {
    builder.position[2] = 1;
    expected = StatusCode::invalid_plan;
  }
  SECTION("the next position is taken") {
    plan.next_position = 3;
    expected = StatusCode::invalid_plan;
  }
  SECTION("read-only keys") {
    view.keys.writable = false;
    expected = StatusCode::read_only;
  }
  SECTION("no place for the positions") {
    view.positions = {};
    builder.position = {0, 1, 2, 4};
    plan.next_position = 5;
    expected = StatusCode::needs_positions;
  }
  SECTION("the destination lies over the source") {
    RaggedKVCache inside;
    const RaggedShape shape = RaggedShape::flat(1, 4, DType::f32, 2);
    std::vector<std::byte> arena(RaggedKVCache::bytes_required(shape) + 64);
    REQUIRE(inside.bind(arena, shape));
    CacheView over = view;
    over.keys.data = arena.data();
    const auto bytes = arena;
    PlanBuilder two{{0, 2}};
    two.position = {0, 1};
    // A cache as long as the arena is, so that its rows stay inside.
    over.uniform_length = 3;
    over.values = over.keys;
    over.values.width = 4;
    CHECK(apply(two.plan(), over, inside) == StatusCode::destination_overlaps);
    CHECK(arena == bytes);
    return;
  }
  CHECK(apply(plan, view, in_place) == expected);
  if (expected == StatusCode::ok) return;
  CHECK(layer == before);
  CHECK(view.next_position == 6);
  CHECK(view.uniform_length == 6);
}

TEST_CASE("renumber aligns the ends of ragged heads", "[rope][renumber]") {
  RopeSpec rope;
  Layer layer(2, 8, 4);
  std::vector<u32> lengths{8, 8};
  auto cache = layer.cache(&rope);
  cache.set_lengths(lengths.data()).set_positions(Ragged<i32>(layer.positions.data(), u64{8}), 8);
  PlanBuilder builder{{0, 1, 5, 6, 7}, {0, 6, 7}};
  CompressionPlan plan = builder.plan();
  Workspace workspace;
  CHECK(query_shift(plan, cache) == 0);
  const auto positions = [&] { return std::vector<i32>(plan.position, plan.position + 8); };
  SECTION("contiguous") {
    REQUIRE(renumber(plan, cache, workspace));
    CHECK((positions() == std::vector<i32>{0, 1, 2, 3, 4, 2, 3, 4}));
    CHECK(plan.next_position == 5);
    CHECK(query_shift(plan, cache) == -3);
  }
  SECTION("with sinks at the front") {
    REQUIRE(renumber(plan, cache, workspace, {.sinks = 2}));
    CHECK((positions() == std::vector<i32>{0, 1, 2, 3, 4, 0, 3, 4}));
    CHECK(plan.next_position == 5);
  }
  SECTION("with a sink that only the longer head holds, behind a gap") {
    builder.anchor[0] = 1;
    builder.anchor[1] = 2;
    builder.anchor[5] = 5;
    REQUIRE(renumber(plan, cache, workspace, {.sinks = 2}));
    CHECK((positions() == std::vector<i32>{1, 2, 3, 4, 5, 3, 4, 5}));
    CHECK(plan.next_position == 6);
  }
  SECTION("with frozen tokens") {
    cache.set_frozen(1);
    REQUIRE(renumber(plan, cache, workspace));
    CHECK((positions() == std::vector<i32>{0, 1, 2, 3, 4, 0, 3, 4}));
  }
  SECTION("at a given end") {
    REQUIRE(renumber(plan, cache, workspace, {.next_position = 7}));
    CHECK((positions() == std::vector<i32>{2, 3, 4, 5, 6, 4, 5, 6}));
    CHECK(plan.next_position == 7);
  }
  CHECK(plan.needs == (needs_ragged_lengths | needs_new_positions));
  REQUIRE(validate_plan(plan, cache.view()));
  REQUIRE(apply(plan, cache, in_place));
  CHECK(cache.view().next_position == plan.next_position);
  CHECK(cache.view().position(1, 2) == plan.next_position - 1);
}

TEST_CASE("all layers of a sequence share the next position", "[rope][renumber]") {
  RopeSpec rope;
  Layer a(1, 6, 4);
  Layer b(1, 6, 4);
  PlanBuilder short_plan{{4, 5}};
  PlanBuilder long_plan{{0, 1, 4, 5}};
  CompressionPlan plans[] = {short_plan.plan(), long_plan.plan()};
  CacheView caches[] = {a.cache(&rope).view(), b.cache(&rope).view()};
  Workspace workspace;
  REQUIRE(renumber(plans, caches, workspace));
  CHECK((plans[0].next_position == 4 && plans[1].next_position == 4));
  CHECK((plans[0].position[0] == 2 && plans[0].position[1] == 3));
  CHECK((plans[1].position[0] == 0 && plans[1].position[3] == 3));
  REQUIRE(renumber({}, {}, workspace));
}

TEST_CASE("renumber leaves plans alone when it fails", "[rope][renumber]") {
  RopeSpec rope;
  Layer layer(1, 6, 4);
  PlanBuilder builder{{0, 2, 5}};
  CompressionPlan plans[] = {builder.plan(), builder.plan()};
  CacheView caches[] = {layer.cache(&rope).view(), layer.cache(&rope).view()};
  Workspace workspace;
  RenumberOptions options;
  StatusCode expected = StatusCode::ok;
  SECTION("one plan is broken") {
    plans[1].needs = needs_log_mass;
    expected = StatusCode::invalid_plan;
  }
  SECTION("one cache does not know its rotation") {
    caches[1].rope = nullptr;
    expected = StatusCode::needs_rope;
  }
  SECTION("the caches disagree about the next position") {
    layer.positions = {0, 1, 2, 3, 4, 5};
    caches[1].positions = Ragged<i32>(layer.positions.data(), u64{6});
    caches[1].next_position = 7;
    expected = StatusCode::shape_mismatch;
  }
  SECTION("tokens were dropped and nobody knows where the others stand") {
    caches[0].next_position = caches[1].next_position = 9;
    expected = StatusCode::needs_positions;
  }
  SECTION("the next position asked for is too small") {
    options.next_position = 2;
    expected = StatusCode::invalid_option;
  }
  SECTION("positions run out of numbers") {
    layer.positions = {0, 1, 2, 3, 4, std::numeric_limits<i32>::max()};
    caches[1].positions = Ragged<i32>(layer.positions.data(), u64{6});
    options.sinks = 0xffffffffu;
    expected = StatusCode::invalid_option;
  }
  SECTION("no memory") {
    std::byte memory[16];
    Workspace tiny(memory);
    CHECK(renumber(plans, caches, tiny) == StatusCode::workspace_too_small);
  }
  SECTION("a plan is missing") {
    CHECK(renumber(std::span(plans, 1), caches, workspace) == StatusCode::shape_mismatch);
  }
  if (expected != StatusCode::ok) CHECK(renumber(plans, caches, workspace, options) == expected);
  for (const CompressionPlan& plan : plans) {
    CHECK(plan.position == nullptr);
    CHECK(plan.next_position == -1);
    CHECK((plan.needs & needs_new_positions) == 0);
  }
}

TEST_CASE("remembered queries move by one shift", "[rope][renumber]") {
  RopeSpec rope;
  std::vector<float> rows(2 * 3 * 4, 1.5f);
  const auto before = rows;
  const auto tensor = strided(rows.data(), Extents{2, 3, 4});
  REQUIRE(rotate_rows(tensor, 2, rope, 0));
  CHECK(rows == before);
  REQUIRE(rotate_rows(tensor, 2, rope, -11));
  CHECK(same_row(turned(rope, before.data(), 4, -11), rows.data() + 4));
  CHECK(same_row(turned(rope, before.data(), 4, -11), rows.data() + 12));
  CHECK(same_row(turned(rope, before.data(), 4, 0), rows.data() + 8));  // past `count`
  const auto after = rows;
  CHECK(rotate_rows(tensor, 4, rope, 1) == StatusCode::invalid_length);
  const float* fixed = rows.data();
  CHECK(rotate_rows(strided(fixed, Extents{2, 3, 4}), 2, rope, 1) == StatusCode::read_only);
  rope.rotary_dims = 6;
  CHECK(rotate_rows(tensor, 2, rope, 1) == StatusCode::invalid_rope);
  CHECK(rows == after);
}

TEST_CASE("a cache takes its pairing from the spec", "[rope]") {
  RopeSpec rope;
  rope.pairing = RopePairing::norm;
  Layer layer(1, 2, 4);
  auto cache = layer.cache(&rope);
  CHECK(cache.view().rope == &rope);
  CHECK(cache.view().rope_pairing == RopePairing::norm);
  cache.set_rope(nullptr);
  CHECK(cache.view().rope_pairing == RopePairing::none);
  CHECK(std::string_view(Status(StatusCode::needs_rope).message()) != "unknown status");
}
