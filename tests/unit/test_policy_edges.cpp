// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_layer.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

namespace {

PlanOptions light() {
  PlanOptions options;
  options.protection = {.sinks = 1, .recent = 4};
  return options;
}

// All tasks on the last of eight workers, in reverse.
Executor busy_pool() {
  Executor executor;
  executor.workers = 8;
  executor.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
    for (u32 index = tasks; index-- > 0;) task(arg, 7, index);
  };
  return executor;
}

std::vector<u32> all_anchors(const CompressionPlan& plan) {
  return {plan.anchor, plan.anchor + plan.num_slots()};
}

}  // namespace

TEST_CASE("Every stage works with more workers than heads, whatever the worker's number") {
  RandomLayer layer;
  PlanOptions serial = light(), pool = light();
  pool.executor = busy_pool();
  for (const Sharing sharing : {Sharing::per_head(), Sharing::equal_count(), Sharing::same_tokens(),
                                Sharing::whole_pages(8)}) {
    serial.sharing = pool.sharing = sharing;
    for (const auto& scorer : scorer_names) {
      if (scorer.name == "external") continue;
      for (const auto& reducer : reducer_names) {
        AnyPolicy policy;
        policy.scorer = scorer.stage;
        policy.reducer = reducer.stage;
        Workspace a, b;
        CompressionPlan one, other;
        INFO(scorer.name << "+" << reducer.name);
        REQUIRE(policy.plan(layer.cache(), layer.seen(), Budget::fraction(0.5), a, one, serial));
        REQUIRE(policy.plan(layer.cache(), layer.seen(), Budget::fraction(0.5), b, other, pool));
        REQUIRE(all_anchors(one) == all_anchors(other));
        REQUIRE(one.num_terms == other.num_terms);
        if (one.num_terms != 0) {
          REQUIRE(std::equal(one.term_weight, one.term_weight + one.num_terms, other.term_weight));
        }
      }
    }
  }
}

TEST_CASE("Whole pages: a plan that keeps everything can be applied to the page table") {
  RandomLayer layer(2, 64);
  std::vector<i32> table(8);
  std::iota(table.begin(), table.end(), 0);
  const Extents extents{.kv_heads = 2, .tokens = 64, .dim = 8};
  const Strides in_page{.head = 64, .token = 8, .dim = 1};
  auto cache = KVCache(paged(layer.keys.data(), extents, in_page, 128, 8, table),
                       paged(layer.values.data(), extents, in_page, 128, 8, table))
                   .set_length(60);
  PlanOptions options = light();
  options.sharing = Sharing::whole_pages(8);
  for (const char* name : {"full", "streaming_llm", "kvmerger"}) {
    AnyPolicy policy;
    REQUIRE(make_policy(name, policy));
    Workspace workspace;
    CompressionPlan plan;
    REQUIRE(policy.plan(cache, {}, Budget::slots(100), workspace, plan, options));
    std::size_t pages = 0;
    REQUIRE(apply_to_page_table(plan, cache, table, pages));
    CHECK(pages == 8);
    CHECK(cache.length() == 60);
  }
}

TEST_CASE("Whole pages never end empty; heads of other tokens can't share theirs") {
  RandomLayer layer(2, 200);
  PlanOptions options;
  options.protection = {.sinks = 0, .recent = 0};
  options.sharing = Sharing::whole_pages(50);
  Workspace workspace;
  CompressionPlan plan;
  CHECK(KeyNormPolicy{}.plan(layer.cache(), {}, Budget::slots(40), workspace, plan, options) ==
        StatusCode::budget_below_protected);
  options.sharing = Sharing::same_tokens();
  std::vector<i32> positions(400);
  for (u32 i = 0; i < 400; ++i) positions[i] = static_cast<i32>(i < 200 ? i : 2 * (i - 200));
  auto cache = layer.cache().set_positions({positions.data(), u64{200}}, 400);
  CHECK(KeyNormPolicy{}.plan(cache, {}, Budget::slots(40), workspace, plan, options) ==
        StatusCode::shape_mismatch);
  CHECK(KVMergerPolicy{}.plan(cache, layer.seen(), Budget::slots(40), workspace, plan, options) ==
        StatusCode::shape_mismatch);
}

TEST_CASE("A broken key goes first and never reaches the attention") {
  RandomLayer layer(1, 200);
  for (u32 d = 0; d < layer.dim; ++d) layer.keys[100 * layer.dim + d] = std::nanf("");
  for (const bool ready_made : {false, true}) {
    // Ready-made mass knows nothing of the broken key.
    std::vector<float> mass(200, 1.0f);
    const Observation seen = ready_made ? observe_mass({mass.data(), u64{200}}, 200) : layer.seen();
    for (const char* name : {"h2o", "kvmerger", "kvmerger_mass", "kvmerger_threshold"}) {
      for (const u32 slots : {150u, 100u, 50u, 20u, 8u}) {
        AnyPolicy policy;
        REQUIRE(make_policy(name, policy));
        Workspace workspace;
        RaggedKVCache small;
        CompressionPlan plan;
        REQUIRE(policy.plan(layer.cache(), seen, Budget::slots(slots), workspace, plan, light()));
        REQUIRE(small.allocate({.kv_heads = 1,
                                .key_dim = 8,
                                .value_dim = 8,
                                .total_slots = plan.num_slots(),
                                .log_mass = true}));
        REQUIRE(apply(plan, layer.cache(), small));
        INFO(name << " " << slots);
        const CacheView view = small.view();
        u32 broken = 0;
        float row[8];
        for (u32 t = 0; t < view.length(0); ++t) {
          load_row(view.keys, 0, t, row);
          broken += row[0] != row[0] ? 1u : 0u;
        }
        CHECK(broken <= (ready_made ? 1u : 0u));  // alone at worst, never blended into others
      }
    }
  }
}

TEST_CASE("Any log mass, even minus infinity, makes plans that can be carried out") {
  RandomLayer layer(2, 80);
  for (const float extreme : {-1e4f, 800.0f, -INFINITY, std::nanf(""), 1e30f}) {
    std::vector<float> mass(160, 0.0f);
    for (u32 t = 20; t < 60; ++t) mass[t] = mass[80 + t] = extreme;
    for (const auto& reducer : reducer_names) {
      AnyPolicy policy;
      REQUIRE(make_policy("knorm+adakv+" + std::string(reducer.name), policy));
      std::vector<float> received(160, 1.0f);
      auto cache = layer.cache().set_log_mass({mass.data(), u64{80}});
      Workspace workspace;
      CompressionPlan plan;
      INFO(reducer.name << " " << extreme);
      REQUIRE(policy.plan(cache, observe_mass({received.data(), u64{80}}), Budget::slots(30),
                          workspace, plan, light()));
      REQUIRE(validate_plan(plan, cache.view()));
    }
  }
}

TEST_CASE("Observers are the queries that could see a token, wherever the queries stand") {
  RandomLayer layer(1, 60);
  // A question after the cache: all of it was seen by all queries.
  Observation seen = layer.seen();
  seen.window.first_position = 60;
  Workspace workspace;
  const PlanOptions options = light();
  Context context{workspace, options};
  const CacheView view = layer.cache().view();
  const u32 lengths[1] = {60};
  const u64 first[2] = {0, 60};
  std::vector<float> rank(60), mass(60);
  std::vector<u32> observers(60);
  Scores scores{.segments = 1,
                .lengths = lengths,
                .rank = {rank.data(), first},
                .mass = {mass.data(), first},
                .observers = {observers.data(), first}};
  REQUIRE(SnapKVScorer{.window = 16}.score(view, seen, context, scores));
  CHECK(scores.has_observers);
  CHECK(observers == std::vector<u32>(60, 16));
  // The last queries of the text: the newest token was seen by one.
  REQUIRE(SnapKVScorer{.window = 16}.score(view, layer.seen(), context, scores));
  CHECK(observers[59] == 1);
  CHECK(observers[50] == 10);
  CHECK(observers[3] == 16);
  REQUIRE(H2OScorer{}.score(view, layer.seen(), context, scores));
  CHECK(observers[0] == 60);
  CHECK(observers[59] == 1);
  // Ready-made mass over a compressed cache without positions: nobody knows.
  CacheView compressed = view;
  compressed.next_position = 600;
  REQUIRE(H2OScorer{}.score(compressed, observe_mass({mass.data(), first}, 600), context, scores));
  CHECK_FALSE(scores.has_observers);
  REQUIRE(TOVAScorer{}.score(view, layer.seen(), context, scores));
  CHECK_FALSE(scores.has_observers);
}

TEST_CASE("CaM: any number of receivers, accumulated mass over any base, draws of its own") {
  RandomLayer layer(1, 200);
  Workspace workspace;
  CompressionPlan all, some;
  const Observation seen = layer.seen();
  const auto cam = [&](CaMReducer reducer) {
    return compose(StreamingLLMScorer{}, UniformAllocator{}, reducer);
  };
  REQUIRE(cam({.receivers = 0xffffffffu})
              .plan(layer.cache(), seen, Budget::slots(100), workspace, all, light()));
  REQUIRE(cam({.receivers = 100})
              .plan(layer.cache(), seen, Budget::slots(100), workspace, some, light()));
  REQUIRE(all.num_terms == some.num_terms);
  for (u64 slot = 0; slot < all.num_slots(); ++slot) {
    CHECK(all.term_end[slot] - all.term_begin[slot] == some.term_end[slot] - some.term_begin[slot]);
  }

  // Over SnapKV the base decides who leaves, the accumulated attention how much is merged.
  std::vector<float> little(200, 1.0f), much(200, 1.0f);
  for (u32 t = 0; t < 200; t += 2) much[t] = 100.0f;
  Observation a = seen, b = seen;
  a.mass = {little.data(), u64{200}};
  b.mass = {much.data(), u64{200}};
  const auto over_snapkv = compose(SnapKVScorer{.window = 8}, UniformAllocator{}, CaMReducer{});
  CompressionPlan one, other;
  REQUIRE(over_snapkv.plan(layer.cache(), a, Budget::slots(100), workspace, one, light()));
  REQUIRE(over_snapkv.plan(layer.cache(), b, Budget::slots(100), workspace, other, light()));
  CHECK(all_anchors(one) == all_anchors(other));
  CHECK_FALSE(std::equal(one.term_weight, one.term_weight + one.num_terms, other.term_weight));

  // At probability one half, half of the dropped merge, also when a random scorer chose them.
  RandomLayer wide(1, 4000);
  std::vector<float> half(4000, 1.0f);
  const auto on_random =
      compose(RandomScorer{}, UniformAllocator{}, CaMReducer{.mode = CaMMode::sampled});
  CompressionPlan drawn;
  Observation ready = observe_mass({half.data(), u64{4000}});
  PlanOptions options;
  options.protection = {.sinks = 0, .recent = 0};
  REQUIRE(on_random.plan(wide.cache(), ready, Budget::slots(2000), workspace, drawn, options));
  std::vector<float> weak = half;
  for (u32 t = 0; t < 4000; ++t) {
    if (!std::binary_search(drawn.anchor, drawn.anchor + 2000, t)) weak[t] = 0.5f;
  }
  ready = observe_mass({weak.data(), u64{4000}});
  REQUIRE(on_random.plan(wide.cache(), ready, Budget::slots(2000), workspace, drawn, options));
  CHECK(static_cast<double>(drawn.num_terms) == Approx(1000).margin(120));
}

TEST_CASE("Random draws differ between the layers of a span") {
  RandomLayer layer;
  const CacheView views[2] = {layer.cache().view(), layer.cache().view()};
  const Observation seen[2] = {};
  CompressionPlan plans[2];
  Workspace workspace;
  REQUIRE(RandomPolicy{}.plan(views, seen, Budget::slots(40), workspace, plans, light()));
  CHECK(all_anchors(plans[0]) != all_anchors(plans[1]));
}

TEST_CASE("Without mass KVMerger evicts the set whose best rank is least, not the largest set") {
  // Keys on a line: {0..5} alike, {6, 7} alike, 8 and 9 alone; one slot too many.
  std::vector<float> keys, values(10, 1.0f);
  const float angle[10] = {0.0f, .01f, .02f, .03f, .04f, .05f, 1.5f, 1.51f, 2.5f, 3.5f};
  for (const float a : angle) {
    keys.push_back(std::cos(a));
    keys.push_back(std::sin(a));
  }
  const CacheView view = KVCache(strided(keys.data(), {.kv_heads = 1, .tokens = 10, .dim = 2}),
                                 strided(values.data(), {.kv_heads = 1, .tokens = 10, .dim = 1}))
                             .view();
  std::vector<float> rank{-1, -1, -1, -1, -1, -1, -3, -3, -2, -2};
  Planned out;
  make_plan(KVMergerReducer{.form = KVMergerForm::threshold, .recent_tokens = 0, .heavy_tokens = 0},
            view, rank, false, {3}, out, unprotected());
  REQUIRE(out.status);
  CHECK(anchors(out.plan) == std::vector<u32>{0, 8, 9});
}

TEST_CASE("An index list that is too short for all heads is refused") {
  RandomLayer layer(2, 20);
  std::vector<u32> order(20);
  std::iota(order.begin(), order.end(), 0u);
  const Extents extents{.kv_heads = 2, .tokens = 20, .dim = 8};
  auto per_head = KVCache(indexed(layer.keys.data(), extents, {160, 8, 1}, order, 20),
                          indexed(layer.values.data(), extents, {160, 8, 1}, order, 20));
  CHECK(per_head.set_length(20).capacity() == 0);
  CHECK(validate(per_head) == StatusCode::invalid_length);
  auto shared = KVCache(indexed(layer.keys.data(), extents, {160, 8, 1}, order),
                        indexed(layer.values.data(), extents, {160, 8, 1}, order));
  CHECK(validate(shared));
}

TEST_CASE("A batch that fails late leaves the workspace as it was") {
  RandomLayer layer;
  const CacheView views[2] = {layer.cache().view(), layer.cache().set_length(300).view()};
  const Observation seen[2] = {layer.seen(), layer.seen()};
  CompressionPlan plans[2];
  std::vector<std::byte> memory(1u << 20);
  Workspace workspace{std::span<std::byte>(memory)};
  const std::byte* before = workspace.take<std::byte>(1);
  REQUIRE(SnapKVPolicy{}.plan_batch(views, seen, Budget::slots(50), workspace, plans, light()) ==
          StatusCode::invalid_length);
  CHECK(workspace.take<std::byte>(1) == before + 64);
}
