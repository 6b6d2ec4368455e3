// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "kvlean/reduce/d2o.hpp"
#include "kvlean/reduce/kvmerger.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

namespace {

constexpr u32 width = 8;

// Tokens that are all alike before rotation, stored rotated to their positions, values 0, 1, 2, ..
struct AlikeTokens {
  u32 tokens;
  RopeSpec rope;
  std::vector<float> unrotated, keys, values, score;

  explicit AlikeTokens(u32 count) : tokens(count) {
    rope.theta = 50.0;
    unrotated = {0.9f, -0.4f, 0.7f, 0.2f, -0.3f, 0.8f, 0.5f, 0.6f};
    for (u32 t = 0; t < tokens; ++t) {
      const std::vector<float> key = rotated(t);
      keys.insert(keys.end(), key.begin(), key.end());
      for (u32 i = 0; i < width; ++i) values.push_back(static_cast<float>(t));
      score.push_back(t == 2 ? 1.0f : 0.1f);
    }
  }
  std::vector<float> rotated(u32 position) const {
    RopeRotation rotation;
    REQUIRE(rotation.prepare(rope, width));
    RopeTurn turn;
    rotation.turn_from_scratch(position, turn);
    std::vector<float> key = unrotated;
    rotation.rotate(turn, key.data());
    return key;
  }
  CacheView view(bool with_rope = true) {
    KVCache cache(strided(keys.data(), {.kv_heads = 1, .tokens = tokens, .dim = width}),
                  strided(values.data(), {.kv_heads = 1, .tokens = tokens, .dim = width}));
    if (with_rope) cache.set_rope(&rope);
    return cache.view();
  }
};

// Key and value of slot 0 once the plan is carried out.
struct Merged {
  float key[width];
  float value[width];
};
Merged first_slot(const CompressionPlan& plan, const CacheView& cache) {
  RaggedKVCache small;
  REQUIRE(small.allocate(ragged_shape(plan, cache)));
  REQUIRE(apply(plan, cache, small));
  Merged merged;
  load_row(small.view().keys, 0, 0, merged.key);
  load_row(small.view().values, 0, 0, merged.value);
  return merged;
}

double distance(const float* key, const std::vector<float>& expected) {
  double sum = 0.0;
  for (u32 i = 0; i < width; ++i) {
    const double difference = static_cast<double>(key[i]) - static_cast<double>(expected[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

KVMergerReducer merge_all(MergedKeys keys) {
  KVMergerReducer reducer;
  reducer.recent_tokens = reducer.heavy_tokens = 0;
  reducer.log_mass = LogMass::log_count;
  reducer.keys = keys;
  return reducer;
}

}  // namespace

TEST_CASE(
    "Aligned keys of tokens that are alike merge into the pivot's key; as they lie they do not") {
  AlikeTokens data(5);
  Planned blended, aligned;
  make_plan(merge_all(MergedKeys::blended), data.view(), data.score, true, {1}, blended,
            unprotected());
  make_plan(merge_all(MergedKeys::aligned), data.view(), data.score, true, {1}, aligned,
            unprotected());
  REQUIRE(blended.status);
  REQUIRE(aligned.status);
  REQUIRE(anchors(aligned.plan) == std::vector<u32>{2});
  CHECK((aligned.plan.needs & needs_aligned_terms) != 0);
  CHECK((blended.plan.needs & needs_aligned_terms) == 0);

  CHECK(distance(first_slot(aligned.plan, data.view()).key, data.rotated(2)) < 1e-6);
  CHECK(distance(first_slot(blended.plan, data.view()).key, data.rotated(2)) > 0.1);
  CHECK(aligned.plan.log_mass[0] == Approx(std::log(5.0)));
}

TEST_CASE("Aligned distances decide the weights") {
  // Token 1 differs from the pivot (token 0) by rotation only, token 2 by itself.
  AlikeTokens data(3);
  for (u32 i = 0; i < width; ++i) data.keys[2 * width + i] += 0.5f;
  data.score = {1.0f, 0.1f, 0.1f};
  Planned out;
  make_plan(merge_all(MergedKeys::aligned), data.view(), data.score, true, {1}, out, unprotected());
  REQUIRE(out.status);
  REQUIRE(out.plan.num_terms == 2);
  CHECK(out.plan.self_weight[0] == Approx(out.plan.term_weight[0]).epsilon(1e-4));
  CHECK(out.plan.term_weight[1] < 0.5f * out.plan.term_weight[0]);
}

TEST_CASE("Pivot keys stay bit for bit while values merge") {
  AlikeTokens data(6);
  Planned out;
  make_plan(merge_all(MergedKeys::pivot), data.view(), data.score, true, {1}, out, unprotected());
  REQUIRE(out.status);
  CHECK((out.plan.needs & needs_moved_keys) == 0);
  const Merged merged = first_slot(out.plan, data.view());
  CHECK(distance(merged.key, data.rotated(2)) == 0.0);
  double value = 0.0;
  value += static_cast<double>(out.plan.self_weight[0]) * 2.0;
  for (u64 t = 0; t < out.plan.num_terms; ++t) {
    value += static_cast<double>(out.plan.term_weight[t]) * out.plan.term_token[t];
  }
  CHECK(merged.value[0] == Approx(value));
  CHECK(merged.value[0] > 2.0f);
}

TEST_CASE("Keys cannot be aligned in a cache that does not say how they were rotated") {
  AlikeTokens data(5);
  Planned out;
  make_plan(merge_all(MergedKeys::aligned), data.view(false), data.score, true, {2}, out,
            unprotected());
  CHECK(out.status.code() == StatusCode::needs_rope);
  make_plan(D2OReducer{.keys = MergedKeys::aligned}, data.view(false), data.score, true, {2}, out,
            unprotected());
  CHECK(out.status.code() == StatusCode::needs_rope);
}

TEST_CASE("D2O can align keys or leave them alone too") {
  AlikeTokens data(4);
  data.score = {1.0f, 0.1f, 0.1f, 0.1f};
  Planned aligned, pivot;
  make_plan(D2OReducer{.keys = MergedKeys::aligned}, data.view(), data.score, true, {1}, aligned,
            unprotected());
  make_plan(D2OReducer{.keys = MergedKeys::pivot}, data.view(), data.score, true, {1}, pivot,
            unprotected());
  REQUIRE(aligned.status);
  REQUIRE(pivot.status);
  REQUIRE(aligned.plan.num_terms > 0);
  CHECK(distance(first_slot(aligned.plan, data.view()).key, data.rotated(0)) < 1e-6);
  CHECK(distance(first_slot(pivot.plan, data.view()).key, data.rotated(0)) == 0.0);
}
