// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <vector>

#include "kvlean/reduce/cam.hpp"
#include "kvlean/reduce/d2o.hpp"
#include "kvlean/reduce/evict.hpp"
#include "kvlean/reduce/massfold.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

namespace {

// One or more heads of tokens whose keys are given as angles on the unit circle, values as scalars.
struct AngleCache {
  u32 heads, tokens;
  std::vector<float> keys, values;
  AngleCache(u32 num_heads, const std::vector<float>& degrees, const std::vector<float>& value)
      : heads(num_heads), tokens(static_cast<u32>(degrees.size()) / num_heads), values(value) {
    for (const float angle : degrees) {
      keys.push_back(std::cos(angle * 3.14159265f / 180.0f));
      keys.push_back(std::sin(angle * 3.14159265f / 180.0f));
    }
  }
  CacheView view() {
    return KVCache(strided(keys.data(), {.kv_heads = heads, .tokens = tokens, .dim = 2}),
                   strided(values.data(), {.kv_heads = heads, .tokens = tokens, .dim = 1}))
        .view();
  }
};

AngleCache line(u32 heads, u32 tokens) {
  std::vector<float> degrees, values;
  for (u32 i = 0; i < heads * tokens; ++i) {
    degrees.push_back(static_cast<float>(i % tokens) * 7.0f);
    values.push_back(static_cast<float>(i));
  }
  return AngleCache(heads, degrees, values);
}

}  // namespace

TEST_CASE("Eviction keeps the best, ties by lower token, NaN last and newest first among NaN") {
  AngleCache cache = line(1, 6);
  const float nan = std::nanf("");
  const auto kept = [&](std::vector<float> rank, u32 slots) {
    Planned out;
    make_plan(EvictReducer{}, cache.view(), rank, false, {slots}, out, unprotected());
    REQUIRE(out.status);
    CHECK(out.plan.needs == needs_nothing);
    return anchors(out.plan);
  };
  CHECK(kept({1, 5, 3, 5, 2, 4}, 3) == std::vector<u32>{1, 3, 5});
  CHECK(kept({2, 2, 2, 2, 2, 2}, 2) == std::vector<u32>{0, 1});
  CHECK(kept({nan, 1, nan, 0, nan, -INFINITY}, 3) == std::vector<u32>{1, 3, 5});
  CHECK(kept({nan, 1, nan, 0, nan, -INFINITY}, 4) == std::vector<u32>{1, 3, 4, 5});
  CHECK(kept({nan, nan, nan, nan, nan, nan}, 2) == std::vector<u32>{4, 5});
  CHECK(kept({0.0f, -0.0f, 0.0f, -0.0f, 0, 0}, 2) == std::vector<u32>{0, 1});
  CHECK(kept({1, 2, 3, 4, 5, INFINITY}, 6).size() == 6);
}

TEST_CASE("Protected tokens stay whatever their score, inside the limit") {
  AngleCache cache = line(1, 8);
  PlanOptions options;
  options.protection = {.sinks = 2, .recent = 2};
  Planned out;
  std::vector<float> rank{0, 0, 9, 1, 8, 7, 0, 0};
  make_plan(EvictReducer{}, cache.view(), rank, false, {5}, out, options);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 1, 2, 6, 7});
  Planned half;
  make_plan(EvictReducer{.recent_share = 0.5f}, cache.view(), rank, false, {6}, half, options);
  CHECK(anchors(half.plan) == std::vector<u32>{0, 1, 2, 5, 6, 7});
  Planned bad;
  make_plan(EvictReducer{.recent_share = 1.5f}, cache.view(), rank, false, {6}, bad, options);
  CHECK(bad.status == StatusCode::invalid_option);
}

TEST_CASE("Same tokens: one set by the mean over heads; unequal lengths are refused") {
  AngleCache cache = line(2, 5);
  PlanOptions options = unprotected();
  options.sharing = Sharing::same_tokens();
  Planned out;
  std::vector<float> rank{5, 0, 1, 0, 3, 0, 4, 1, 0, 2};
  make_plan(EvictReducer{}, cache.view(), rank, false, {2, 2}, out, options);
  REQUIRE(out.status);
  CHECK(anchors(out.plan, 0) == std::vector<u32>{0, 4});  // means 2.5, 2, 1, 0, 2.5
  CHECK(anchors(out.plan, 1) == std::vector<u32>{0, 4});
  CacheView ragged = cache.view();
  u32 lengths[2] = {5, 4};
  ragged.lengths = lengths;
  Planned refused;
  make_plan(EvictReducer{}, ragged, rank, false, {2, 2}, refused, options);
  CHECK(refused.status == StatusCode::shape_mismatch);
}

TEST_CASE("Whole pages: best pages by mean score, protected and last partial page stay") {
  AngleCache cache = line(1, 10);
  PlanOptions options = unprotected(1);
  options.sharing = Sharing::whole_pages(4);
  std::vector<float> rank{0, 0, 0, 9, 1, 1, 1, 1, 5, 5};
  Planned out;
  make_plan(EvictReducer{}, cache.view(), rank, false, {7}, out, options);
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 1, 2, 3, 8, 9});
  CHECK(out.plan.page_tokens == 4);
  Planned tight;
  make_plan(EvictReducer{}, cache.view(), rank, false, {1}, tight, options);
  CHECK(tight.status == StatusCode::budget_below_protected);
}

TEST_CASE("H2O's worked example: prefill, then two decode steps") {
  // One head, heavy 2, recent 2: keep the two best of the candidates and the last two.
  PlanOptions options = unprotected(2);
  const auto kept = [&](u32 tokens, std::vector<float> mass) {
    AngleCache cache = line(1, tokens);
    Planned out;
    make_plan(EvictReducer{}, cache.view(), mass, true, {4}, out, options);
    return anchors(out.plan);
  };
  CHECK(kept(6, {3.2f, .52f, .68f, .9f, .5f, .2f}) == std::vector<u32>{0, 3, 4, 5});
  // Tokens 0 3 4 5 6, then 0 3 5 6 7.
  CHECK(kept(5, {3.3f, 1.4f, .6f, .3f, .2f}) == std::vector<u32>{0, 1, 3, 4});
  CHECK(kept(5, {3.35f, 1.85f, .6f, .3f, .1f}) == std::vector<u32>{0, 1, 3, 4});
}

TEST_CASE("CaM: probability and contributions of the reference vectors") {
  CHECK(cam_merge_probability(.6f, .3f) == 1.0f);
  CHECK(cam_merge_probability(.06f, .3f) == Approx(.2f));
  CHECK(cam_merge_probability(0.0f, 0.0f) == 0.0f);
  CHECK(cam_merge_probability(1.0f, 0.0f) == 1.0f);
  CHECK(cam_merge_probability(std::nanf(""), 1.0f) == 0.0f);

  AngleCache cache(1, {0, 10, 20, 30}, {8, 1, 2, 3});
  Planned out;
  std::vector<float> mass{.6f, .3f, .5f, .1f};
  // Token 0 leaves: the three others are protected as recent and receive a third each.
  make_plan(CaMReducer{.receivers = 32}, cache.view(), mass, true, {3}, out, unprotected(3));
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{1, 2, 3});
  CHECK(out.plan.needs == needs_changed_values);
  CHECK(out.plan.self_weight == nullptr);
  for (u32 slot = 0; slot < 3; ++slot) {
    REQUIRE(out.plan.term_end[slot] - out.plan.term_begin[slot] == 1);
    CHECK(out.plan.term_weight[out.plan.term_begin[slot]] * 8.0f == Approx(2.66667f));
  }
  mass[0] = .06f;
  Planned weak;
  make_plan(CaMReducer{}, cache.view(), mass, true, {3}, weak, unprotected(3));
  CHECK(weak.plan.term_weight[0] == Approx(.2f / 3.0f));
  CHECK(weak.plan.num_terms == 1);  // one term, shared by the ranges of three slots
}

TEST_CASE("CaM reaches only the next m slots, spares frozen ones, needs mass") {
  AngleCache cache = line(1, 12);
  std::vector<float> mass(12, 1.0f);
  std::vector<float> rank{9, 0, 8, 7, 6, 0, 5, 4, 3, 2, 1, 1};
  // rank doubles as mass in make_plan: tokens 1 and 5 leave with mass 0.
  rank[1] = rank[5] = .5f;
  Planned out;
  make_plan(CaMReducer{.receivers = 2}, cache.view(), rank, true, {10}, out, unprotected());
  REQUIRE(out.status);
  REQUIRE(anchors(out.plan) == std::vector<u32>{0, 2, 3, 4, 6, 7, 8, 9, 10, 11});
  REQUIRE(out.plan.num_terms == 2);
  for (u32 slot = 0; slot < 10; ++slot) {
    const u64 terms = out.plan.term_end[slot] - out.plan.term_begin[slot];
    const u32 anchor = out.plan.anchor[slot];
    CHECK(terms == ((anchor == 2 || anchor == 3 || anchor == 6 || anchor == 7) ? 1u : 0u));
  }
  CHECK(out.plan.term_weight[0] == Approx(.5 / 7.5 / 2.0));

  CacheView frozen = cache.view();
  frozen.frozen = 4;
  std::vector<float> front{0, 0, 0, 0, .5f, 9, 9, 9, 9, 9, 9, 9};
  Planned spared;
  make_plan(CaMReducer{.receivers = 3}, frozen, front, true, {11}, spared, unprotected());
  REQUIRE(spared.status);
  for (u32 slot = 0; slot < 4; ++slot) {
    CHECK(spared.plan.term_begin[slot] == spared.plan.term_end[slot]);
  }
  Planned missing;
  make_plan(CaMReducer{}, cache.view(), rank, false, {10}, missing, unprotected());
  CHECK(missing.status == StatusCode::missing_observation);
  Planned none;
  make_plan(CaMReducer{.receivers = 0}, cache.view(), rank, true, {10}, none, unprotected());
  CHECK(none.status == StatusCode::invalid_option);
}

TEST_CASE("CaM sampled: merges wholly or not, the same for the same seed, at the right rate") {
  constexpr u32 tokens = 4000;
  AngleCache cache = line(1, tokens);
  std::vector<float> mass(tokens);
  // Even tokens leave; their ratio to the receivers' mean is 0.25.
  for (u32 t = 0; t < tokens; ++t) mass[t] = t % 2 == 0 ? 0.25f : 1.0f;
  PlanOptions options = unprotected();
  const auto merged = [&](u64 seed) {
    options.seed = seed;
    Planned out;
    make_plan(CaMReducer{.mode = CaMMode::sampled}, cache.view(), mass, true, {tokens / 2}, out,
              options);
    REQUIRE(out.status);
    return std::vector<u32>(out.plan.term_token, out.plan.term_token + out.plan.num_terms);
  };
  const auto first = merged(1);
  CHECK(first == merged(1));
  CHECK(first != merged(2));
  CHECK(static_cast<double>(first.size()) == Approx(0.25 * tokens / 2).epsilon(0.15));
}

TEST_CASE("Mass fold: weights, values and log mass by attention mass") {
  // Tokens 1 and 2 leave: 1 is nearest to 0, 2 to 3.
  AngleCache cache(1, {0, 10, 80, 90}, {1, 5, 7, 2});
  std::vector<float> mass{4, 1, 1, 2};
  Planned out;
  make_plan(MassFoldReducer{}, cache.view(), mass, true, {2}, out, unprotected());
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 3});
  CHECK(out.plan.needs == (needs_changed_values | needs_log_mass));
  CHECK(out.plan.self_weight[0] == Approx(0.8));
  CHECK(out.plan.term_token[0] == 1);
  CHECK(out.plan.term_weight[0] == Approx(0.2));
  CHECK(out.plan.log_mass[0] == Approx(std::log(1.25)));
  CHECK(out.plan.log_mass[1] == Approx(std::log(1.5)));

  Planned plain;
  make_plan(MassFoldReducer{.log_mass = false}, cache.view(), mass, true, {2}, plain,
            unprotected());
  CHECK(plain.plan.log_mass == nullptr);
  CHECK(plain.plan.needs == needs_changed_values);

  Planned strict;
  make_plan(MassFoldReducer{.min_cosine = 0.9999f}, cache.view(), mass, true, {2}, strict,
            unprotected());
  REQUIRE(strict.status);
  CHECK(strict.plan.num_terms == 0);

  Planned counts;
  std::vector<float> rank{4, 1, 1, 2};
  make_plan(MassFoldReducer{}, cache.view(), rank, false, {2}, counts, unprotected());
  CHECK(counts.plan.term_weight[0] == Approx(0.5));
  CHECK(counts.plan.log_mass[1] == Approx(std::log(2.0)));

  Planned bad;
  make_plan(MassFoldReducer{.max_ratio = 0.0f}, cache.view(), mass, true, {2}, bad, unprotected());
  CHECK(bad.status == StatusCode::invalid_option);
}

TEST_CASE("Mass fold compares what a query paid on average, not how many queries there were") {
  // Tokens 0 and 3 stay. Token 2 was seen by two of four queries, token 3 by one.
  AngleCache cache(1, {0, 10, 80, 90}, {1, 5, 7, 2});
  const CacheView view = cache.view();
  const u32 lengths[1] = {4};
  const u64 first[2] = {0, 4};
  float mass[4] = {4, 1, 1, 2};
  Scores scores;
  scores.segments = 1;
  scores.lengths = lengths;
  scores.rank = Ragged<float>(mass, first);
  scores.mass = scores.rank;
  scores.has_mass = true;
  CHECK(scores.mass_per_observer(0, 2) == 1.0f);  // unknown: as it is
  u32 observers[4] = {4, 3, 2, 1};
  scores.observers = Ragged<u32>(observers, first);
  scores.has_observers = true;
  CHECK(scores.mass_per_observer(0, 0) == 1.0f);
  CHECK(scores.mass_per_observer(0, 2) == 0.5f);
  const u32 limit[1] = {2};
  const PlanOptions options = unprotected();
  Workspace workspace;
  Context context{workspace, options};
  CompressionPlan plan;
  REQUIRE(MassFoldReducer{}.reduce(view, scores, limit, context, plan));
  // 1 into 0: (1/3) / (4/4); 2 into 3: (1/2) / (2/1).
  CHECK(plan.log_mass[0] == Approx(std::log(4.0 / 3.0)));
  CHECK(plan.log_mass[1] == Approx(std::log(1.25)));
  REQUIRE(MassFoldReducer{.per_observer = false}.reduce(view, scores, limit, context, plan));
  CHECK(plan.log_mass[1] == Approx(std::log(1.5)));
}

TEST_CASE("Mass fold bounds the weight of tokens that nobody looked at") {
  AngleCache cache(1, {0, 10, 80}, {1, 5, 7});
  std::vector<float> mass{0, 1, 9};
  PlanOptions options = unprotected();
  options.protection.sinks = 1;  // token 0 stays with mass 0
  Planned out;
  make_plan(MassFoldReducer{}, cache.view(), mass, true, {2}, out, options);
  REQUIRE(out.status);
  CHECK(std::isfinite(out.plan.log_mass[0]));
  CHECK(out.plan.self_weight[0] == Approx(0.0).margin(1e-5));
}

TEST_CASE("D2O: running threshold, both weightings, protected keys spared") {
  AngleCache cache(1, {0, 12, 40, 90, 95}, {1, 2, 3, 4, 5});
  std::vector<float> rank{5, 1, 1, 4, 1};
  Planned out;
  make_plan(D2OReducer{}, cache.view(), rank, false, {2}, out, unprotected());
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 3});
  // Similarities: token 1 cos 12 = .978 to 0, token 2 cos 40 = .766 to 0, token 4 cos 5 = .996
  // to 3. Their mean .913 is the threshold: 1 and 4 merge.
  REQUIRE(out.plan.num_terms == 2);
  CHECK(out.plan.term_token[0] == 1);
  CHECK(out.plan.term_token[1] == 4);
  const double u = std::cos(12 * 3.14159265 / 180);
  CHECK(out.plan.self_weight[0] == Approx(std::exp(1.0) / (std::exp(1.0) + std::exp(u))));
  CHECK(out.plan.self_weight[0] + out.plan.term_weight[0] == Approx(1.0f));

  float state[1] = {std::nanf("")};
  Planned first;
  make_plan(D2OReducer{.weights = D2OWeights::code, .threshold = state, .next_threshold = state},
            cache.view(), rank, false, {2}, first, unprotected());
  CHECK(first.plan.self_weight[0] == Approx(0.5));
  CHECK(first.plan.term_weight[0] == Approx(u / 2));
  const float mean = state[0];
  CHECK(mean == Approx((u + std::cos(40 * 3.14159265 / 180) + std::cos(5 * 3.14159265 / 180)) / 3));
  state[0] = 0.5f;
  Planned second;
  make_plan(D2OReducer{.threshold = state, .next_threshold = state}, cache.view(), rank, false, {2},
            second, unprotected());
  CHECK(state[0] == Approx(0.25f + 0.5f * mean));
  CHECK(second.plan.num_terms == 3);

  PlanOptions options = unprotected();
  options.protection.sinks = 1;
  Planned spared;
  make_plan(D2OReducer{}, cache.view(), rank, false, {2}, spared, options);
  CHECK(spared.plan.term_begin[0] == spared.plan.term_end[0]);
  Planned bad;
  make_plan(D2OReducer{.momentum = -1.0f}, cache.view(), rank, false, {2}, bad, options);
  CHECK(bad.status == StatusCode::invalid_option);
}

TEST_CASE("Reducers do not depend on the number of workers") {
  AngleCache cache = line(5, 97);
  std::vector<float> rank(5 * 97);
  for (u32 i = 0; i < rank.size(); ++i) rank[i] = static_cast<float>((i * 7919u) % 101u) + 0.5f;
  const std::vector<u32> limit{40, 33, 50, 21, 60};
  PlanOptions serial = unprotected(3);
  PlanOptions parallel = serial;
  parallel.executor.workers = 3;
  parallel.executor.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept,
                             void* arg) noexcept {
    for (u32 index = tasks; index-- > 0;) task(arg, index % 3, index);
  };
  const auto check = [&](const auto& reducer) {
    Planned a, b;
    make_plan(reducer, cache.view(), rank, true, limit, a, serial);
    make_plan(reducer, cache.view(), rank, true, limit, b, parallel);
    REQUIRE((a.status && b.status));
    REQUIRE(a.plan.num_slots() == b.plan.num_slots());
    REQUIRE(a.plan.num_terms == b.plan.num_terms);
    CHECK(std::equal(a.plan.anchor, a.plan.anchor + a.plan.num_slots(), b.plan.anchor));
    if (a.plan.num_terms != 0) {
      CHECK(std::equal(a.plan.term_token, a.plan.term_token + a.plan.num_terms, b.plan.term_token));
      CHECK(std::equal(a.plan.term_weight, a.plan.term_weight + a.plan.num_terms,
                       b.plan.term_weight));
    }
  };
  check(EvictReducer{});
  check(MassFoldReducer{});
  check(D2OReducer{});
  check(CaMReducer{});
}
