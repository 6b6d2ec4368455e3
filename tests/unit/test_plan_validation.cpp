// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <vector>

#include "kvlean/core/validate_plan.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

struct TwoHeads {
  std::vector<float> keys = std::vector<float>(2 * 10 * 4);
  std::vector<float> values = std::vector<float>(2 * 10 * 3);
  std::vector<u32> lengths{10, 8};
  CacheView view;

  TwoHeads() {
    KVCache cache(strided(keys.data(), Extents{2, 10, 4}),
                  strided(values.data(), Extents{2, 10, 3}));
    view = cache.view();
    view.lengths = lengths.data();
  }
};

PlanBuilder simple() { return {{0, 2, 5, 9}, {1, 2, 7}}; }

}  // namespace

TEST_CASE("a plan of anchors is valid, with or without its options", "[plan]") {
  TwoHeads cache;
  PlanBuilder builder = simple();
  CHECK(validate_plan(builder.plan(), cache.view) == Status());

  builder.add_terms(1, {{1, 0.5f, 0.25f}, {8, 0.5f, 0.25f}, {3}});
  builder.add_terms(4, {{0, 0.5f, 0.5f}, {0, 0.5f, 0.5f}});
  builder.moves_keys = true;
  builder.self_weight.assign(7, 0.5f);
  builder.self_value_weight.assign(7, 2.0f);
  builder.log_mass.assign(7, 0.1f);
  builder.position = {0, 1, 2, 3, -5, 0, 100};
  CHECK(validate_plan(builder.plan(), cache.view) == Status());

  SECTION("nothing kept") {
    PlanBuilder nothing{{}, {}};
    CHECK(validate_plan(nothing.plan(), cache.view) == Status());
  }
  SECTION("needs_moved_keys and needs_changed_values may be set without need") {
    PlanBuilder plain = simple();
    CompressionPlan plan = plain.plan();
    plan.needs |= needs_moved_keys | needs_changed_values;
    CHECK(validate_plan(plan, cache.view) == Status());
  }
  SECTION("a key weight may be absent when only values blend") {
    builder.moves_keys = false;
    CompressionPlan plan = builder.plan();
    plan.term_weight = nullptr;
    CHECK(validate_plan(plan, cache.view) == Status());
  }
}

TEST_CASE("overlapping, far and unordered term ranges are looked at", "[plan]") {
  TwoHeads cache;
  PlanBuilder builder{{4, 5, 6, 7}, {}};
  builder.term_token = {9, 0, 8, 1, 2, 3};
  builder.term_weight.assign(6, 0.1f);
  builder.term_begin = {1, 0, 3, 0};
  builder.term_end = {3, 2, 6, 6};
  CHECK(validate_plan(builder.plan(), cache.view) == Status());
  for (std::size_t i = 0; i < 6; ++i) {  // each term is seen, whichever ranges it is in
    PlanBuilder broken = builder;
    broken.term_token[i] = 4 + static_cast<u32>(i) % 4;
    CHECK(validate_plan(broken.plan(), cache.view) == StatusCode::invalid_plan);
    broken = builder;
    broken.term_weight[i] = not_a_number;
    CHECK(validate_plan(broken.plan(), cache.view) == StatusCode::invalid_plan);
  }
  builder.term_begin = {5, 5, 0, 0};
  builder.term_end = {6, 6, 1, 0};
  builder.term_token[0] = 7;
  CHECK(validate_plan(builder.plan(), cache.view) == StatusCode::invalid_plan);
}

TEST_CASE("every broken rule is named invalid_plan", "[plan]") {
  TwoHeads cache;
  PlanBuilder builder = simple();
  builder.add_terms(1, {{1, 0.5f, 0.25f}});
  builder.add_terms(4, {{0, 0.5f, 0.5f}});
  builder.moves_keys = true;
  builder.self_weight.assign(7, 0.5f);
  builder.self_value_weight.assign(7, 2.0f);
  builder.log_mass.assign(7, 0.1f);
  builder.position = {0, 1, 2, 3, -5, 0, 100};
  REQUIRE(validate_plan(builder.plan(), cache.view) == Status());
  CompressionPlan plan = builder.plan();
  std::vector<float> literal(2 * 10 * 4);

  SECTION("segments") { plan.segments = 1; }
  SECTION("no lengths") { plan.length = nullptr; }
  SECTION("no offsets") { plan.first = nullptr; }
  SECTION("no anchors") { plan.anchor = nullptr; }
  SECTION("unknown need") { plan.needs |= 1u << 20; }
  SECTION("first offset") { builder.first[0] = 1; }
  SECTION("offsets are no prefix sums") { builder.first[1] = 3; }
  SECTION("last offset") { builder.first[2] = 8; }
  SECTION("longer than the segment") {
    builder.length = {4, 9};
    builder.first = {0, 4, 13};
  }
  SECTION("anchor out of range") { builder.anchor[6] = 8; }
  SECTION("anchors do not ascend") { builder.anchor[2] = 2; }
  SECTION("anchors descend") { builder.anchor[2] = 1; }
  SECTION("ragged lengths not asked for") { plan.needs &= ~u32{needs_ragged_lengths}; }
  SECTION("ragged lengths asked for without need") {
    builder = PlanBuilder{{0, 1}, {2, 3}};
    plan = builder.plan();
    plan.needs |= needs_ragged_lengths;
  }
  SECTION("log mass not asked for") { plan.needs &= ~u32{needs_log_mass}; }
  SECTION("log mass asked for, absent") { plan.log_mass = nullptr; }
  SECTION("log mass NaN") { builder.log_mass[3] = not_a_number; }
  SECTION("log mass infinite") { builder.log_mass[3] = -std::numeric_limits<float>::infinity(); }
  SECTION("positions not asked for") { plan.needs &= ~u32{needs_new_positions}; }
  SECTION("positions asked for, absent") { plan.position = nullptr; }
  SECTION("positions do not ascend") { builder.position[1] = 0; }
  SECTION("self weight NaN") { builder.self_weight[0] = not_a_number; }
  SECTION("self value weight infinite") {
    builder.self_value_weight[6] = std::numeric_limits<float>::infinity();
  }
  SECTION("values change unasked: terms") {
    plan.self_weight = plan.self_value_weight = nullptr;
    plan.needs &= ~u32{needs_changed_values};
  }
  SECTION("values change unasked: weight") {
    plan.term_begin = plan.term_end = nullptr;
    plan.needs &= ~u32{needs_changed_values};
  }
  SECTION("half of the ranges") { plan.term_end = nullptr; }
  SECTION("range backwards") {
    builder.term_begin[1] = 1;
    builder.term_end[1] = 0;
  }
  SECTION("range past the terms") { builder.term_end[4] = 3; }
  SECTION("no term tokens") { plan.term_token = nullptr; }
  SECTION("no term weights") { plan.term_weight = nullptr; }
  SECTION("term is an anchor") { builder.term_token[0] = 5; }
  SECTION("term out of range") { builder.term_token[1] = 8; }
  SECTION("term weight NaN") { builder.term_weight[0] = not_a_number; }
  SECTION("term value weight NaN") { builder.term_value_weight[1] = not_a_number; }
  SECTION("literal keys: width") {
    plan.literal_keys = strided(literal.data(), Extents{2, 10, 3}).rows();
  }
  SECTION("literal keys: heads") {
    plan.literal_keys = strided(literal.data(), Extents{1, 10, 4}).rows();
  }
  SECTION("literal keys: too few rows") {
    plan.literal_keys = strided(literal.data(), Extents{2, 3, 4}).rows();
  }
  SECTION("literal keys not asked for") {
    plan.literal_keys = strided(literal.data(), Extents{2, 10, 4}).rows();
    plan.needs &= ~u32{needs_moved_keys};
  }
  SECTION("literal values: width") {
    plan.literal_values = strided(literal.data(), Extents{2, 10, 4}).rows();
  }
  SECTION("literal values not asked for") {
    plan.literal_values = strided(literal.data(), Extents{2, 10, 3}).rows();
    plan.needs &= ~u32{needs_changed_values};
  }
  CHECK(validate_plan(plan, cache.view) == StatusCode::invalid_plan);
}

TEST_CASE("literal rows of the right shape are accepted", "[plan]") {
  TwoHeads cache;
  std::vector<float> literal(2 * 4 * 4);
  PlanBuilder builder = simple();
  builder.literal_keys = strided(literal.data(), Extents{2, 4, 4}).rows();
  builder.literal_values = strided(literal.data(), Extents{2, 4, 3}).rows();
  CHECK(validate_plan(builder.plan(), cache.view) == Status());
}

TEST_CASE("a frozen token stays as it is", "[plan]") {
  TwoHeads cache;
  cache.view.frozen = 2;
  std::vector<float> mass(2 * 10, 0.5f);
  cache.view.log_mass = Ragged<float>(mass.data(), 10);
  std::vector<float> literal(2 * 10 * 4);
  PlanBuilder builder{{0, 1, 5, 9}, {0, 1, 7}};
  builder.log_mass = {0.5f, 0.5f, 1.0f, 1.0f, 0.5f, 0.5f, 1.0f};
  builder.position = {0, 1, 2, 3, 0, 1, 9};
  builder.self_weight = {1, 1, 0.5f, 1, 1, 1, 1};
  builder.self_value_weight = {1, 1, 0.5f, 1, 1, 1, 1};
  builder.add_terms(2, {{6, 0.5f, 0.5f}});
  builder.moves_keys = true;
  REQUIRE(validate_plan(builder.plan(), cache.view) == Status());

  SECTION("dropped") { builder.anchor[1] = 2; }
  SECTION("fewer slots than frozen") { builder = PlanBuilder{{0}, {0, 1}}; }
  SECTION("another position") { builder.position = {0, 2, 3, 4, 0, 1, 9}; }
  SECTION("another log mass") { builder.log_mass[5] = 0.25f; }
  SECTION("key weight") { builder.self_weight[0] = 0.5f; }
  SECTION("value weight") { builder.self_value_weight[4] = 0.5f; }
  SECTION("receives a term") { builder.add_terms(1, {{7, 0.5f, 0.5f}}); }
  SECTION("is a term") { builder.term_token[0] = 1; }
  SECTION("literal keys") {
    builder.literal_keys = strided(literal.data(), Extents{2, 10, 4}).rows();
  }
  SECTION("literal values") {
    builder.literal_values = strided(literal.data(), Extents{2, 10, 3}).rows();
  }
  CHECK(validate_plan(builder.plan(), cache.view) == StatusCode::frozen_token_changed);
}

TEST_CASE("a frozen token that nobody sees stays so", "[plan]") {
  const float infinity = std::numeric_limits<float>::infinity();
  TwoHeads cache;
  cache.view.frozen = 2;
  std::vector<float> mass(2 * 10, 0.5f);
  mass[0] = -infinity;
  mass[11] = not_a_number;
  cache.view.log_mass = Ragged<float>(mass.data(), 10);
  PlanBuilder builder{{0, 1, 5, 9}, {0, 1, 7}};
  builder.log_mass = {-1e30f, 0.5f, 1.0f, 1.0f, 0.5f, -1e30f, 1.0f};
  REQUIRE(validate_plan(builder.plan(), cache.view) == Status());
  SECTION("another finite number") { builder.log_mass[0] = -2e30f; }
  SECTION("infinity is no number for a plan") { builder.log_mass[0] = -infinity; }
  CHECK(!validate_plan(builder.plan(), cache.view));
}

TEST_CASE("whole pages are kept or dropped", "[plan]") {
  TwoHeads cache;  // lengths 10 and 8
  const auto check = [&](std::vector<u32> first, std::vector<u32> second) {
    PlanBuilder builder{first, second};
    builder.page_tokens = 4;
    return validate_plan(builder.plan(), cache.view);
  };
  CHECK(check({0, 1, 2, 3, 8, 9}, {4, 5, 6, 7}) == Status());
  CHECK(check({8, 9}, {}) == Status());
  CHECK(check({0, 1, 2, 8, 9}, {4, 5, 6, 7}) == StatusCode::invalid_plan);
  CHECK(check({0, 1, 2, 3, 8}, {4, 5, 6, 7}) == StatusCode::invalid_plan);
  CHECK(check({0, 1, 2, 3, 5, 6, 7, 8}, {}) == StatusCode::invalid_plan);
  CHECK(check({}, {1, 2, 3, 4}) == StatusCode::invalid_plan);
  CHECK(check({0, 1, 2, 4, 5, 6, 7, 8}, {}) == StatusCode::invalid_plan);
}

TEST_CASE("a broken cache is reported before the plan is read", "[plan]") {
  TwoHeads cache;
  PlanBuilder builder = simple();
  cache.lengths[0] = 11;
  CHECK(validate_plan(builder.plan(), cache.view) == StatusCode::invalid_length);
  cache.lengths[0] = 10;
  cache.view.frozen = 9;
  CHECK(validate_plan(builder.plan(), cache.view) == StatusCode::invalid_frozen);
  CHECK(validate_plan(CompressionPlan{}, CacheView{}) == StatusCode::invalid_shape);
}
