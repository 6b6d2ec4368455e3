// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <array>
#include <cmath>
#include <numbers>
#include <vector>

#include "kvlean/reduce/kvmerger.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

namespace {

// The reference vector of eight two-dimensional keys given in polar form.
struct EightTokens {
  static constexpr u32 tokens = 8;
  std::vector<float> keys, values;
  std::vector<float> score{.9f, .5f, .2f, .1f, .7f, .3f, .4f, .4f};

  EightTokens() {
    const double polar[tokens][2] = {{2, 0},   {2, 20},    {1.5, 30}, {3, 100},
                                     {2, 110}, {2.5, 125}, {1, 250},  {1, 255}};
    for (const auto& key : polar) {
      const double angle = key[1] * std::numbers::pi / 180.0;
      keys.push_back(static_cast<float>(key[0] * std::cos(angle)));
      keys.push_back(static_cast<float>(key[0] * std::sin(angle)));
    }
    values = {1, 0, 0, 1, 1, 1, 2, 0, 0, 2, 2, 2, 3, 1, 1, 3};
  }
  CacheView view() {
    return KVCache(strided(keys.data(), {.kv_heads = 1, .tokens = tokens, .dim = 2}),
                   strided(values.data(), {.kv_heads = 1, .tokens = tokens, .dim = 2}))
        .view();
  }
};

// Key, value and weights of one slot of the plan, folded here in double.
struct Slot {
  std::array<double, 2> key{}, value{};
};
Slot fold(const CompressionPlan& plan, const CacheView& cache, u64 slot) {
  Slot result;
  float row[2];
  const auto add = [&](u32 token, double key_weight, double value_weight) {
    load_row(cache.keys, 0, token, row);
    for (u32 i = 0; i < 2; ++i) result.key[i] += key_weight * row[i];
    load_row(cache.values, 0, token, row);
    for (u32 i = 0; i < 2; ++i) result.value[i] += value_weight * row[i];
  };
  add(plan.anchor[slot], plan.key_self_weight(slot), plan.value_self_weight(slot));
  for (u64 t = plan.term_begin[slot]; t < plan.term_end[slot]; ++t) {
    add(plan.term_token[t], plan.term_weight[t], plan.value_term_weight(t));
  }
  return result;
}

}  // namespace

TEST_CASE("KVMerger's merging sets of the reference vector") {
  EightTokens data;
  const CacheView cache = data.view();
  const KVMergerReducer reducer{
      .form = KVMergerForm::threshold, .recent_tokens = 0, .heavy_tokens = 0};
  Planned out;
  make_plan(reducer, cache, data.score, true, {8}, out, unprotected(2));
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 4, 6, 7});  // pivots of {0,1,2} and {3,4,5}
  CHECK(out.plan.num_terms == 4);
  CHECK(out.plan.slots_evicted[0] == 0);

  SECTION("a heavy hitter stays alone and breaks its run") {
    Planned split;
    const KVMergerReducer heavy{
        .form = KVMergerForm::threshold, .recent_tokens = 0, .heavy_tokens = 2};
    make_plan(heavy, cache, data.score, true, {8}, split, unprotected(2));  // heavy: 0 and 4
    REQUIRE(split.status);
    CHECK(anchors(split.plan) == std::vector<u32>{0, 1, 3, 4, 5, 6, 7});
  }
}

TEST_CASE("KVMerger's weights, keys and values of the reference vector") {
  struct Expected {
    Sigma sigma;
    std::array<double, 3> first, second;
    Slot first_slot, second_slot;
  };
  const Expected cases[] = {
      {Sigma::fixed,
       {.336752, .333519, .329729},
       {.329399, .337281, .333320},
       {{1.728645, .475437}, {.666481, .663248}},
       {{-.880273, 2.289665}, {1.325438, 1.341201}}},
      {Sigma::mean_distance,
       {.786411, .181587, .032002},
       {.036165, .794177, .169657},
       {{1.955665, .148214}, {.818413, .213589}},
       {{-.805368, 1.946851}, {.411646, 1.927669}}},
      {Sigma::rms,
       {.504611, .315049, .180340},
       {.186275, .506466, .307259},
       {{1.835589, .350762}, {.684951, .495389}},
       {{-.884073, 2.131410}, {.987068, 1.627450}}},
  };
  EightTokens data;
  const CacheView cache = data.view();
  for (const Expected& expected : cases) {
    for (const ValueScale scale : {ValueScale::convex, ValueScale::paper_set_size}) {
      Planned out;
      const KVMergerReducer reducer{.form = KVMergerForm::threshold,
                                    .sigma = expected.sigma,
                                    .values = scale,
                                    .recent_tokens = 0,
                                    .heavy_tokens = 0};
      make_plan(reducer, cache, data.score, true, {8}, out, unprotected(2));
      REQUIRE(out.status);
      const double size = scale == ValueScale::convex ? 1.0 : 3.0;
      CHECK(out.plan.self_weight[0] == Approx(expected.first[0]).margin(2e-6));
      CHECK(out.plan.term_weight[0] == Approx(expected.first[1]).margin(2e-6));
      CHECK(out.plan.term_weight[1] == Approx(expected.first[2]).margin(2e-6));
      CHECK(out.plan.term_weight[2] == Approx(expected.second[0]).margin(2e-6));
      CHECK(out.plan.self_weight[1] == Approx(expected.second[1]).margin(2e-6));
      CHECK(out.plan.term_weight[3] == Approx(expected.second[2]).margin(2e-6));
      const Slot got[2] = {fold(out.plan, cache, 0), fold(out.plan, cache, 1)};
      const Slot want[2] = {expected.first_slot, expected.second_slot};
      for (u32 slot = 0; slot < 2; ++slot) {
        for (u32 i = 0; i < 2; ++i) {
          CHECK(got[slot].key[i] == Approx(want[slot].key[i]).margin(4e-6));
          CHECK(got[slot].value[i] == Approx(size * want[slot].value[i]).margin(6e-6));
        }
      }
    }
  }
}

TEST_CASE("KVMerger's slot form takes the most similar links, then evicts the least sets") {
  EightTokens data;
  const CacheView cache = data.view();
  // Cosines .9397 .9848 .3420 .9848 .9659 -.5736 .9962; tokens 6 and 7 protected.
  const KVMergerReducer reducer{.recent_tokens = 0, .heavy_tokens = 0};
  const auto plan_slots = [&](u32 slots) {
    Planned out;
    make_plan(reducer, cache, data.score, true, {slots}, out, unprotected(2));
    REQUIRE(out.status);
    CHECK(out.plan.length[0] == slots);
    return std::pair(anchors(out.plan), out.plan.slots_evicted[0]);
  };
  CHECK(plan_slots(8) == std::pair(std::vector<u32>{0, 1, 2, 3, 4, 5, 6, 7}, 0u));
  CHECK(plan_slots(6).first.size() == 6);
  CHECK(plan_slots(4) == std::pair(std::vector<u32>{0, 4, 6, 7}, 0u));
  CHECK(plan_slots(3) == std::pair(std::vector<u32>{0, 6, 7}, 0u));  // the .342 link joins all six
  CHECK(plan_slots(2) == std::pair(std::vector<u32>{6, 7}, 1u));     // no link left: evict
}

TEST_CASE("KVMerger's threshold form keeps to the limit unless told otherwise") {
  EightTokens data;
  const CacheView cache = data.view();
  KVMergerReducer reducer{.form = KVMergerForm::threshold, .recent_tokens = 0, .heavy_tokens = 0};
  Planned limited;
  make_plan(reducer, cache, data.score, true, {3}, limited, unprotected(2));
  REQUIRE(limited.status);
  CHECK(anchors(limited.plan) == std::vector<u32>{0, 6, 7});  // {3,4,5} sums to 1.1 < 1.6
  CHECK(limited.plan.slots_evicted[0] == 1);
  reducer.enforce_limit = false;
  Planned free;
  make_plan(reducer, cache, data.score, true, {3}, free, unprotected(2));
  REQUIRE(free.status);
  CHECK(free.plan.length[0] == 4);
}

TEST_CASE("Epsilon of one or more merges nothing and changes nothing") {
  EightTokens data;
  Planned out;
  const KVMergerReducer reducer{.form = KVMergerForm::threshold,
                                .epsilon = 1.0f,
                                .log_mass = LogMass::log_count,
                                .recent_tokens = 0,
                                .heavy_tokens = 0};
  make_plan(reducer, data.view(), data.score, true, {8}, out, unprotected());
  REQUIRE(out.status);
  CHECK(out.plan.length[0] == 8);
  CHECK(out.plan.needs == needs_nothing);
  CHECK_FALSE(out.plan.has_terms());
}

TEST_CASE("Log mass: counts add over repeated merging, entropy is Jensen's bound") {
  EightTokens data;
  CacheView cache = data.view();
  std::vector<float> mass{std::log(2.0f), 0, std::log(3.0f), 0, 0, 0, 0, 0};
  cache.log_mass = Ragged<float>(mass.data(), u64{8});
  KVMergerReducer reducer{.form = KVMergerForm::threshold,
                          .log_mass = LogMass::log_count,
                          .recent_tokens = 0,
                          .heavy_tokens = 0};
  Planned counted;
  make_plan(reducer, cache, data.score, true, {8}, counted, unprotected(2));
  REQUIRE(counted.status);
  CHECK(counted.plan.log_mass[0] == Approx(std::log(6.0)));
  CHECK(counted.plan.log_mass[1] == Approx(std::log(3.0)));
  CHECK(counted.plan.log_mass[2] == 0.0f);

  reducer.log_mass = LogMass::entropy;
  cache.log_mass = {};
  Planned entropy;
  make_plan(reducer, cache, data.score, true, {8}, entropy, unprotected(2));
  REQUIRE(entropy.status);
  CHECK(entropy.plan.log_mass[0] == Approx(0.6089).margin(1e-4));
}

TEST_CASE("Scaling the keys leaves mean-distance weights alone and changes fixed ones") {
  EightTokens data, scaled;
  for (float& key : scaled.keys) key *= 7.0f;
  for (const Sigma sigma : {Sigma::mean_distance, Sigma::fixed}) {
    Planned a, b;
    const KVMergerReducer reducer{
        .form = KVMergerForm::threshold, .sigma = sigma, .recent_tokens = 0, .heavy_tokens = 0};
    make_plan(reducer, data.view(), data.score, true, {8}, a, unprotected(2));
    make_plan(reducer, scaled.view(), scaled.score, true, {8}, b, unprotected(2));
    REQUIRE((a.status && b.status));
    const float difference = std::abs(a.plan.self_weight[0] - b.plan.self_weight[0]);
    CHECK((sigma == Sigma::mean_distance ? difference < 1e-5f : difference > 1e-2f));
  }
}

TEST_CASE("Paper presets") {
  CHECK(kvmerger_preset(0.5).recent == Approx(0.17));
  CHECK(kvmerger_preset(0.9).heavy == Approx(0.12));
  CHECK(kvmerger_preset(0.35).recent == Approx(0.08));
  CHECK(kvmerger_preset(0.35).heavy == Approx(0.02));
  CHECK(kvmerger_preset(0.425).heavy == Approx(0.07));
  CHECK(kvmerger_preset(0.07).recent == Approx(0.016));
}

TEST_CASE("KVMerger's options are checked") {
  EightTokens data;
  const auto status = [&](const KVMergerReducer& reducer) {
    Planned out;
    make_plan(reducer, data.view(), data.score, true, {8}, out, unprotected());
    return out.status.code();
  };
  CHECK(status({.epsilon = std::nanf("")}) == StatusCode::invalid_option);
  CHECK(status({.sigma = Sigma::fixed, .fixed_sigma = 0.0f}) == StatusCode::invalid_option);
  CHECK(status({.recent_fraction = 1.5}) == StatusCode::invalid_option);
  CHECK(status({.values = ValueScale::paper_set_size, .log_mass = LogMass::log_count}) ==
        StatusCode::invalid_option);
}

TEST_CASE("Same tokens for all heads: one set of runs, each head its own weights") {
  EightTokens one, two;
  std::vector<float> keys = one.keys, values = one.values;
  for (float& key : two.keys) key *= 0.5f;
  keys.insert(keys.end(), two.keys.begin(), two.keys.end());
  values.insert(values.end(), two.values.begin(), two.values.end());
  std::vector<float> score = one.score;
  score.insert(score.end(), {.1f, .2f, .9f, .1f, .1f, .1f, .1f, .1f});
  const CacheView cache = KVCache(strided(keys.data(), {.kv_heads = 2, .tokens = 8, .dim = 2}),
                                  strided(values.data(), {.kv_heads = 2, .tokens = 8, .dim = 2}))
                              .view();
  PlanOptions options = unprotected(2);
  options.sharing = Sharing::same_tokens();
  Planned out;
  make_plan(KVMergerReducer{.recent_tokens = 0, .heavy_tokens = 0}, cache, score, true, {4, 4}, out,
            options);
  REQUIRE(out.status);
  CHECK(anchors(out.plan, 0) == anchors(out.plan, 1));
  CHECK(anchors(out.plan, 0) ==
        std::vector<u32>{2, 4, 6, 7});  // mean scores: token 2 leads its run
  CHECK((out.plan.needs & needs_ragged_lengths) == 0);
}

TEST_CASE("Whole pages: dropped tokens merge into the best kept member of their run") {
  // Two pages of four; the second is protected as the newest, so the first would leave, and its
  // tokens have no kept member in their runs.
  EightTokens data;
  PlanOptions options = unprotected(2);
  options.sharing = Sharing::whole_pages(2);
  Planned out;
  make_plan(KVMergerReducer{.recent_tokens = 0, .heavy_tokens = 0}, data.view(), data.score, true,
            {6}, out, options);
  REQUIRE(out.status);
  // Page means: {0,1} .7, {2,3} .15, {4,5} .5, {6,7} protected: tokens 2 and 3 leave. 2 joins 0
  // through its run {0,1,2}; 3 joins 4 through {3,4,5}.
  CHECK(anchors(out.plan) == std::vector<u32>{0, 1, 4, 5, 6, 7});
  CHECK(out.plan.page_tokens == 2);
  REQUIRE(out.plan.num_terms == 2);
  CHECK(out.plan.term_token[0] == 2);
  CHECK(out.plan.term_begin[0] == 0);
  CHECK(out.plan.term_end[0] == 1);
  CHECK(out.plan.term_token[1] == 3);
  CHECK(out.plan.term_end[2] == 2);
}

TEST_CASE("Bad data never fails a merge") {
  EightTokens data;
  data.keys[2] = std::nanf("");
  data.keys[8] = INFINITY;
  data.score[1] = std::nanf("");
  for (u32 slots = 2; slots <= 8; ++slots) {
    Planned out;
    make_plan(KVMergerReducer{.recent_tokens = 0, .heavy_tokens = 0}, data.view(), data.score, true,
              {slots}, out, unprotected(2));
    REQUIRE(out.status);
    CHECK(out.plan.length[0] == slots);
    for (u64 t = 0; t < out.plan.num_terms; ++t) CHECK(std::isfinite(out.plan.term_weight[t]));
  }
}
