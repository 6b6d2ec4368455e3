// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_layer.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

TEST_CASE("Errors of planning leave the cache and the workspace as they were") {
  RandomLayer layer(2, 60);
  const auto cache = layer.cache();
  const Observation seen = layer.seen();
  Workspace workspace;
  CompressionPlan plan;
  const auto policy = SnapKVPolicy{};
  const Budget half = Budget::fraction(0.5);
  PlanOptions light;
  light.protection = {.sinks = 2, .recent = 4};

  CHECK(policy.plan(cache, seen, Budget::fraction(-0.1), workspace, plan) ==
        StatusCode::invalid_budget);
  CHECK(policy.plan(cache, seen, Budget::fraction(std::nan("")), workspace, plan) ==
        StatusCode::invalid_budget);
  CHECK(policy.plan(cache, seen, Budget::fraction(0.5), workspace, plan) ==
        StatusCode::budget_below_protected);  // 30 slots, 36 protected by default
  CHECK(policy.plan(cache, Observation{}, half, workspace, plan, light) ==
        StatusCode::missing_observation);
  PlanOptions pages = light;
  pages.sharing = Sharing::whole_pages(0);
  CHECK(policy.plan(cache, seen, half, workspace, plan, pages) == StatusCode::invalid_option);
  auto longer = layer.cache().set_length(61);
  CHECK(policy.plan(longer, seen, half, workspace, plan, light) == StatusCode::invalid_length);
  auto frozen = layer.cache().set_frozen(61);
  CHECK(policy.plan(frozen, seen, half, workspace, plan, light) == StatusCode::invalid_frozen);
  std::byte little[512];
  Workspace small{std::span<std::byte>(little)};
  const std::byte* before = small.take<std::byte>(1);
  CHECK(policy.plan(cache, seen, half, small, plan, light) == StatusCode::workspace_too_small);
  CHECK(small.take<std::byte>(1) == before + 64);  // nothing of the failed plan is left
  const CacheView views[2] = {cache.view(), cache.view()};
  CHECK(policy.plan(views, {&seen, 1}, half, workspace, {&plan, 1}, light) ==
        StatusCode::shape_mismatch);
  CHECK(policy.plan(std::span<const CacheView>{}, {}, half, workspace, {}, light) ==
        StatusCode::invalid_shape);
  CHECK(policy.plan_batch(views, {&seen, 1}, half, workspace, {&plan, 1}, light) ==
        StatusCode::shape_mismatch);
}

TEST_CASE("A budget at or above the length is the identity and needs no observation") {
  RandomLayer layer(2, 60);
  const auto cache = layer.cache();
  Workspace workspace;
  for (const auto& name : policy_names) {
    if (name.name == "kvmerger_threshold" || name.name == "kvmerger_paper") continue;
    AnyPolicy policy;
    REQUIRE(make_policy(name.name, policy));
    for (const Budget budget :
         {Budget::fraction(1.0), Budget::slots(60), Budget::slots(1u << 30)}) {
      CompressionPlan plan;
      REQUIRE(policy.plan(cache, Observation{}, budget, workspace, plan));
      CHECK(plan.needs == needs_nothing);
      CHECK(plan.num_slots() == 120);
      CHECK(anchors(plan, 1).back() == 59);
      CHECK_FALSE(plan.has_terms());
    }
  }
}

TEST_CASE("A cache shorter than the protection is kept whole") {
  RandomLayer layer(2, 60);
  auto cache = layer.cache().set_length(20);
  Workspace workspace;
  CompressionPlan plan;
  REQUIRE(StreamingLLMPolicy{}.plan(cache, {}, Budget::slots(20), workspace, plan));
  CHECK(plan.length[0] == 20);
  CHECK(StreamingLLMPolicy{}.plan(cache, {}, Budget::slots(19), workspace, plan) ==
        StatusCode::budget_below_protected);
}

TEST_CASE("StreamingLLM keeps sinks and the newest; frozen tokens count and stay") {
  RandomLayer layer(2, 60);
  auto cache = layer.cache().set_frozen(6);
  Workspace workspace;
  CompressionPlan plan;
  PlanOptions options;
  options.protection = {.sinks = 2, .recent = 3};
  REQUIRE(StreamingLLMPolicy{}.plan(cache, {}, Budget::slots(10), workspace, plan, options));
  CHECK(anchors(plan) == std::vector<u32>{0, 1, 2, 3, 4, 5, 56, 57, 58, 59});
  REQUIRE(validate_plan(plan, cache.view()));
}

TEST_CASE("Random is the same for the same seed and differs by head and seed") {
  RandomLayer layer(2, 60);
  const auto cache = layer.cache();
  Workspace workspace;
  PlanOptions options;
  options.protection = {.sinks = 0, .recent = 0};
  const auto kept = [&](u64 seed) {
    options.seed = seed;
    CompressionPlan plan;
    REQUIRE(RandomPolicy{}.plan(cache, {}, Budget::slots(20), workspace, plan, options));
    return std::pair(anchors(plan, 0), anchors(plan, 1));
  };
  CHECK(kept(5) == kept(5));
  CHECK(kept(5) != kept(6));
  CHECK(kept(5).first != kept(5).second);
}

TEST_CASE("A batch is planned sequence by sequence") {
  RandomLayer a(2, 60, 1), b(2, 60, 2);
  const CacheView views[2] = {a.cache().view(), b.cache().set_length(50).view()};
  Observation seen[2] = {a.seen(), b.seen()};
  seen[1].window.first_row -= 10;  // the queries of 50 tokens
  Workspace workspace;
  PlanOptions options;
  options.protection = {.sinks = 1, .recent = 8};
  CompressionPlan plans[2], alone;
  const AdaKVPolicy policy;
  REQUIRE(policy.plan_batch(views, seen, Budget::fraction(0.4), workspace, plans, options));
  CHECK(plans[0].num_slots() == 48);
  CHECK(plans[1].num_slots() == 40);
  REQUIRE(policy.plan(views[1], seen[1], Budget::fraction(0.4), workspace, alone, options));
  CHECK(anchors(plans[1], 1) == anchors(alone, 1));
}

TEST_CASE("Names: every name in the tables makes a policy, others do not") {
  AnyPolicy policy;
  for (const auto& entry : policy_names) CHECK(make_policy(entry.name, policy));
  CHECK(make_policy("snapkv+adakv+kvmerger", policy));
  for (const char* bad : {"", "h3o", "h2o+", "h2o+adakv", "h2o+adakv+", "h2o+adakv+evict+evict",
                          "+adakv+evict", "evict+adakv+h2o"}) {
    CHECK(make_policy(bad, policy) == StatusCode::unknown_policy);
  }
  CHECK(std::holds_alternative<SnapKVScorer>(policy.scorer));  // left as it was
}

TEST_CASE("Named policies and typed ones give the same plan") {
  RandomLayer layer(2, 60);
  const auto cache = layer.cache();
  const Observation seen = layer.seen();
  Workspace workspace;
  PlanOptions options;
  options.protection = {.sinks = 1, .recent = 4};
  const auto same = [&](const auto& typed, const char* name) {
    AnyPolicy named;
    REQUIRE(make_policy(name, named));
    CompressionPlan a, b;
    REQUIRE(typed.plan(cache, seen, Budget::fraction(0.5), workspace, a, options));
    REQUIRE(named.plan(cache, seen, Budget::fraction(0.5), workspace, b, options));
    REQUIRE(a.num_slots() == b.num_slots());
    CHECK(std::equal(a.anchor, a.anchor + a.num_slots(), b.anchor));
    CHECK(a.needs == b.needs);
  };
  same(H2OPolicy{}, "h2o");
  same(SnapKVPolicy{}, "snapkv");
  same(StreamingLLMPolicy{}, "streaming_llm");
  same(TOVAPolicy{}, "tova");
  same(KeyNormPolicy{}, "knorm");
  same(RandomPolicy{}, "random");
  same(PyramidKVPolicy{}, "pyramidkv");
  same(AdaKVPolicy{}, "adakv");
  same(CaMPolicy{}, "cam");
  same(KVMergerPolicy{}, "kvmerger");
  same(compose(SnapKVScorer{}, UniformAllocator{}, MassFoldReducer{}), "massfold");
}

TEST_CASE("NaN and infinity never fail a policy; broken heads keep protected and newest tokens") {
  RandomLayer layer(2, 60);
  for (std::size_t i = 0; i < layer.keys.size() / 2; ++i) layer.keys[i] = std::nanf("");
  layer.values[3] = INFINITY;
  layer.rows[7] = -INFINITY;
  const auto cache = layer.cache();
  Workspace workspace;
  PlanOptions options;
  options.protection = {.sinks = 1, .recent = 2};
  for (const auto& scorer : scorer_names) {
    if (scorer.name == "external") continue;
    for (const auto& reducer : reducer_names) {
      AnyPolicy policy;
      policy.scorer = scorer.stage;
      policy.reducer = reducer.stage;
      CompressionPlan plan;
      INFO(scorer.name << " " << reducer.name);
      REQUIRE(policy.plan(cache, layer.seen(), Budget::slots(20), workspace, plan, options));
      REQUIRE(validate_plan(plan, cache.view()));
    }
  }
  CompressionPlan plan;
  REQUIRE(SnapKVPolicy{}.plan(cache, layer.seen(), Budget::slots(20), workspace, plan, options));
  CHECK(anchors(plan)[0] == 0);
  CHECK(anchors(plan)[1] >= 60 - 19);
}

TEST_CASE("All-equal scores: the lowest tokens win beside the protected") {
  RandomLayer layer(2, 60);
  std::vector<float> flat(120, 1.0f);
  Observation seen;
  seen.external = Ragged<const float>(flat.data(), u64{60});
  Workspace workspace;
  CompressionPlan plan;
  PlanOptions options;
  options.protection = {.sinks = 0, .recent = 2};
  const auto policy = compose(ExternalScorer{}, AdaKVAllocator{}, EvictReducer{});
  REQUIRE(policy.plan(layer.cache(), seen, Budget::slots(5), workspace, plan, options));
  CHECK(plan.num_slots() == 10);
  CHECK(anchors(plan)[0] == 0);
  CHECK(anchors(plan).back() == 59);
}

TEST_CASE("Every composition works on f16 and bf16, transposed values and pages") {
  RandomLayer layer(2, 60);
  std::vector<f16> keys;
  for (const float x : layer.keys) keys.emplace_back(x);
  std::vector<bf16> values(layer.values.size());
  // Values transposed: [head][dim][token].
  for (u32 h = 0; h < layer.heads; ++h) {
    for (u32 t = 0; t < layer.tokens; ++t) {
      for (u32 d = 0; d < layer.dim; ++d) {
        values[(h * layer.dim + d) * layer.tokens + t] =
            bf16(layer.values[(h * layer.tokens + t) * layer.dim + d]);
      }
    }
  }
  auto cache = KVCache(
      strided(keys.data(), {.kv_heads = layer.heads, .tokens = layer.tokens, .dim = layer.dim}),
      strided(values.data(), {.kv_heads = layer.heads, .tokens = layer.tokens, .dim = layer.dim},
              {.head = static_cast<std::ptrdiff_t>(layer.dim * layer.tokens),
               .token = 1,
               .dim = static_cast<std::ptrdiff_t>(layer.tokens)}));
  cache.set_rope(&layer_rope);
  Workspace workspace;
  PlanOptions options;
  options.protection = {.sinks = 1, .recent = 4};
  for (const auto& reducer : reducer_names) {
    AnyPolicy policy;
    REQUIRE(make_policy("h2o+adakv+" + std::string(reducer.name), policy));
    CompressionPlan plan;
    REQUIRE(policy.plan(cache, layer.seen(), Budget::fraction(0.5), workspace, plan, options));
    RaggedKVCache small;
    REQUIRE(small.allocate({.kv_heads = layer.heads,
                            .key_dim = layer.dim,
                            .value_dim = layer.dim,
                            .key_dtype = DType::f16,
                            .value_dtype = DType::bf16,
                            .total_slots = plan.num_slots(),
                            .log_mass = true}));
    REQUIRE(apply(plan, cache, small));
    REQUIRE(validate(small));
    // The same plan from float tensors differs by rounding only.
    RaggedKVCache exact;
    REQUIRE(exact.allocate({.kv_heads = layer.heads,
                            .key_dim = layer.dim,
                            .value_dim = layer.dim,
                            .total_slots = plan.num_slots(),
                            .log_mass = true}));
    REQUIRE(apply(plan, layer.cache(), exact));
    float a[8], b[8];
    for (u32 s = 0; s < layer.heads; ++s) {
      for (u32 t = 0; t < small.length(s); ++t) {
        load_row(small.view().values, s, t, a);
        load_row(exact.view().values, s, t, b);
        for (u32 d = 0; d < 8; ++d) CHECK(a[d] == Approx(b[d]).margin(0.05));
      }
    }
  }
}
