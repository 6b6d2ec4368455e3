// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/support/catch.hpp"
#include "tests/support/layouts.hpp"
#include "tests/support/stream.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

using SeenTokens = std::vector<u32>;

/// The outputs of a step against attention in double over `history` and the step's own tokens.
void check_exact(const StreamModel& model, const std::vector<float>& outputs,
                 const SeenTokens& history, u32 first, u32 count) {
  std::size_t at = 0;
  double worst = 0.0;
  for (u32 l = 0; l < model.shape.layers; ++l) {
    for (u32 h = 0; h < model.shape.query_heads; ++h) {
      SeenTokens seen = history;
      for (u32 i = 0; i < count; ++i) {
        seen.push_back(first + i);
        for (const double x : exact_attention(model, l, h, first + i, seen).output) {
          worst = std::max(worst, std::abs(x - static_cast<double>(outputs[at++])));
        }
      }
    }
  }
  REQUIRE(worst < 5e-6);
}

}  // namespace

TEST_CASE("random schedules of a cache that keeps everything are exact attention") {
  for (u32 seed = 1; seed <= 12; ++seed) {
    Random random(seed);
    StreamModel model;
    model.seed = seed;
    model.shape.layers = random.between(1, 3);
    model.shape.kv_heads = random.between(1, 3);
    model.shape.query_heads = model.shape.kv_heads * random.between(1, 3);
    model.shape.key_dim = random.between(1, 9);
    model.shape.value_dim = random.between(1, 9);
    BudgetedOptions options;
    options.budget_slots = 90;
    options.window = random.between(0, 5);
    options.step_tokens = random.between(1, 7);
    options.max_tentative = random.between(0, static_cast<u32>(options.step_tokens));
    options.accumulate_mass = random.chance(70);
    options.count_tokens = random.chance(50);
    options.log_mass = random.chance(50);
    BudgetedCache cache(SnapKVPolicy{});
    REQUIRE(cache.allocate(model.shape, options));
    Workspace workspace;
    SeenTokens history;
    u32 token = 0;  // never reused: what was rolled back must not come back
    while (history.size() + options.step_tokens <= 90) {
      CAPTURE(seed, history.size());
      const u32 count = random.between(1, static_cast<u32>(options.step_tokens));
      Status status;
      const auto outputs = run_step(cache, model, token, count, workspace, status);
      REQUIRE(status);
      check_exact(model, outputs, history, token, count);
      const bool revocable = count <= options.max_tentative;
      const u32 accepted = revocable ? random.between(0, count) : count;
      if (revocable && random.chance(20)) {
        REQUIRE(cache.rollback());
      } else {
        REQUIRE(cache.commit(accepted, workspace));
        for (u32 i = 0; i < accepted; ++i) history.push_back(token + i);
      }
      token += count;
      REQUIRE(cache.tokens_seen() == history.size());
      REQUIRE(cache.next_position() == static_cast<i32>(history.size()));
      REQUIRE(cache.seen(0).window.count == std::min(options.window, history.size()));
      if (random.chance(10)) REQUIRE(cache.compress(workspace));  // everything fits: nothing to do
      if (options.accumulate_mass) {
        double mass = 0.0;
        for (u32 t = 0; t < cache.length(0, 0); ++t) {
          mass += static_cast<double>(cache.mass(0)(0, t));
        }
        REQUIRE(mass == Approx(history.size()).epsilon(1e-4));
      }
    }
  }
}

TEST_CASE("whatever the schedule and the policy, the budget holds") {
  const char* names[] = {"h2o",
                         "snapkv+adakv_layers+evict",
                         "rkv",
                         "tova",
                         "streaming_llm",
                         "random+adakv+cam",
                         "h2o+adakv+kvmerger_mass",
                         "kvmerger_threshold",
                         "snapkv+pyramid_adakv+massfold",
                         "h2o+uniform+d2o",
                         "observed_attention+adakv+massfold"};
  const RopeSpec rope;
  for (u32 seed = 1; seed <= 33; ++seed) {
    Random random(seed);
    const char* name = names[seed % std::size(names)];
    AnyPolicy policy;
    REQUIRE(make_policy(name, policy));
    StreamModel model;
    model.seed = seed;
    model.sharpness = 4.0f;
    model.shape.layers = random.between(1, 3);
    BudgetedOptions options;
    options.plan.protection = {random.between(0, 3), random.between(3, 6)};
    options.budget_slots = random.between(12, 24);
    options.window = 3;
    options.log_mass = true;
    options.step_tokens = random.between(1, 9);
    options.compress_every = random.between(1, 6);
    options.max_tentative = random.between(0, static_cast<u32>(options.step_tokens));
    options.spare_slots = random.between(0, 3);
    if (random.chance(40)) {
      options.positions = Positions::contiguous;
      options.rope = &rope;
      options.context_tokens = random.chance(50) ? 150 : 0;
    }
    CAPTURE(seed, name);
    std::vector<std::byte> storage(BudgetedCacheBase::bytes_required(model.shape, options));
    BudgetedCache cache(policy);
    REQUIRE(cache.bind(storage, model.shape, options));
    const std::size_t segments = model.shape.layers * 2;
    const std::size_t longest = segments * (options.budget_slots + options.slack_slots());
    std::vector<std::byte> memory(
        BudgetedCacheBase::workspace_bytes_required(model.shape, options, longest));
    Workspace workspace{std::span<std::byte>(memory)};
    const bool merges = std::string(name).find("cam") == std::string::npos;
    u32 token = 0;
    for (u32 round = 0; round < 60; ++round) {
      const u32 count = random.between(1, static_cast<u32>(options.step_tokens));
      Status status;
      run_step(cache, model, token, count, workspace, status);
      REQUIRE(status);
      const u32 accepted = count <= options.max_tentative ? random.between(0, count) : count;
      REQUIRE(cache.commit(accepted, workspace));
      token += count;
      REQUIRE(cache.total_slots() <=
              segments * (options.budget_slots + options.compress_every - 1));
      if (random.chance(5)) {
        REQUIRE(cache.compress(workspace));
        REQUIRE(cache.total_slots() <= cache.total_budget());
      }
      for (u32 l = 0; l < model.shape.layers; ++l) {
        const CacheView view = cache.layer(l);
        REQUIRE(validate(view));  // finite, ascending, below the next position
        for (u32 h = 0; h < 2; ++h) {
          double mass = 0.0, tokens = 0.0;
          for (u32 t = 0; t < view.length(h); ++t) {
            REQUIRE(cache.mass(l)(h, t) >= 0.0f);
            REQUIRE(cache.observers(l)(h, t) >= 1.0f);
            REQUIRE(cache.observers(l)(h, t) <= static_cast<float>(cache.tokens_seen()));
            mass += static_cast<double>(cache.mass(l)(h, t));
            tokens += static_cast<double>(cache.tokens(l)(h, t));
          }
          const double seen = static_cast<double>(cache.tokens_seen());
          REQUIRE(mass <= seen * 1.0001);
          REQUIRE(tokens <= seen);
          REQUIRE(tokens >= view.length(h));
          if (!merges) REQUIRE(tokens == view.length(h));
        }
      }
      if (options.context_tokens != 0) REQUIRE(cache.next_position() <= 150);
    }
    REQUIRE(cache.compressions() > 5);
  }
}

TEST_CASE("twenty thousand steps in flat memory") {
  StreamModel model;
  model.shape = {.layers = 1, .kv_heads = 1, .query_heads = 1, .key_dim = 4, .value_dim = 4};
  model.sharpness = 3.0f;
  BudgetedOptions options;
  options.budget_slots = 1024;
  options.compress_every = 16;
  std::vector<std::byte> storage(BudgetedCacheBase::bytes_required(model.shape, options));
  std::vector<std::byte> memory(BudgetedCacheBase::workspace_bytes_required(model.shape, options));
  Workspace workspace{std::span<std::byte>(memory)};
  BudgetedCache cache(H2OPolicy{});
  REQUIRE(cache.bind(storage, model.shape, options));
  std::size_t high_water = 0;
  for (u32 t = 0; t < 20000; ++t) {
    const auto k = model.rows(StreamModel::key, 0, t, 1);
    const auto v = model.rows(StreamModel::value, 0, t, 1);
    const auto q = model.rows(StreamModel::query, 0, t, 1);
    float out[4];
    bool good = cache
                    .append(0, model.tensor(StreamModel::key, k, 1),
                            model.tensor(StreamModel::value, v, 1), 1)
                    .ok();
    good = good && cache
                       .attend(0, queries(model.tensor(StreamModel::query, q, 1)),
                               {out, nullptr, 0, 0}, workspace)
                       .ok();
    good = good && cache.commit(workspace).ok();
    good = good && cache.total_slots() <= 1024 + 15 && std::isfinite(out[0]);
    if (!good) FAIL("step " << t);
    if (t == 1100) high_water = workspace.high_water_bytes();
  }
  CHECK(workspace.high_water_bytes() == high_water);
  CHECK(high_water <= memory.size());
  CHECK(cache.next_position() == 20000);
  CHECK(cache.compressions() == (20000 - 1024) / 16);
  CHECK(cache.layer(0).position(0, 0) == 0);
  CHECK(cache.bytes_used() <= storage.size());
}
