// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// Budgets of caches whose heads have different lengths already.

#include <numeric>

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/allocate/uniform.hpp"
#include "kvlean/policy/papers.hpp"
#include "kvlean/score/external.hpp"
#include "kvlean/score/observed_mass.hpp"
#include "tests/support/allocation.hpp"
#include "tests/support/catch.hpp"

using namespace kvlean;
using kvlean_test::Layer;
using kvlean_test::Model;

namespace {

using Counts = std::vector<u32>;
constexpr u32 budget = 1000;

// Heads of these lengths, token t of head h scoring step[h] * (length - t).
Layer layer_of(const Counts& lengths, const std::vector<float>& step, u32 nominal = budget) {
  Layer layer;
  for (std::size_t h = 0; h < lengths.size(); ++h) {
    std::vector<float> row(lengths[h]);
    for (u32 t = 0; t < lengths[h]; ++t) row[t] = step[h] * static_cast<float>(lengths[h] - t);
    layer.scores.push_back(std::move(row));
    layer.nominal.push_back(nominal);
  }
  return layer;
}

// One layer with K, V and external scores.
struct Heads {
  std::vector<float> rows, scores;
  Counts lengths;
  explicit Heads(Counts head_lengths, const std::vector<float>& step)
      : lengths(std::move(head_lengths)) {
    const u32 capacity = *std::max_element(lengths.begin(), lengths.end());
    rows.assign(std::size_t{capacity} * lengths.size() * 2, 1.0f);
    for (std::size_t h = 0; h < lengths.size(); ++h) {
      for (u32 t = 0; t < capacity; ++t) {
        scores.push_back(step[h] * static_cast<float>(capacity - t));
      }
    }
  }
  CacheView view() {
    const u32 capacity = *std::max_element(lengths.begin(), lengths.end());
    const auto tensor =
        strided(rows.data(), {.kv_heads = lengths.size(), .tokens = capacity, .dim = 2});
    return KVCache(tensor, tensor).set_lengths(lengths.data()).view();
  }
  Observation seen() const {
    Observation seen;
    seen.external = Ragged<const float>(scores.data(), u64{scores.size() / lengths.size()});
    return seen;
  }
};

template <class A>
Counts planned(Heads& heads, const A& allocator, const Budget& slots, PlanOptions options = {}) {
  options.protection = {.sinks = 4, .recent = 8};
  Workspace workspace;
  CompressionPlan plan;
  const auto policy = compose(ExternalScorer{}, allocator, EvictReducer{});
  REQUIRE(policy.plan(heads.view(), heads.seen(), slots, workspace, plan, options));
  return {plan.length, plan.length + plan.segments};
}

}  // namespace

TEST_CASE("nominal slots are not capped, those of a fraction are", "[budget]") {
  CHECK(Budget::slots(1000).nominal_for(10) == 1000);
  CHECK(Budget::slots(1000).slots_for(10) == 10);
  CHECK(Budget::slots(std::size_t{1} << 40).nominal_for(10) == 0xffffffffu);
  CHECK(Budget::fraction(0.5).nominal_for(11) == 5);
  CHECK(Budget::fraction(3.0).nominal_for(11) == 11);
}

TEST_CASE("heads that share keep the budget on average, again and again", "[budget]") {
  // What Ada-KV left of two heads at budget 1000, and 36 tokens more each.
  const Counts lengths = {164 + 36, 1836 + 36};
  for (const float flat : {0.001f, 1000.0f}) {
    Heads heads(lengths, {1.0f, flat});
    const Counts ada = planned(heads, AdaKVAllocator{}, Budget::slots(budget));
    CHECK(std::accumulate(ada.begin(), ada.end(), 0u) == 2 * budget);
    const Counts layers = planned(heads, AdaKVLayersAllocator{}, Budget::slots(budget));
    CHECK(layers == ada);
    // A fifth of the budget, as far as there are tokens, is safe: all of the short head.
    CHECK(ada == Counts{200, 1800});
    // No head keeps more than the budget when nothing is shared.
    CHECK(planned(heads, UniformAllocator{}, Budget::slots(budget)) == Counts{200, 1000});
    const Counts pyramid =
        planned(heads, PyramidAllocator<AdaKVAllocator>{}, Budget::slots(budget));
    CHECK(pyramid == ada);
    CHECK(planned(heads, PyramidAllocator<>{}, Budget::slots(budget)) == Counts{200, 1800});
  }
  for (const SafeguardMode mode : {SafeguardMode::exact_mix, SafeguardMode::paper_literal}) {
    Heads heads(lengths, {1.0f, 2.0f});
    const Counts mixed = planned(heads, AdaKVAllocator{.mode = mode}, Budget::slots(budget));
    CHECK(mixed[0] + mixed[1] == 2 * budget);
  }
}

TEST_CASE("the safe share is one of the budget, at most the length", "[budget]") {
  // Nothing in the second head scores; a fifth of 1000 is safe there, 150 tokens are all it has.
  Model long_head({layer_of({1500, 900}, {1.0f, 0.0f})});
  REQUIRE(long_head.run(AdaKVAllocator{.safeguard = 0.2f}));
  CHECK(long_head.limits[0] == Counts{1500, 500});
  Model scarce({layer_of({3000, 900}, {1.0f, 0.0f})});
  REQUIRE(scarce.run(AdaKVAllocator{.safeguard = 0.2f}));
  CHECK(scarce.limits[0] == Counts{1800, 200});
  Model short_head({layer_of({3000, 150}, {1.0f, 0.0f})});
  REQUIRE(short_head.run(AdaKVAllocator{.safeguard = 0.2f}));
  CHECK(short_head.limits[0] == Counts{1850, 150});
  REQUIRE(short_head.run(AdaKVAllocator{.safeguard = 0.0f}));
  // All of the short head is safe at 1; without a safeguard it gets nothing that others want.
  Model none({layer_of({3000, 150}, {1.0f, 0.0f})});
  REQUIRE(none.run(AdaKVAllocator{.safeguard = 0.0f}));
  CHECK(none.limits[0] == Counts{1999, 1});
  Model all({layer_of({3000, 150}, {1.0f, 0.0f})});
  REQUIRE(all.run(AdaKVAllocator{.safeguard = 1.0f}));
  CHECK(all.limits[0] == Counts{1850, 150});
}

TEST_CASE("layers share, or not", "[budget]") {
  const std::vector<Layer> layers = {layer_of({300, 200}, {1.0f, 1.0f}),
                                     layer_of({3000, 2500}, {1.0f, 1.0f})};
  Model apart(layers);
  REQUIRE(apart.run(AdaKVAllocator{}));
  CHECK(apart.limits[0] == Counts{300, 200});
  CHECK(apart.limits[1][0] + apart.limits[1][1] == 2000);
  Model together(layers);
  REQUIRE(together.run(AdaKVLayersAllocator{}));
  CHECK(together.total() == 4000);
  Model uniform(layers);
  REQUIRE(uniform.run(UniformAllocator{}));
  CHECK(uniform.limits == std::vector<Counts>{{300, 200}, {1000, 1000}});
}

TEST_CASE("a pyramid that was compressed keeps its shares", "[budget]") {
  // Four layers prefilled with 5000 tokens, then compressed, then 64 tokens more: three times.
  for (const bool shared : {false, true}) {
    std::vector<Counts> lengths(4, Counts{5000, 5000});
    std::vector<Counts> first;
    for (u32 round = 0; round < 4; ++round) {
      std::vector<Layer> layers;
      for (u32 l = 0; l < 4; ++l) layers.push_back(layer_of(lengths[l], {1.0f, 3.0f}));
      Model model(layers, {4, 32});
      model.num_layers = 4;
      REQUIRE((shared ? model.run(PyramidAllocator<AdaKVAllocator>{})
                      : model.run(PyramidAllocator<>{})));
      CHECK(model.total() == 8 * budget);
      for (u32 l = 0; l < 4; ++l) {
        CHECK(model.limits[l][0] + model.limits[l][1] ==
              2 * pyramid_slots(PyramidForm::exact, budget, 5000, 36, 20, l, 4));
      }
      if (round == 0) first = model.limits;
      if (!shared) CHECK(model.limits == first);
      lengths = model.limits;
      for (Counts& layer : lengths) {
        for (u32& length : layer) length += 64;
      }
    }
  }
}

TEST_CASE("everything fits when the group's slots cover it", "[budget]") {
  Heads heads({1500, 400}, {1.0f, 1.0f});
  const PlanOptions options;
  const auto without_observation = [&](const auto& allocator, const Budget& slots) {
    Workspace workspace;
    CompressionPlan plan;
    const auto policy = compose(ExternalScorer{}, allocator, EvictReducer{});
    const Status status = policy.plan(heads.view(), Observation{}, slots, workspace, plan, options);
    if (status) CHECK(Counts(plan.length, plan.length + 2) == heads.lengths);
    return status;
  };
  // 1900 tokens: 950 a head cover them where heads share.
  CHECK(without_observation(AdaKVAllocator{}, Budget::slots(950)));
  CHECK(without_observation(AdaKVLayersAllocator{}, Budget::slots(950)));
  CHECK(without_observation(PyramidAllocator<AdaKVAllocator>{}, Budget::slots(950)));
  CHECK(without_observation(AdaKVAllocator{}, Budget::slots(949)) ==
        StatusCode::missing_observation);
  CHECK(without_observation(UniformAllocator{}, Budget::slots(1499)) ==
        StatusCode::missing_observation);
  CHECK(without_observation(UniformAllocator{}, Budget::slots(1500)));
  CHECK(without_observation(AdaKVAllocator{}, Budget::fraction(0.99)) ==
        StatusCode::missing_observation);
  CHECK(without_observation(AdaKVAllocator{}, Budget::fraction(1.0)));
  // Heads of different lengths can't keep everything with one count for all.
  PlanOptions equal;
  equal.sharing = Sharing::equal_count();
  CHECK(planned(heads, AdaKVAllocator{}, Budget::slots(2000), equal) == Counts{400, 400});
}

TEST_CASE("an allocator of the caller's never gets past the lengths", "[budget]") {
  struct AsGiven {
    Status allocate(std::span<LayerLimits>, Context&) const noexcept { return {}; }
  };
  struct Strict {
    Status reduce(const CacheView& cache, const Scores& scores, const u32* limit, Context& context,
                  CompressionPlan& plan) const noexcept {
      for (u32 s = 0; s < cache.segments; ++s) {
        if (limit[s] > cache.length(s)) return StatusCode::invalid_length;
      }
      return EvictReducer{}.reduce(cache, scores, limit, context, plan);
    }
  };
  Heads heads({1500, 400}, {1.0f, 1.0f});
  Workspace workspace;
  CompressionPlan plan;
  REQUIRE(compose(ExternalScorer{}, AsGiven{}, Strict{})
              .plan(heads.view(), heads.seen(), Budget::slots(1000), workspace, plan));
  CHECK(Counts(plan.length, plan.length + 2) == Counts{1000, 400});
}

TEST_CASE("budgets below the protection are refused where they always were", "[budget]") {
  Model model({layer_of({100, 100}, {1.0f, 1.0f}, 30)}, {4, 32});
  CHECK(model.run(AdaKVAllocator{}) == StatusCode::budget_below_protected);
  CHECK(model.run(UniformAllocator{}) == StatusCode::budget_below_protected);
  CHECK(model.limits[0] == Counts{30, 30});
  // A head of ten tokens leaves 20 slots to one that needs 36: enough where heads share.
  Model ragged({layer_of({100, 10}, {1.0f, 1.0f}, 30)}, {4, 32});
  CHECK(ragged.run(UniformAllocator{}) == StatusCode::budget_below_protected);
  CHECK(ragged.limits[0] == Counts{30, 30});
  CHECK(ragged.run(PyramidAllocator<>{}) == StatusCode::budget_below_protected);
  CHECK(ragged.limits[0] == Counts{30, 30});
  REQUIRE(ragged.run(AdaKVAllocator{}));
  CHECK(ragged.limits[0] == Counts{50, 10});
}

TEST_CASE("every token's own number of observers", "[observe]") {
  Heads heads({5, 3}, {1.0f, 1.0f});
  const CacheView cache = heads.view();
  const std::vector<float> mass = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<float> counts = {0.0f, 1.4f, 1.6f, 1e12f, -3.0f, std::nanf(""), 7.0f, 0.5f};
  const u64 first[] = {0, 5, 8};
  std::vector<float> rank(8), copied(8);
  std::vector<u32> observers(8);
  Scores scores;
  scores.segments = 2;
  scores.lengths = heads.lengths.data();
  scores.mass = Ragged<float>(copied.data(), first);
  scores.observers = Ragged<u32>(observers.data(), first);
  Workspace workspace;
  const PlanOptions options;
  Context context{workspace, options};
  Observation seen = observe_mass(Ragged<const float>(mass.data(), first),
                                  Ragged<const float>(counts.data(), first));
  seen.observers = 3;  // the array leads
  REQUIRE(detail::observe_mass_into(cache, seen, GroupReduction::mean, context, scores));
  CHECK(scores.has_observers);
  CHECK(copied == mass);
  CHECK(observers == Counts{1, 1, 2, 4294967040u, 1, 1, 7, 1});
  CHECK(scores.mass_per_observer(1, 1) == 1.0f);
  // Without room for them, and without the array, things are as they were.
  scores.observers = {};
  REQUIRE(detail::observe_mass_into(cache, seen, GroupReduction::mean, context, scores));
  CHECK_FALSE(scores.has_observers);
  scores.observers = Ragged<u32>(observers.data(), first);
  seen.mass_observers = {};
  CacheView whole = cache;
  whole.next_position = 5;
  REQUIRE(detail::observe_mass_into(whole, seen, GroupReduction::mean, context, scores));
  CHECK(observers == Counts{3, 3, 3, 2, 1, 3, 2, 1});
}
