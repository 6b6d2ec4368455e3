// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

using namespace kvlean;

namespace {

// Reducers may turn keys: any width will do, an odd last element stays as it is.
constexpr RopeSpec rope = [] {
  RopeSpec spec;
  spec.rotary_dims = 2;
  return spec;
}();

// Layers with K, V and queries of a random shape; every policy of the tables runs over them.
struct Model {
  u32 layers, heads, group, tokens, dim, window;
  std::vector<std::vector<float>> keys, values, queries_;
  std::vector<CacheView> views;
  std::vector<Observation> seen;

  explicit Model(std::mt19937& random) {
    const auto pick = [&](u32 low, u32 high) {
      return std::uniform_int_distribution<u32>(low, high)(random);
    };
    layers = pick(1, 3);
    heads = pick(1, 4);
    group = pick(1, 3);
    tokens = pick(1, 90);
    dim = pick(2, 20);
    window = pick(1, std::min(tokens, 40u));
    std::normal_distribution<float> normal;
    for (u32 l = 0; l < layers; ++l) {
      const auto fill = [&](std::size_t count) {
        std::vector<float> data(count);
        for (float& x : data) x = normal(random);
        return data;
      };
      keys.push_back(fill(std::size_t{heads} * tokens * dim));
      values.push_back(fill(std::size_t{heads} * tokens * dim));
      queries_.push_back(fill(std::size_t{heads} * group * tokens * dim));
      // Neighbours alike, as in real keys.
      for (std::size_t i = dim; i < keys[l].size(); ++i) keys[l][i] += 0.8f * keys[l][i - dim];
    }
    for (u32 l = 0; l < layers; ++l) {
      views.push_back(
          KVCache(strided(keys[l].data(), {.kv_heads = heads, .tokens = tokens, .dim = dim}),
                  strided(values[l].data(), {.kv_heads = heads, .tokens = tokens, .dim = dim}))
              .set_origin({.sequence = 0, .layer = l, .head = 0})
              .set_rope(&rope)
              .view());
      const auto rows =
          strided(queries_[l].data(), {.heads = heads * group, .tokens = tokens, .dim = dim});
      seen.push_back(observe_prefill(rows, window));
    }
  }
  PlanShape shape() const {
    return {.num_layers = layers,
            .num_kv_heads = heads,
            .num_query_heads = heads * group,
            .tokens = tokens,
            .key_dim = dim};
  }
};

std::vector<std::string> compositions() {
  std::vector<std::string> names;
  for (const auto& policy : policy_names) names.emplace_back(policy.name);
  for (const auto& scorer : scorer_names) {
    if (scorer.name == "external") continue;
    for (const auto& allocator : allocator_names) {
      for (const auto& reducer : reducer_names) {
        names.push_back(std::string(scorer.name) + "+" + std::string(allocator.name) + "+" +
                        std::string(reducer.name));
      }
    }
  }
  return names;
}

}  // namespace

TEST_CASE("Every composition gives valid plans within its limits, in the bytes promised") {
  std::mt19937 random(7);
  const std::vector<std::string> names = compositions();
  double fullest = 0.0;
  for (int round = 0; round < 60; ++round) {
    Model model(random);
    std::vector<std::byte> memory(plan_bytes_required(model.shape()));
    const Sharing sharings[] = {Sharing::per_head(), Sharing::equal_count(), Sharing::same_tokens(),
                                Sharing::whole_pages(1 + static_cast<u32>(random() % 8))};
    for (std::size_t n = static_cast<std::size_t>(round) % 3; n < names.size(); n += 3) {
      AnyPolicy policy;
      REQUIRE(make_policy(names[n], policy));
      PlanOptions options;
      options.protection = {.sinks = static_cast<u32>(random() % 5),
                            .recent = static_cast<u32>(random() % 9)};
      options.sharing = sharings[random() % 4];
      const Budget budget = Budget::fraction(static_cast<double>(random() % 101) / 100.0);
      const u32 frozen = static_cast<u32>(random() % 3) == 0 ? static_cast<u32>(random() % 6) : 0;
      std::vector<CacheView> views = model.views;
      // Half of the time as if compressed before: ragged, with gaps in the positions, with mass.
      const bool compressed = random() % 2 == 0;
      std::vector<u32> lengths(model.heads, model.tokens);
      std::vector<i32> positions(std::size_t{model.heads} * model.tokens);
      std::vector<float> log_mass(positions.size());
      if (compressed) {
        for (u32& length : lengths) length = static_cast<u32>(random() % (model.tokens + 1));
        for (u32 s = 0; s < model.heads; ++s) {
          i32 position = -1;
          for (u32 t = 0; t < model.tokens; ++t) {
            position += 1 + static_cast<i32>(random() % 3);
            positions[std::size_t{s} * model.tokens + t] = position;
            log_mass[std::size_t{s} * model.tokens + t] = static_cast<float>(random() % 4);
          }
        }
      }
      u64 nominal = 0;
      for (CacheView& view : views) {
        if (compressed) {
          view.lengths = lengths.data();
          view.positions = Ragged<i32>(positions.data(), u64{model.tokens});
          view.log_mass = Ragged<float>(log_mass.data(), u64{model.tokens});
          view.next_position = static_cast<i32>(3 * model.tokens);
        }
        const u32 shortest = *std::min_element(lengths.begin(), lengths.end());
        view.frozen = std::min(frozen, shortest);
        for (u32 s = 0; s < model.heads; ++s) nominal += budget.slots_for(view.length(s));
      }
      Workspace workspace{std::span<std::byte>(memory)};
      std::vector<CompressionPlan> plans(model.layers);
      INFO(names[n] << " sharing " << static_cast<int>(options.sharing.kind) << " budget "
                    << budget.value() << " tokens " << model.tokens << " heads " << model.heads);
      const Status status = policy.plan(views, model.seen, budget, workspace, plans, options);
      if (!status) {
        const bool unshared = compressed && options.sharing.shares_tokens() && model.heads > 1;
        REQUIRE((status == StatusCode::budget_below_protected ||
                 (unshared && status == StatusCode::shape_mismatch)));
        continue;
      }
      fullest = std::max(fullest, static_cast<double>(workspace.high_water_bytes()) /
                                      static_cast<double>(memory.size()));
      u64 slots = 0;
      for (u32 l = 0; l < model.layers; ++l) {
        const CompressionPlan& plan = plans[l];
        REQUIRE(validate_plan(plan, views[l]));
        slots += plan.num_slots();
        for (u32 s = 0; s < model.heads; ++s) {
          // Protected tokens are anchors with their own keys.
          for (u32 t = 0; t < views[l].length(s); ++t) {
            if (!options.protection.covers(t, views[l].length(s), views[l].frozen)) continue;
            const u32* begin = plan.anchor + plan.first[s];
            const u32* at = std::lower_bound(begin, begin + plan.length[s], t);
            REQUIRE((at != begin + plan.length[s] && *at == t));
            const u64 slot = static_cast<u64>(at - plan.anchor);
            if ((plan.needs & needs_moved_keys) != 0) REQUIRE(plan.key_self_weight(slot) == 1.0f);
          }
          if (options.sharing.kind != SharingKind::per_head && names[n] != "full") {
            REQUIRE(plan.length[s] == plan.length[0]);
          }
          if (options.sharing.shares_tokens() && names[n] != "full") {
            REQUIRE(
                std::equal(plan.anchor, plan.anchor + plan.length[0], plan.anchor + plan.first[s]));
          }
        }
        if (options.sharing.kind == SharingKind::whole_pages) {
          REQUIRE(plan.page_tokens == options.sharing.page_tokens);
        }
      }
      if (names[n] != "full") REQUIRE(slots <= nominal);
      const bool exact = names[n].find("threshold") == std::string::npos &&
                         names[n].find("paper") == std::string::npos && names[n] != "full" &&
                         options.sharing.kind == SharingKind::per_head;
      if (exact) REQUIRE(slots == nominal);
    }
  }
  CHECK(fullest > 0.2);  // the promise is a bound, not a guess into the blue
}

TEST_CASE("A compressed cache compresses again, and no mass is lost where it is counted") {
  std::mt19937 random(11);
  for (int round = 0; round < 40; ++round) {
    Model model(random);
    if (model.tokens < 24) continue;
    PlanOptions options;
    options.protection = {.sinks = 2, .recent = 4};
    for (const char* name : {"kvmerger_mass", "h2o+adakv+kvmerger_mass", "knorm+adakv+massfold"}) {
      AnyPolicy policy;
      REQUIRE(make_policy(name, policy));
      Workspace workspace;
      RaggedKVCache small;
      REQUIRE(small.allocate({.kv_heads = model.heads,
                              .key_dim = model.dim,
                              .value_dim = model.dim,
                              .layout = RaggedLayout::fixed,
                              .capacity_per_head = model.tokens,
                              .log_mass = true}));
      REQUIRE(policy.compress(model.views[0], small, model.seen[0], Budget::fraction(0.6),
                              workspace, options));
      const auto mass = [&](const CacheView& view, u32 s) {
        double sum = 0.0;
        for (u32 t = 0; t < view.length(s); ++t) sum += std::exp(view.log_mass(s, t));
        return sum;
      };
      CompressionPlan plan;
      // The second time: scores from an engine, as the first queries are gone.
      std::vector<float> received(std::size_t{model.heads} * model.tokens);
      for (float& x : received) x = 0.1f + static_cast<float>(random() % 1000);
      const Observation seen =
          observe_mass(Ragged<const float>(received.data(), small.view().positions.first));
      std::vector<double> before;
      for (u32 s = 0; s < model.heads; ++s) before.push_back(mass(small.view(), s));
      REQUIRE(policy.plan(small, seen, Budget::fraction(0.7), workspace, plan, options));
      REQUIRE(validate_plan(plan, small.view()));
      const bool dropped = plan.slots_evicted != nullptr;
      const std::vector<u32> evicted(
          plan.slots_evicted, dropped ? plan.slots_evicted + model.heads : plan.slots_evicted);
      REQUIRE(apply(plan, small, in_place));
      const bool counted = std::string(name).find("kvmerger") != std::string::npos;
      for (u32 s = 0; s < model.heads; ++s) {
        if (counted && evicted[s] == 0)
          CHECK(mass(small.view(), s) == Approx(before[s]).epsilon(1e-4));
      }
      CHECK(validate(small));
    }
  }
}

TEST_CASE("In place equals out of place for every reducer, bit for bit") {
  std::mt19937 random(23);
  for (int round = 0; round < 60; ++round) {
    Model model(random);
    const auto& reducer = reducer_names[random() % std::size(reducer_names)];
    AnyPolicy policy;
    REQUIRE(make_policy("h2o+adakv+" + std::string(reducer.name), policy));
    PlanOptions options;
    options.protection = {.sinks = 1, .recent = 2};
    Workspace workspace;
    CompressionPlan plan;
    if (!policy.plan(model.views[0], model.seen[0], Budget::fraction(0.4), workspace, plan,
                     options)) {
      continue;
    }
    const bool mass = (plan.needs & needs_log_mass) != 0;
    RaggedKVCache small;
    REQUIRE(small.allocate({.kv_heads = model.heads,
                            .key_dim = model.dim,
                            .value_dim = model.dim,
                            .total_slots = plan.num_slots(),
                            .log_mass = mass}));
    REQUIRE(apply(plan, model.views[0], small));
    CacheView view = model.views[0];
    std::vector<u32> lengths(model.heads, model.tokens);
    std::vector<float> log_mass(std::size_t{model.heads} * model.tokens, 0.0f);
    view.lengths = lengths.data();
    if (mass) view.log_mass = Ragged<float>(log_mass.data(), u64{model.tokens});
    REQUIRE(apply(plan, view, in_place));
    const CacheView other = small.view();
    for (u32 s = 0; s < model.heads; ++s) {
      REQUIRE(view.length(s) == other.length(s));
      for (u32 t = 0; t < view.length(s); ++t) {
        const std::size_t bytes = model.dim * sizeof(float);
        REQUIRE(std::memcmp(row_address(view.keys, s, t), row_address(other.keys, s, t), bytes) ==
                0);
        REQUIRE(std::memcmp(row_address(view.values, s, t), row_address(other.values, s, t),
                            bytes) == 0);
        if (mass) REQUIRE(view.log_mass(s, t) == other.log_mass(s, t));
      }
    }
  }
}
