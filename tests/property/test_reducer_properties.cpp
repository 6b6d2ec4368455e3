// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_layer.hpp"
#include "tests/support/reduce_layer.hpp"

using namespace kvlean;

TEST_CASE("KVMerger's weights sum to one and the pivot's is the largest") {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    RandomLayer layer(1 + static_cast<u32>(random() % 4), 20 + static_cast<u32>(random() % 100),
                      static_cast<u32>(round));
    for (const Sigma sigma : {Sigma::fixed, Sigma::mean_distance, Sigma::rms}) {
      const KVMergerPolicy policy(
          KVMergerReducer{.form = round % 2 == 0 ? KVMergerForm::slots : KVMergerForm::threshold,
                          .sigma = sigma,
                          .fixed_sigma = 2.0f});
      Workspace workspace;
      CompressionPlan plan;
      PlanOptions options = unprotected(3);
      REQUIRE(policy.plan(layer.cache(), layer.seen(), Budget::fraction(0.4), workspace, plan,
                          options));
      for (u64 slot = 0; plan.has_terms() && slot < plan.num_slots(); ++slot) {
        double sum = plan.self_weight[slot];
        for (u64 t = plan.term_begin[slot]; t < plan.term_end[slot]; ++t) {
          CHECK(plan.term_weight[t] >= 0.0f);
          CHECK(plan.term_weight[t] <= plan.self_weight[slot]);
          sum += plan.term_weight[t];
        }
        CHECK(sum == Approx(1.0).margin(1e-5));
      }
    }
  }
}

TEST_CASE("Permuting heads permutes the plans of every reducer") {
  std::mt19937 random(5);
  for (int round = 0; round < 20; ++round) {
    RandomLayer layer(3, 70, static_cast<u32>(round));
    RandomLayer turned = layer;
    const std::size_t head = std::size_t{layer.tokens} * layer.dim;
    for (auto* data : {&turned.keys, &turned.values}) {
      std::rotate(data->begin(), data->begin() + static_cast<std::ptrdiff_t>(head), data->end());
    }
    std::rotate(turned.rows.begin(),
                turned.rows.begin() + static_cast<std::ptrdiff_t>(head * layer.group),
                turned.rows.end());
    for (const auto& reducer : reducer_names) {
      AnyPolicy policy;
      REQUIRE(make_policy("h2o+adakv+" + std::string(reducer.name), policy));
      Workspace workspace;
      CompressionPlan a, b;
      REQUIRE(policy.plan(layer.cache(), layer.seen(), Budget::fraction(0.4), workspace, a,
                          unprotected(5)));
      REQUIRE(policy.plan(turned.cache(), turned.seen(), Budget::fraction(0.4), workspace, b,
                          unprotected(5)));
      INFO(reducer.name);
      for (u32 s = 0; s < 3; ++s) CHECK(anchors(a, (s + 1) % 3) == anchors(b, s));
      CHECK(a.num_terms == b.num_terms);
    }
  }
}

TEST_CASE("Frozen tokens that nobody sees do not hinder any reducer, and stay as they are") {
  const float unseen[] = {-std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()};
  for (const auto& reducer : reducer_names) {
    for (const char* scorer : {"h2o", "knorm"}) {
      INFO(scorer << " with " << reducer.name);
      RandomLayer layer(2, 70, 9);
      const RandomLayer before = layer;
      std::vector<float> mass(std::size_t{2} * 70, 0.25f);
      mass[1] = unseen[0];
      mass[70] = unseen[1];
      auto cache = layer.cache();
      cache.set_log_mass(Ragged<float>(mass.data(), u64{70})).set_frozen(2);
      AnyPolicy policy;
      REQUIRE(make_policy(std::string(scorer) + "+adakv+" + std::string(reducer.name), policy));
      Workspace workspace;
      std::vector<u32> lengths(2, 70);
      cache.set_lengths(lengths.data());
      REQUIRE(policy.compress(cache, layer.seen(), Budget::fraction(0.5), workspace,
                              unprotected(4)) == Status());
      CHECK(lengths[0] + lengths[1] < 140);
      CHECK(mass[1] == unseen[0]);
      CHECK(std::isnan(mass[70]));
      for (u32 s = 0; s < 2; ++s) {
        const std::size_t at = std::size_t{s} * 70 * layer.dim;
        const std::size_t bytes = 2 * layer.dim * sizeof(float);
        CHECK(std::memcmp(&layer.keys[at], &before.keys[at], bytes) == 0);
        CHECK(std::memcmp(&layer.values[at], &before.values[at], bytes) == 0);
      }
    }
  }
}

TEST_CASE("A head's values are the same bits whatever other heads merge") {
  constexpr u32 tokens = 150;
  std::mt19937 random(11);
  std::exponential_distribution<float> heavy;
  for (u32 seed = 0; seed < 8; ++seed) {
    const RandomLayer layer(3, tokens, seed);
    std::vector<float> received(std::size_t{3} * tokens);
    for (float& x : received) x = heavy(random);
    for (const char* reducer : {"cam", "kvmerger", "massfold", "d2o"}) {
      AnyPolicy policy;
      REQUIRE(make_policy("h2o+uniform+" + std::string(reducer), policy));
      // Of a shorter first head fewer tokens are merged.
      const auto values_of = [&](u32 first_length) {
        RandomLayer copy = layer;
        auto cache = copy.cache();
        Workspace workspace;
        std::vector<u32> lengths{first_length, tokens, tokens};
        std::vector<float> mass(received.size());
        cache.set_lengths(lengths.data()).set_log_mass(Ragged<float>(mass.data(), u64{tokens}));
        const Observation seen = observe_mass(Ragged<const float>(received.data(), u64{tokens}));
        REQUIRE(policy.compress(cache, seen, Budget::slots(60), workspace, unprotected(5)));
        return copy.values;
      };
      const std::vector<float> a = values_of(tokens);
      const std::vector<float> b = values_of(tokens - 37);
      const std::size_t head = std::size_t{tokens} * layer.dim;
      INFO(reducer << ", seed " << seed);
      CHECK(std::memcmp(&a[head], &b[head], 2 * head * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("H2O keeps the newest half and stays ascending; a budget of everything is the identity") {
  RandomLayer layer(2, 90);
  Workspace workspace;
  for (u32 slots = 5; slots <= 90; ++slots) {
    CompressionPlan plan;
    REQUIRE(H2OPolicy{}.plan(layer.cache(), layer.seen(), Budget::slots(slots), workspace, plan,
                             unprotected(1)));
    for (u32 s = 0; s < 2; ++s) {
      const std::vector<u32> kept = anchors(plan, s);
      REQUIRE(kept.size() == slots);
      CHECK(std::is_sorted(kept.begin(), kept.end()));
      for (u32 back = 1; back <= slots / 2; ++back) CHECK(kept[slots - back] == 90 - back);
    }
    workspace.reset();
  }
}

TEST_CASE("CaM changes no key, and no value but those of the receivers") {
  for (u32 seed = 0; seed < 30; ++seed) {
    RandomLayer layer(2, 64, seed);
    const RandomLayer before = layer;
    auto cache = layer.cache();
    Workspace workspace;
    CompressionPlan plan;
    const auto policy = compose(H2OScorer{}, UniformAllocator{}, CaMReducer{.receivers = 3});
    REQUIRE(policy.plan(cache, layer.seen(), Budget::slots(60), workspace, plan, unprotected(2)));
    CHECK((plan.needs & needs_moved_keys) == 0);
    REQUIRE(apply(plan, cache, in_place));
    const std::size_t bytes = layer.dim * sizeof(float);
    for (u32 s = 0; s < 2; ++s) {
      for (u32 j = 0; j < plan.length[s]; ++j) {
        const u64 slot = plan.first[s] + j;
        const std::size_t from = (std::size_t{s} * 64 + plan.anchor[slot]) * layer.dim;
        const std::size_t to = (std::size_t{s} * 64 + j) * layer.dim;
        CHECK(std::memcmp(&layer.keys[to], &before.keys[from], bytes) == 0);
        const bool receives = plan.has_terms() && plan.term_begin[slot] != plan.term_end[slot];
        if (!receives) CHECK(std::memcmp(&layer.values[to], &before.values[from], bytes) == 0);
        const bool near_a_dropped = [&] {  // the next three slots after a dropped token
          for (u32 back = 0; back < 3 && back <= j; ++back) {
            const u32 here = plan.anchor[slot - back];
            const u32 previous = back < j ? plan.anchor[slot - back - 1] + 1 : 0;
            if (here != previous) return true;
          }
          return false;
        }();
        if (receives) CHECK(near_a_dropped);
      }
    }
  }
}

TEST_CASE("Runs of equal keys: log count gives full attention back, no log mass does not") {
  std::mt19937 random(17);
  for (u32 round = 0; round < 30; ++round) {
    RandomLayer layer(2, 60, round);
    // Runs of one to six tokens with the same key.
    for (u32 s = 0; s < 2; ++s) {
      for (u32 t = 0, left = 0; t < 60; ++t, --left) {
        if (left == 0) left = 1 + static_cast<u32>(random() % 6);
        float* key = &layer.keys[(std::size_t{s} * 60 + t) * layer.dim];
        if (left > 1 && t + 1 < 60) std::memcpy(key + layer.dim, key, layer.dim * sizeof(float));
      }
    }
    const auto cache = layer.cache();
    std::vector<float> question(std::size_t{4} * 8);
    for (float& x : question) x = std::normal_distribution<float>()(random);
    const Queries step =
        queries(strided(question.data(), {.heads = 4, .tokens = 1, .dim = 8}), Mask::none);
    std::vector<float> full(32), merged(32);
    REQUIRE(attend(step, cache, AttentionOutput{.values = full.data()}));
    for (const LogMass mass : {LogMass::log_count, LogMass::none}) {
      const KVMergerPolicy policy(KVMergerReducer{.form = KVMergerForm::threshold,
                                                  .epsilon = 0.99999f,
                                                  .log_mass = mass,
                                                  .recent_tokens = 0,
                                                  .heavy_tokens = 0});
      Workspace workspace;
      CompressionPlan plan;
      REQUIRE(
          policy.plan(cache, layer.seen(), Budget::fraction(1.0), workspace, plan, unprotected()));
      RaggedKVCache small;
      REQUIRE(small.allocate({.kv_heads = 2,
                              .key_dim = 8,
                              .value_dim = 8,
                              .total_slots = plan.num_slots(),
                              .log_mass = true}));
      REQUIRE(plan.num_slots() < 100);
      REQUIRE(apply(plan, cache, small));
      REQUIRE(attend(step, small, AttentionOutput{.values = merged.data()}));
      float worst = 0.0f;
      for (u32 i = 0; i < 32; ++i) worst = std::max(worst, std::abs(full[i] - merged[i]));
      if (mass == LogMass::log_count) {
        CHECK(worst < 1e-4f);
      } else {
        CHECK(worst > 1e-2f);
      }
    }
  }
}
