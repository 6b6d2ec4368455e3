// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "tests/support/catch.hpp"
#include "tests/support/stream.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

using Model = StreamModel;

BudgetedOptions small_options(std::size_t budget, u32 sinks = 2, u32 recent = 4) {
  BudgetedOptions options;
  options.budget_slots = budget;
  options.window = 4;
  options.plan.protection = {sinks, recent};
  return options;
}

/// Positions that one head holds.
std::vector<u32> held(const BudgetedCacheBase& cache, u32 layer, u32 head) {
  const CacheView view = cache.layer(layer);
  std::vector<u32> result;
  for (u32 t = 0; t < view.length(head); ++t) {
    result.push_back(static_cast<u32>(view.position(head, t)));
  }
  return result;
}

template <class P>
Status stream(BudgetedCache<P>& cache, const Model& model, u32 first, u32 tokens,
              Workspace& workspace, u32 chunk = 1) {
  for (u32 t = first; t < first + tokens; t += chunk) {
    Status status;
    const u32 count = std::min(chunk, first + tokens - t);
    run_step(cache, model, t, count, workspace, status);
    if (!status) return status;
    if (status = cache.commit(workspace); !status) return status;
  }
  return StatusCode::ok;
}

/// Largest difference between a step's outputs and exact attention over `seen[layer][kv_head]`.
double worst_difference(const Model& model, const std::vector<float>& outputs, u32 token,
                        const std::vector<std::vector<std::vector<u32>>>& seen) {
  double worst = 0.0;
  std::size_t at = 0;
  for (u32 l = 0; l < model.shape.layers; ++l) {
    for (u32 h = 0; h < model.shape.query_heads; ++h) {
      const auto exact = exact_attention(model, l, h, token, seen[l][h / model.group()]);
      for (const double x : exact.output) {
        worst = std::max(worst, std::abs(x - static_cast<double>(outputs[at++])));
      }
    }
  }
  return worst;
}

/// H2O as a loop over dense arrays in double: what is held, and the mass of each.
struct DenseH2O {
  struct Head {
    std::vector<u32> tokens;
    std::vector<double> mass;
  };
  const Model& model;
  u32 budget;
  Protection protection;
  std::vector<std::vector<Head>> heads;

  DenseH2O(const Model& m, u32 slots, Protection protect)
      : model(m), budget(slots), protection(protect), heads(m.shape.layers) {
    for (auto& layer : heads) layer.resize(m.shape.kv_heads);
  }
  void step(u32 token, bool evicts = true) {
    for (u32 l = 0; l < heads.size(); ++l) {
      for (u32 h = 0; h < heads[l].size(); ++h) {
        Head& head = heads[l][h];
        head.tokens.push_back(token);
        head.mass.push_back(0.0);
        for (u32 g = 0; g < model.group(); ++g) {
          const auto exact = exact_attention(model, l, h * model.group() + g, token, head.tokens);
          for (std::size_t i = 0; i < head.mass.size(); ++i) {
            head.mass[i] += exact.probability[i] / model.group();
          }
        }
        while (evicts && head.tokens.size() > budget) evict(head);
      }
    }
  }
  void evict(Head& head) const {
    // Half of the budget is for the newest, at least the protected ones.
    const std::size_t recent = std::max<std::size_t>(protection.recent, budget / 2);
    std::size_t least = protection.sinks;
    for (std::size_t i = protection.sinks; i + recent < head.tokens.size(); ++i) {
      if (head.mass[i] < head.mass[least]) least = i;
    }
    head.tokens.erase(head.tokens.begin() + static_cast<std::ptrdiff_t>(least));
    head.mass.erase(head.mass.begin() + static_cast<std::ptrdiff_t>(least));
  }
};

}  // namespace

TEST_CASE("a budgeted cache under its budget is exact attention") {
  Model model;
  BudgetedOptions options = small_options(64);
  options.step_tokens = 7;
  options.max_tentative = 3;
  BudgetedCache cache(H2OPolicy{});
  REQUIRE(cache.allocate(model.shape, options));
  Workspace workspace;
  u32 token = 0;
  for (const u32 count : {7u, 1u, 3u, 5u, 2u, 7u, 1u}) {
    Status status;
    const auto outputs = run_step(cache, model, token, count, workspace, status);
    REQUIRE(status);
    REQUIRE(cache.tentative() == count);
    std::size_t at = 0;
    for (u32 l = 0; l < model.shape.layers; ++l) {
      for (u32 h = 0; h < model.shape.query_heads; ++h) {
        for (u32 i = 0; i < count; ++i) {
          std::vector<u32> seen(token + i + 1);
          std::iota(seen.begin(), seen.end(), 0u);
          for (const double x : exact_attention(model, l, h, token + i, seen).output) {
            REQUIRE_THAT(static_cast<double>(outputs[at++]), WithinAbs(x, 2e-6));
          }
        }
      }
    }
    REQUIRE(cache.commit(workspace));
    token += count;
    CHECK(cache.next_position() == static_cast<i32>(token));
    CHECK(cache.tokens_seen() == token);
    CHECK(cache.total_slots() == 4 * token);
  }
  CHECK(cache.compressions() == 0);
  // Every query spends one unit of attention: mass and observers tell how many there were.
  for (u32 h = 0; h < 2; ++h) {
    double sum = 0.0;
    for (u32 t = 0; t < token; ++t) sum += static_cast<double>(cache.mass(1)(h, t));
    CHECK(sum == Approx(token).epsilon(1e-5));
    CHECK(cache.observers(1)(h, 0) == static_cast<float>(token));
    CHECK(cache.observers(1)(h, token - 1) == 1.0f);
    CHECK(cache.tokens(1)(h, 3) == 1.0f);
  }
}

TEST_CASE("H2O per step equals the dense loop, whether a step can be rolled back or not") {
  Model model;
  model.sharpness = 5.0f;
  for (const std::size_t tentative : {0u, 1u}) {
    BudgetedOptions options = small_options(12);
    options.max_tentative = tentative;
    BudgetedCache cache(H2OPolicy{});
    REQUIRE(cache.allocate(model.shape, options));
    DenseH2O dense(model, 12, options.plan.protection);
    Workspace workspace;
    for (u32 t = 0; t < 90; ++t) {
      CAPTURE(t, tentative);
      Status status;
      const auto outputs = run_step(cache, model, t, 1, workspace, status);
      REQUIRE(status);
      std::vector<std::vector<std::vector<u32>>> seen(2, std::vector<std::vector<u32>>(2));
      for (u32 l = 0; l < 2; ++l) {
        for (u32 h = 0; h < 2; ++h) {
          seen[l][h] = dense.heads[l][h].tokens;
          seen[l][h].push_back(t);
        }
      }
      REQUIRE(worst_difference(model, outputs, t, seen) < 2e-6);
      REQUIRE(cache.commit(workspace));
      dense.step(t);
      for (u32 l = 0; l < 2; ++l) {
        for (u32 h = 0; h < 2; ++h) {
          const auto& head = dense.heads[l][h];
          REQUIRE(held(cache, l, h) == head.tokens);
          for (u32 i = 0; i < head.mass.size(); ++i) {
            REQUIRE_THAT(static_cast<double>(cache.mass(l)(h, i)), WithinAbs(head.mass[i], 1e-4));
            REQUIRE(cache.observers(l)(h, i) == static_cast<float>(t + 1 - head.tokens[i]));
          }
        }
      }
    }
    CHECK(cache.compressions() == 78);
  }
}

TEST_CASE("a prefill in chunks is compressed between them") {
  StreamModel model;
  model.sharpness = 5.0f;
  for (const std::size_t tentative : {0u, 9u}) {
    BudgetedOptions options = small_options(16);
    options.step_tokens = 9;
    options.max_tentative = tentative;
    BudgetedCache cache(H2OPolicy{});
    REQUIRE(cache.allocate(model.shape, options));
    DenseH2O dense(model, 16, options.plan.protection);
    Workspace workspace;
    for (u32 t = 0; t < 90; t += 9) {
      CAPTURE(t, tentative);
      Status status;
      run_step(cache, model, t, 9, workspace, status);
      REQUIRE(status);
      REQUIRE(cache.total_slots() <= 4 * (16 + 9));  // never the full cache
      REQUIRE(cache.commit(workspace));
      for (u32 i = 0; i < 9; ++i) dense.step(t + i, false);
      for (auto& layer : dense.heads) {
        for (auto& head : layer) {
          while (head.tokens.size() > 16) dense.evict(head);
        }
      }
      for (u32 l = 0; l < 2; ++l) {
        for (u32 h = 0; h < 2; ++h) {
          const auto& head = dense.heads[l][h];
          REQUIRE(held(cache, l, h) == head.tokens);
          for (u32 i = 0; i < head.mass.size(); ++i) {
            REQUIRE_THAT(static_cast<double>(cache.mass(l)(h, i)), WithinAbs(head.mass[i], 1e-4));
          }
        }
      }
    }
  }
}

TEST_CASE("an engine's own kernel observes to the same effect") {
  Model model;
  const BudgetedOptions options = small_options(10);
  BudgetedCache attends(H2OPolicy{}), observes(H2OPolicy{}), masses(H2OPolicy{});
  for (auto* cache : {&attends, &observes, &masses}) REQUIRE(cache->allocate(model.shape, options));
  Workspace workspace;
  for (u32 t = 0; t < 40; ++t) {
    Status status;
    std::vector<float> lse;
    run_step(attends, model, t, 1, workspace, status, &lse);
    REQUIRE(status);
    for (u32 l = 0; l < 2; ++l) {
      const auto k = model.rows(Model::key, l, t, 1);
      const auto v = model.rows(Model::value, l, t, 1);
      const auto q = model.rows(Model::query, l, t, 1);
      Queries mine = queries(model.tensor(Model::query, q, 1));
      mine.lse = lse.data() + l * 4;
      for (auto* cache : {&observes, &masses}) {
        REQUIRE(
            cache->append(l, model.tensor(Model::key, k, 1), model.tensor(Model::value, v, 1), 1));
      }
      std::vector<float> mass(2 * 64, 0.0f);
      const Ragged<float> received(mass.data(), 64);
      REQUIRE(accumulate_attention(masses.layer(l), mine, options.attention, GroupReduction::mean,
                                   workspace, {}, received));
      REQUIRE(observes.observe(l, mine, workspace));
      REQUIRE(masses.add_mass(l, received, mine, workspace));
    }
    for (auto* cache : {&attends, &observes, &masses}) REQUIRE(cache->commit(workspace));
  }
  CHECK(saved(attends) == saved(observes));
  CHECK(saved(attends) == saved(masses));
}

TEST_CASE("what is rolled back was never there") {
  Model model;
  for (const bool logs : {false, true}) {
    BudgetedOptions options = small_options(14);
    options.step_tokens = options.max_tentative = 5;
    options.compress_every = 3;
    options.log_mass = logs;
    KVMergerReducer reducer;
    if (logs) reducer.log_mass = LogMass::log_count;
    const KVMergerPolicy policy(reducer);
    BudgetedCache plain(policy), speculates(policy);
    REQUIRE(plain.allocate(model.shape, options));
    REQUIRE(speculates.allocate(model.shape, options));
    Workspace workspace;
    u32 token = 0;
    for (u32 round = 0; round < 40; ++round) {
      CAPTURE(round, logs);
      const u32 accepted = round % 4;
      // Wrong drafts: the right tokens first, then others.
      Status status;
      Model other = model;
      other.seed = 99;
      run_step(speculates, other, 500 + round, 1 + round % 5, workspace, status);
      REQUIRE(status);
      REQUIRE(speculates.rollback());
      REQUIRE(speculates.tentative() == 0);
      const auto drafted = run_step(speculates, model, token, 4, workspace, status);
      REQUIRE(status);
      REQUIRE(speculates.commit(accepted, workspace));
      if (accepted != 0) {
        const auto exact = run_step(plain, model, token, accepted, workspace, status);
        REQUIRE(status);
        REQUIRE(plain.commit(workspace));
        for (u32 row = 0; row < 8; ++row) {  // [layer][query head] rows of the accepted tokens
          REQUIRE(std::memcmp(drafted.data() + row * 4 * 6, exact.data() + row * accepted * 6,
                              accepted * 6 * sizeof(float)) == 0);
        }
      }
      token += accepted;
      REQUIRE(saved(plain) == saved(speculates));
    }
    CHECK(plain.compressions() > 5);
  }
}

TEST_CASE("a draft may come token by token") {
  Model model;
  BudgetedOptions options = small_options(12);
  options.step_tokens = options.max_tentative = 4;
  BudgetedCache once(H2OPolicy{}), slowly(H2OPolicy{});
  REQUIRE(once.allocate(model.shape, options));
  REQUIRE(slowly.allocate(model.shape, options));
  Workspace workspace;
  for (u32 t = 0; t < 40; t += 3) {
    Status status;
    const auto whole = run_step(once, model, t, 4, workspace, status);
    REQUIRE(status);
    REQUIRE(once.commit(3, workspace));
    for (u32 i = 0; i < 4; ++i) {
      const auto one = run_step(slowly, model, t + i, 1, workspace, status);
      REQUIRE(status);
      for (u32 row = 0; row < 8; ++row) {
        for (u32 d = 0; d < 6; ++d) REQUIRE(one[row * 6 + d] == whole[(row * 4 + i) * 6 + d]);
      }
    }
    REQUIRE(slowly.commit(3, workspace));
    REQUIRE(saved(once) == saved(slowly));
  }
}

TEST_CASE("CaM per step equals the paper's loop") {
  Model model;
  model.sharpness = 4.0f;
  const u32 budget = 10;
  BudgetedOptions options = small_options(budget, 2, 4);
  CaMPolicy policy;
  policy.scorer.sinks = 2;
  policy.reducer.receivers = 3;
  BudgetedCache cache(policy);
  REQUIRE(cache.allocate(model.shape, options));
  struct Slot {
    u32 token;
    double mass;
    std::vector<double> value;
  };
  std::vector<std::vector<Slot>> dense(4);
  Workspace workspace;
  for (u32 t = 0; t < 50; ++t) {
    CAPTURE(t);
    Status status;
    run_step(cache, model, t, 1, workspace, status);
    REQUIRE(status);
    REQUIRE(cache.commit(workspace));
    for (u32 l = 0; l < 2; ++l) {
      for (u32 h = 0; h < 2; ++h) {
        auto& slots = dense[l * 2 + h];
        Slot fresh{t, 0.0, {}};
        for (u32 d = 0; d < 6; ++d) {
          fresh.value.push_back(static_cast<double>(model.at(Model::value, l, h, t, d)));
        }
        slots.push_back(fresh);
        std::vector<u32> tokens;
        for (const Slot& slot : slots) tokens.push_back(slot.token);
        for (u32 g = 0; g < 2; ++g) {
          const auto exact = exact_attention(model, l, h * 2 + g, t, tokens);
          for (std::size_t i = 0; i < slots.size(); ++i) {
            slots[i].mass += exact.probability[i] / 2.0;
          }
        }
        if (slots.size() > budget) {  // StreamingLLM drops the oldest behind the sinks
          const Slot gone = slots[2];
          slots.erase(slots.begin() + 2);
          double mean = 0.0;
          for (std::size_t i = 2; i < 5; ++i) mean += slots[i].mass / 3.0;
          const double share = std::min(1.0, std::max(0.0, gone.mass / mean)) / 3.0;
          for (std::size_t i = 2; i < 5; ++i) {
            for (u32 d = 0; d < 6; ++d) slots[i].value[d] += share * gone.value[d];
          }
        }
        const CacheView view = cache.layer(l);
        REQUIRE(view.length(h) == slots.size());
        for (u32 i = 0; i < slots.size(); ++i) {
          REQUIRE(view.position(h, i) == static_cast<i32>(slots[i].token));
          REQUIRE_THAT(static_cast<double>(cache.mass(l)(h, i)), WithinAbs(slots[i].mass, 1e-4));
          REQUIRE(cache.tokens(l)(h, i) == 1.0f);  // a receiver does not stand for what it got
          float row[6];
          load_row(view.values, h, i, row);
          for (u32 d = 0; d < 6; ++d) {
            REQUIRE_THAT(static_cast<double>(row[d]), WithinAbs(slots[i].value[d], 1e-4));
          }
        }
      }
    }
  }
}

TEST_CASE("merging every n steps keeps the sums of mass and tokens") {
  Model model;
  BudgetedOptions options = small_options(16, 1, 3);
  options.compress_every = 8;
  options.log_mass = true;
  KVMergerReducer reducer;
  reducer.log_mass = LogMass::log_count;
  reducer.recent_tokens = reducer.heavy_tokens = 0;  // nothing stands in the way of a merge
  BudgetedCache cache{KVMergerPolicy(reducer)};
  REQUIRE(cache.allocate(model.shape, options));
  Workspace workspace;
  for (u32 t = 0; t < 120; ++t) {
    CAPTURE(t);
    Status status;
    run_step(cache, model, t, 1, workspace, status);
    REQUIRE(status);
    REQUIRE(cache.commit(workspace));
    REQUIRE(cache.total_slots() <= 4 * (16 + 7));
    for (u32 l = 0; l < 2; ++l) {
      const CacheView view = cache.layer(l);
      for (u32 h = 0; h < 2; ++h) {
        double mass = 0.0, tokens = 0.0;
        for (u32 i = 0; i < view.length(h); ++i) {
          mass += static_cast<double>(cache.mass(l)(h, i));
          tokens += static_cast<double>(cache.tokens(l)(h, i));
          // As many queries as since the slot's oldest member, never more than there were.
          REQUIRE(cache.observers(l)(h, i) >=
                  static_cast<float>(t + 1) - static_cast<float>(view.position(h, i)));
          REQUIRE(cache.observers(l)(h, i) <= static_cast<float>(t + 1));
          // The bias is the log of the number of tokens, through any number of merges.
          REQUIRE_THAT(std::exp(static_cast<double>(view.log_mass(h, i))),
                       WithinRel(static_cast<double>(cache.tokens(l)(h, i)), 1e-3));
        }
        REQUIRE(tokens == t + 1);
        REQUIRE(mass == Approx(t + 1).epsilon(1e-4));
        REQUIRE(cache.observers(l)(h, 0) == static_cast<float>(t + 1));
      }
    }
  }
  CHECK(cache.compressions() > 10);
}

TEST_CASE("a term of several slots is shared among those that stand for it") {
  // Slots 0 and 2 with term 1 in both, and slot 3 alone.
  u32 length[] = {3}, anchor[] = {0, 2, 3}, term[] = {1};
  u64 first[] = {0, 3}, begin[] = {0, 0, 1}, end[] = {1, 1, 1};
  float weight[] = {0.5f}, self[] = {0.5f, 0.5f, 1.0f};
  CompressionPlan plan;
  plan.segments = 1;
  plan.length = length;
  plan.first = first;
  plan.anchor = anchor;
  plan.term_begin = begin;
  plan.term_end = end;
  plan.num_terms = 1;
  plan.term_token = term;
  plan.term_weight = weight;
  plan.self_weight = self;
  u32 shares[1];
  float mass[] = {1.0f, 4.0f, 2.0f, 8.0f};
  REQUIRE(terms_are_shared(plan));
  CHECK(carry_state(plan, {mass, 4}, MoveRule::sum, nullptr).code() == StatusCode::null_pointer);
  REQUIRE(carry_state(plan, {mass, 4}, MoveRule::sum, shares));
  CHECK(mass[0] == 3.0f);
  CHECK(mass[1] == 4.0f);
  CHECK(mass[2] == 8.0f);
  float kept[] = {1.0f, 4.0f, 2.0f, 8.0f};
  plan.self_weight = nullptr;  // values are added to, the slots stay what they are
  REQUIRE_FALSE(slots_stand_for_terms(plan));
  REQUIRE(carry_state(plan, {kept, 4}, MoveRule::sum, shares));
  CHECK(kept[0] == 1.0f);
  CHECK(kept[1] == 2.0f);
}

TEST_CASE("budgets shared by heads and layers hold exactly") {
  Model model;
  model.shape.layers = 3;
  model.sharpness = 6.0f;
  BudgetedOptions options = small_options(12);
  options.spare_slots = 0;  // no more room than a step needs: heads have to move
  AnyPolicy policy;
  for (const char* name :
       {"h2o+adakv_layers+evict", "snapkv+adakv+evict", "h2o+pyramid+massfold"}) {
    CAPTURE(name);
    REQUIRE(make_policy(name, policy));
    options.log_mass = std::strstr(name, "massfold") != nullptr;
    BudgetedCache cache(policy);
    REQUIRE(cache.allocate(model.shape, options));
    Workspace workspace;
    bool ragged = false;
    for (u32 t = 0; t < 80; ++t) {
      Status status;
      run_step(cache, model, t, 1, workspace, status);
      REQUIRE(status);
      REQUIRE(cache.commit(workspace));
      REQUIRE(cache.total_slots() == std::min<std::size_t>(t + 1, 12) * 6);
      for (u32 l = 0; l < 3; ++l) {
        ragged = ragged || cache.length(l, 0) != cache.length(0, 0) ||
                 cache.length(l, 1) != cache.length(l, 0);
        const auto positions = held(cache, l, 1);
        REQUIRE(std::is_sorted(positions.begin(), positions.end()));
        REQUIRE(positions.back() == t);
      }
    }
    CHECK(ragged);
  }
}

TEST_CASE("D2O's thresholds live in the cache") {
  Model model;
  BudgetedOptions options = small_options(10);
  options.compress_every = 4;
  std::vector<float> threshold(4, std::nanf(""));
  auto owns = compose(H2OScorer{}, UniformAllocator{}, D2OReducer{});
  auto lent = owns;
  lent.reducer.threshold = lent.reducer.next_threshold = threshold.data();
  lent.reducer.threshold_stride = 2;
  auto forgets = owns;
  forgets.reducer.next_threshold = threshold.data() + 0;  // given, but never read
  forgets.reducer.threshold_stride = 2;
  AnyPolicy any;
  REQUIRE(make_policy("h2o+uniform+d2o", any));
  BudgetedCache a(owns), b(lent);
  BudgetedCache c(any);
  Workspace workspace;
  REQUIRE(a.allocate(model.shape, options));
  REQUIRE(b.allocate(model.shape, options));
  REQUIRE(c.allocate(model.shape, options));
  REQUIRE(stream(a, model, 0, 60, workspace));
  REQUIRE(stream(b, model, 0, 60, workspace));
  REQUIRE(stream(c, model, 0, 60, workspace));
  CHECK(saved(a) == saved(c));
  for (u32 l = 0; l < 2; ++l) {
    for (u32 h = 0; h < 2; ++h) {
      const CacheView left = a.layer(l), right = b.layer(l);
      REQUIRE(left.length(h) == right.length(h));
      for (u32 t = 0; t < left.length(h); ++t) {
        float x[8], y[8];
        load_row(left.keys, h, t, x);
        load_row(right.keys, h, t, y);
        REQUIRE(std::memcmp(x, y, sizeof x) == 0);
      }
    }
  }
  CHECK(threshold[0] == threshold[0]);
  BudgetedCache d(forgets);
  REQUIRE(d.allocate(model.shape, options));
  REQUIRE(stream(d, model, 0, 60, workspace));
  CHECK(saved(a) != saved(d));  // so remembering makes a difference
}

TEST_CASE("frozen slots stay, bit for bit") {
  Model model;
  BudgetedOptions options = small_options(14);
  BudgetedCache cache{KVMergerPolicy()};
  REQUIRE(cache.allocate(model.shape, options));
  Workspace workspace;
  REQUIRE(stream(cache, model, 0, 8, workspace));
  CHECK(cache.freeze(9).code() == StatusCode::invalid_frozen);
  REQUIRE(cache.freeze(6));
  REQUIRE(stream(cache, model, 8, 50, workspace));
  for (u32 l = 0; l < 2; ++l) {
    const auto k = model.rows(Model::key, l, 0, 6);
    for (u32 h = 0; h < 2; ++h) {
      for (u32 t = 0; t < 6; ++t) {
        float row[8];
        load_row(cache.layer(l).keys, h, t, row);
        CHECK(std::memcmp(row, k.data() + (h * 6 + t) * 8, sizeof row) == 0);
        CHECK(cache.layer(l).position(h, t) == static_cast<i32>(t));
      }
    }
  }
  Workspace more;
  REQUIRE(stream(cache, model, 58, 4, more));
  CHECK(cache.freeze(11).code() == StatusCode::budget_below_protected);
}

TEST_CASE("a prefix that lies elsewhere is attended with the cache as one") {
  Model model;
  model.shape.layers = 1;
  const u32 prefix_tokens = 9;
  BudgetedOptions options = small_options(40);
  options.step_tokens = 3;
  const std::vector<float> sinks = {0.3f, -1.0f, 0.0f, 2.0f};
  options.attention.sink_logits = sinks.data();
  BudgetedCache whole(H2OPolicy{}), behind(H2OPolicy{});
  REQUIRE(whole.allocate(model.shape, options));
  REQUIRE(behind.allocate(model.shape, options));
  REQUIRE(behind.start_at(prefix_tokens));
  const auto k = model.rows(Model::key, 0, 0, prefix_tokens);
  const auto v = model.rows(Model::value, 0, 0, prefix_tokens);
  const KVCache prefix(model.tensor(Model::key, k, prefix_tokens),
                       model.tensor(Model::value, v, prefix_tokens));
  Workspace workspace;
  REQUIRE(stream(whole, model, 0, prefix_tokens, workspace, 3));
  std::vector<float> before(2 * prefix_tokens);
  for (u32 t = 0; t < 15; t += 3) {
    Status status;
    const auto expected = run_step(whole, model, prefix_tokens + t, 3, workspace, status);
    REQUIRE(status);
    REQUIRE(whole.commit(workspace));
    const u32 at = prefix_tokens + t;
    const auto keys = model.rows(Model::key, 0, at, 3);
    const auto values = model.rows(Model::value, 0, at, 3);
    const auto q = model.rows(Model::query, 0, at, 3);
    std::vector<float> output(expected.size());
    REQUIRE(behind.append(0, model.tensor(Model::key, keys, 3),
                          model.tensor(Model::value, values, 3), 3));
    REQUIRE(behind.attend(0, queries(model.tensor(Model::query, q, 3)), prefix.view(),
                          {output.data(), nullptr, 0, 0}, workspace));
    REQUIRE(behind.commit(workspace));
    for (std::size_t i = 0; i < output.size(); ++i) {
      REQUIRE_THAT(output[i], WithinAbs(expected[i], 2e-6));
    }
  }
  CHECK(behind.next_position() == whole.next_position());
  for (u32 h = 0; h < 2; ++h) {
    for (u32 t = 0; t < 15; ++t) {  // mass is what the tokens got of the whole
      CHECK_THAT(behind.mass(0)(h, t), WithinAbs(whole.mass(0)(h, prefix_tokens + t), 1e-5));
    }
  }
  CHECK(behind.start_at(3).code() == StatusCode::invalid_option);
}

TEST_CASE("adopt() is the policy's plan over the whole prefill, then streaming goes on") {
  Model model;
  const u32 prompt = 60;
  BudgetedOptions options = small_options(16);
  AnyPolicy policy;
  for (const char* name : {"snapkv+adakv_layers+evict", "h2o", "kvmerger_mass", "massfold"}) {
    CAPTURE(name);
    REQUIRE(make_policy(name, policy));
    options.log_mass = true;
    BudgetedCache cache(policy);
    REQUIRE(cache.allocate(model.shape, options));
    Workspace workspace;
    std::vector<std::vector<float>> data;
    std::vector<CacheView> views;
    std::vector<Observation> seen;
    for (u32 l = 0; l < 2; ++l) {
      for (const auto kind : {Model::key, Model::value, Model::query}) {
        data.push_back(model.rows(kind, l, 0, prompt));
      }
    }
    for (u32 l = 0; l < 2; ++l) {
      views.push_back(KVCache(model.tensor(Model::key, data[l * 3], prompt),
                              model.tensor(Model::value, data[l * 3 + 1], prompt))
                          .view());
      seen.push_back(observe_prefill(model.tensor(Model::query, data[l * 3 + 2], prompt), 8));
    }
    REQUIRE(cache.adopt(views, seen, workspace));
    std::vector<CompressionPlan> plans(2);
    REQUIRE(policy.plan(views, seen, Budget::slots(16), workspace, plans, options.plan));
    CHECK(cache.total_slots() == plans[0].num_slots() + plans[1].num_slots());
    CHECK(cache.next_position() == static_cast<i32>(prompt));
    CHECK(cache.tokens_seen() == prompt);
    for (u32 l = 0; l < 2; ++l) {
      RaggedShape shape = ragged_shape(plans[l], views[l]);
      shape.log_mass = true;
      RaggedKVCache expected;
      REQUIRE(expected.allocate(shape));
      REQUIRE(apply(plans[l], views[l], expected));
      const CacheView left = cache.layer(l), right = expected.view();
      for (u32 h = 0; h < 2; ++h) {
        REQUIRE(left.length(h) == right.length(h));
        double mass = 0.0, tokens = 0.0;
        for (u32 t = 0; t < left.length(h); ++t) {
          float x[8], y[8];
          load_row(left.keys, h, t, x);
          load_row(right.keys, h, t, y);
          REQUIRE(std::memcmp(x, y, sizeof x) == 0);
          load_row(left.values, h, t, x);
          load_row(right.values, h, t, y);
          REQUIRE(std::memcmp(x, y, 6 * sizeof(float)) == 0);
          REQUIRE(left.position(h, t) == right.position(h, t));
          REQUIRE(left.log_mass(h, t) == right.log_mass(h, t));
          mass += static_cast<double>(cache.mass(l)(h, t));
          tokens += static_cast<double>(cache.tokens(l)(h, t));
        }
        CHECK(tokens <= prompt);
        CHECK(mass <= prompt * 1.0001);
        CHECK(mass > 0.0);
      }
      // Four queries are remembered: the newest.
      const Queries window = cache.seen(l).window;
      REQUIRE(window.count == 4);
      CHECK(window.positions[0] == 56);
      float row[8];
      load_query(window, 3, 3, row);
      for (u32 d = 0; d < 8; ++d) CHECK(row[d] == model.at(Model::query, l, 3, 59, d));
    }
    REQUIRE(stream(cache, model, prompt, 20, workspace));
    CHECK(cache.total_slots() <= cache.total_budget());
    const auto before = saved(cache);
    views[1].next_position = 61;
    CHECK(cache.adopt(views, seen, workspace).code() == StatusCode::shape_mismatch);
    views[1].next_position = 60;
    views[0] = cache.layer(0);
    CHECK_FALSE(cache.adopt(views, seen, workspace));
    CHECK(saved(cache) == before);
  }
}

TEST_CASE("a restored cache goes on with the same bits") {
  Model model;
  model.shape.value_dtype = DType::f16;
  model.shape.key_dtype = DType::bf16;
  BudgetedOptions options = small_options(14);
  options.compress_every = 3;
  options.log_mass = true;
  options.query_dtype = DType::f16;
  AnyPolicy policy;
  for (const char* name : {"massfold", "kvmerger_mass", "h2o+adakv+d2o", "rkv", "cam"}) {
    CAPTURE(name);
    REQUIRE(make_policy(name, policy));
    BudgetedCache one(policy), two(policy);
    Workspace workspace;
    REQUIRE(one.allocate(model.shape, options));
    REQUIRE(two.allocate(model.shape, options));
    REQUIRE(stream(one, model, 0, 37, workspace));
    REQUIRE(stream(two, model, 5, 9, workspace));  // something else, to be replaced
    auto bytes = saved(one);
    REQUIRE(two.restore(bytes));
    CHECK(saved(two) == bytes);
    for (u32 t = 37; t < 70; ++t) {
      Status status;
      const auto a = run_step(one, model, t, 1, workspace, status);
      REQUIRE(status);
      const auto b = run_step(two, model, t, 1, workspace, status);
      REQUIRE(status);
      REQUIRE(a == b);
      REQUIRE(one.commit(workspace));
      REQUIRE(two.commit(workspace));
    }
    bytes = saved(one);
    CHECK(saved(two) == bytes);
    // Damaged or foreign snapshots change nothing.
    auto bad = bytes;
    bad[bad.size() / 2] ^= std::byte{1};
    CHECK(two.restore(bad).code() == StatusCode::bad_snapshot);
    CHECK_FALSE(two.restore({}));
    BudgetedOptions others = options;
    others.window = 3;
    BudgetedCache three(policy);
    REQUIRE(three.allocate(model.shape, others));
    CHECK(three.restore(bytes).code() == StatusCode::shape_mismatch);
    CHECK(saved(two) == bytes);
  }
}

TEST_CASE("positions made contiguous let a stream outrun the context") {
  Model model;
  const RopeSpec rope;
  for (const i32 context : {0, 40}) {
    BudgetedOptions options = small_options(12, 2, 6);
    options.positions = Positions::contiguous;
    options.rope = &rope;
    options.context_tokens = context;
    StreamingLLMPolicy policy;
    policy.scorer.sinks = 2;
    BudgetedCache cache(policy);
    REQUIRE(cache.allocate(model.shape, options));
    Workspace workspace;
    const auto rotate = [&](std::vector<float> row, i32 position) {
      for (std::size_t i = 0; i < 4; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / 8.0);
        const double x = static_cast<double>(row[i]), y = static_cast<double>(row[i + 4]);
        row[i] = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
        row[i + 4] = static_cast<float>(x * std::sin(angle) + y * std::cos(angle));
      }
      return row;
    };
    for (u32 t = 0; t < 300; ++t) {
      CAPTURE(t, context);
      const i32 at = cache.next_position();
      REQUIRE(at < (context == 0 ? 13 : context));
      for (u32 l = 0; l < 2; ++l) {  // the engine turns new keys and queries to where they stand
        std::vector<float> k, q;
        for (u32 h = 0; h < 2; ++h) {
          std::vector<float> row;
          for (u32 d = 0; d < 8; ++d) row.push_back(model.at(Model::key, l, h, t, d));
          row = rotate(row, at);
          k.insert(k.end(), row.begin(), row.end());
        }
        for (u32 h = 0; h < 4; ++h) {
          std::vector<float> row;
          for (u32 d = 0; d < 8; ++d) row.push_back(model.at(Model::query, l, h, t, d));
          row = rotate(row, at);
          q.insert(q.end(), row.begin(), row.end());
        }
        const auto v = model.rows(Model::value, l, t, 1);
        std::vector<float> out(4 * 6);
        REQUIRE(
            cache.append(l, model.tensor(Model::key, k, 1), model.tensor(Model::value, v, 1), 1));
        REQUIRE(cache.attend(l, queries(model.tensor(Model::query, q, 1)),
                             {out.data(), nullptr, 0, 0}, workspace));
      }
      REQUIRE(cache.commit(workspace));
      // Keys are those of the raw tokens, turned to where they stand now.
      const CacheView view = cache.layer(1);
      std::vector<u32> tokens;
      for (u32 i = 0; i <= t; ++i) {
        if (t < 12 || i < 2 || i + 10 > t) tokens.push_back(i);
      }
      REQUIRE(view.length(0) == tokens.size());
      for (u32 i = 0; i < tokens.size(); ++i) {
        const i32 position = view.position(0, i);
        if (context == 0) REQUIRE(position == static_cast<i32>(i));
        if (i > 2) REQUIRE(position == view.position(0, i - 1) + 1);
        float row[8];
        load_row(view.keys, 0, i, row);
        std::vector<float> raw;
        for (u32 d = 0; d < 8; ++d) raw.push_back(model.at(Model::key, 1, 0, tokens[i], d));
        const auto expected = rotate(raw, position);
        for (u32 d = 0; d < 8; ++d) REQUIRE_THAT(row[d], WithinAbs(expected[d], 3e-5));
      }
      // So do the remembered queries.
      const Queries window = cache.seen(1).window;
      const u32 newest = window.count - 1;
      REQUIRE(window.positions[newest] == cache.next_position() - 1);
      float row[8];
      load_query(window, 2, 0, row);
      std::vector<float> raw;
      for (u32 d = 0; d < 8; ++d) raw.push_back(model.at(Model::query, 1, 2, t - newest, d));
      const auto expected = rotate(raw, window.positions[0]);
      for (u32 d = 0; d < 8; ++d) REQUIRE_THAT(row[d], WithinAbs(expected[d], 6e-5));
    }
  }
}

TEST_CASE("sequences of a batch are themselves") {
  Model model;
  BudgetedOptions options = small_options(12);
  options.step_tokens = options.max_tentative = 3;
  const u32 lengths[] = {5, 40, 90};
  std::vector<std::vector<std::byte>> alone;
  Workspace workspace;
  for (u32 i = 0; i < 3; ++i) {
    Model own = model;
    own.seed = 10 + i;
    BudgetedCache cache(AdaKVPolicy{});
    REQUIRE(cache.allocate(own.shape, options));
    REQUIRE(stream(cache, own, 0, lengths[i], workspace));
    for (u32 step = 0; step < 30; ++step) {
      Status status;
      run_step(cache, own, lengths[i] + step * 3, 1 + (step + i) % 3, workspace, status);
      REQUIRE(status);
      REQUIRE(cache.commit((step + i) % 3, workspace));
    }
    alone.push_back(saved(cache));
  }
  std::vector<BudgetedCache<AdaKVPolicy>> batch;
  std::vector<BudgetedCacheBase*> sequences;
  for (u32 i = 0; i < 3; ++i) batch.emplace_back(AdaKVPolicy{});
  Workspace scratch[3];
  Workspace* workspaces[] = {&scratch[0], &scratch[1], &scratch[2]};
  for (u32 i = 0; i < 3; ++i) {
    Model own = model;
    own.seed = 10 + i;
    REQUIRE(batch[i].allocate(own.shape, options));
    REQUIRE(stream(batch[i], own, 0, lengths[i], workspace));
    sequences.push_back(&batch[i]);
  }
  for (u32 step = 0; step < 30; ++step) {
    u32 accepted[3];
    for (u32 i = 0; i < 3; ++i) {
      Model own = model;
      own.seed = 10 + i;
      Status status;
      run_step(batch[i], own, lengths[i] + step * 3, 1 + (step + i) % 3, workspace, status);
      REQUIRE(status);
      accepted[i] = (step + i) % 3;
    }
    Status statuses[3];
    REQUIRE(commit_batch(sequences, accepted, workspaces, statuses, odd_executor()));
    for (const Status& status : statuses) REQUIRE(status);
  }
  for (u32 i = 0; i < 3; ++i) CHECK(saved(batch[i]) == alone[i]);
  Status statuses[2];
  const u32 none[3] = {};
  CHECK(commit_batch(sequences, none, workspaces, statuses).code() == StatusCode::shape_mismatch);
}

TEST_CASE("the executor does not change a bit") {
  Model model;
  AnyPolicy policy;
  for (const char* name : {"massfold", "rkv", "h2o+adakv_layers+kvmerger_mass"}) {
    CAPTURE(name);
    REQUIRE(make_policy(name, policy));
    BudgetedOptions options = small_options(14);
    options.log_mass = true;
    options.step_tokens = 4;
    options.max_tentative = 2;
    BudgetedCache serial(policy), parallel(policy);
    Workspace workspace;
    REQUIRE(serial.allocate(model.shape, options));
    options.plan.executor = odd_executor();
    REQUIRE(parallel.allocate(model.shape, options));
    for (u32 chunk : {4u, 1u, 2u}) {
      REQUIRE(stream(serial, model, chunk * 100, 40, workspace, chunk));
      REQUIRE(stream(parallel, model, chunk * 100, 40, workspace, chunk));
      REQUIRE(saved(serial) == saved(parallel));
    }
  }
}

TEST_CASE("long heads are shared by workers within the workspace that is asked for") {
  const Model model;
  AnyPolicy policy;
  REQUIRE(make_policy("streaming_llm", policy));
  BudgetedOptions options = small_options(2600);
  options.step_tokens = 500;
  std::vector<std::vector<float>> outputs;
  for (const bool parallel : {false, true}) {
    if (parallel) options.plan.executor = odd_executor();
    std::vector<std::byte> memory(
        BudgetedCacheBase::workspace_bytes_required(model.shape, options));
    Workspace workspace(memory);
    BudgetedCache cache(policy);
    REQUIRE(cache.allocate(model.shape, options));
    Status status;
    for (u32 t = 0; t < 2500; t += 500) {
      run_step(cache, model, t, 500, workspace, status);
      REQUIRE(status);
      REQUIRE(cache.commit(workspace));
    }
    outputs.push_back(run_step(cache, model, 2500, 1, workspace, status));
    REQUIRE(status);
  }
  REQUIRE(outputs[0] == outputs[1]);
}

TEST_CASE("calls that cannot work say why and change nothing") {
  Model model;
  BudgetedOptions options = small_options(12);
  options.step_tokens = 6;
  options.max_tentative = 3;
  BudgetedCache cache(H2OPolicy{});
  Workspace workspace;
  CHECK(cache.append(0, Rows{}, Rows{}, 1).code() == StatusCode::invalid_shape);
  CHECK(cache.commit(workspace).code() == StatusCode::invalid_shape);
  REQUIRE(cache.allocate(model.shape, options));
  REQUIRE(stream(cache, model, 0, 20, workspace));
  const auto before = saved(cache);
  const auto k = model.rows(Model::key, 0, 20, 9);
  const auto v = model.rows(Model::value, 0, 20, 9);
  const auto q = model.rows(Model::query, 0, 20, 9);
  const auto keys = model.tensor(Model::key, k, 9);
  const auto values = model.tensor(Model::value, v, 9);
  const auto asked = [&](u32 count) {
    Queries result = queries(model.tensor(Model::query, q, 9));
    result.count = count;
    return result;
  };
  std::vector<float> out(4 * 9 * 6);
  const AttentionOutput output{out.data(), nullptr, 0, 0};

  CHECK(cache.append(2, keys, values, 1).code() == StatusCode::invalid_shape);
  CHECK(cache.append(0, keys, values, 0).code() == StatusCode::invalid_length);
  CHECK(cache.append(0, keys, values, 7).code() == StatusCode::invalid_length);
  CHECK(cache.append(0, values, values, 1).code() == StatusCode::shape_mismatch);
  CHECK(cache.attend(0, asked(1), output, workspace).code() == StatusCode::invalid_length);
  REQUIRE(cache.append(0, keys, values, 2));
  CHECK(cache.append(0, keys, values, 2).code() == StatusCode::invalid_option);
  CHECK(cache.attend(0, asked(1), output, workspace).code() == StatusCode::invalid_length);
  CHECK(cache.observe(0, Queries{}, workspace).code() == StatusCode::invalid_length);
  CHECK(cache.commit(2, workspace).code() == StatusCode::invalid_length);  // layer 1 has none
  CHECK(cache.compress(workspace).code() == StatusCode::invalid_option);
  CHECK(cache.freeze(1).code() == StatusCode::invalid_option);
  std::size_t written = 1;
  CHECK(cache.save({}, written, workspace).code() == StatusCode::invalid_option);
  CHECK(written == 0);
  REQUIRE(cache.attend(0, asked(2), output, workspace));
  REQUIRE(cache.append(1, keys, values, 2));
  CHECK(cache.commit(2, workspace).code() == StatusCode::invalid_length);  // half observed
  REQUIRE(cache.attend(1, asked(2), output, workspace));
  CHECK(cache.commit(3, workspace).code() == StatusCode::invalid_length);
  std::byte few[512];
  Workspace little{std::span<std::byte>(few)};
  CHECK(cache.commit(2, little).code() == StatusCode::workspace_too_small);
  CHECK(cache.tentative() == 2);
  REQUIRE(cache.rollback());
  CHECK(saved(cache) == before);

  // A workspace that is enough for the mass, but not for the plan.
  AnyPolicy greedy;
  REQUIRE(make_policy("snapkv+adakv_layers+massfold", greedy));
  BudgetedOptions biased = options;
  biased.log_mass = true;
  BudgetedCache other(greedy);
  REQUIRE(other.allocate(model.shape, biased));
  REQUIRE(stream(other, model, 0, 20, workspace));
  const auto started = saved(other);
  std::size_t tried = 0;
  for (std::size_t bytes = 1024; bytes < 100000; bytes += 256) {
    std::vector<std::byte> memory(bytes);
    Workspace limited{std::span<std::byte>(memory)};
    Status status;
    run_step(other, model, 20, 2, workspace, status);
    REQUIRE(status);
    status = other.commit(2, limited);
    if (status) break;
    ++tried;
    CHECK(status.code() == StatusCode::workspace_too_small);
    REQUIRE(other.tentative() == 2);
    CHECK(other.layer(0).next_position == 22);
    REQUIRE(other.rollback());
    REQUIRE(saved(other) == started);
  }
  CHECK(tried > 20);
  CHECK(other.next_position() == 22);

  // A long step is observed at once: no way back.
  for (u32 l = 0; l < 2; ++l) {
    REQUIRE(cache.append(l, keys, values, 5));
    REQUIRE(cache.attend(l, asked(5), output, workspace));
  }
  CHECK(cache.append(0, keys, values, 1).code() == StatusCode::invalid_option);
  CHECK(cache.rollback().code() == StatusCode::invalid_option);
  CHECK(cache.commit(4, workspace).code() == StatusCode::invalid_option);
  REQUIRE(cache.commit(5, workspace));

  // A policy that keeps everything does not fit a budget for long.
  AnyPolicy full;
  REQUIRE(make_policy("full", full));
  BudgetedCache never(full);
  REQUIRE(never.allocate(model.shape, options));
  const Status status = stream(never, model, 0, 100, workspace);
  CHECK(status.code() == StatusCode::destination_too_small);

  BudgetedOptions bad = options;
  bad.step_tokens = 0;
  CHECK(cache.allocate(model.shape, bad).code() == StatusCode::invalid_option);
  bad = options;
  bad.budget_slots = 5;
  CHECK(cache.allocate(model.shape, bad).code() == StatusCode::budget_below_protected);
  bad = options;
  bad.positions = Positions::contiguous;
  CHECK(cache.allocate(model.shape, bad).code() == StatusCode::needs_rope);
  BudgetedShape shape = model.shape;
  shape.query_heads = 3;
  CHECK(cache.allocate(shape, options).code() == StatusCode::invalid_group);
  CHECK(BudgetedCacheBase::bytes_required(shape, options) == 0);
  std::vector<std::byte> memory(BudgetedCacheBase::bytes_required(model.shape, options) - 1);
  CHECK(cache.bind(memory, model.shape, options).code() == StatusCode::destination_too_small);
  CHECK(cache.next_position() == 25);
}

TEST_CASE("a cache can be moved in the middle of a step") {
  StreamModel model;
  const BudgetedOptions options = small_options(12);
  BudgetedCache one(H2OPolicy{}), two(H2OPolicy{}), whole(H2OPolicy{});
  Workspace workspace;
  for (auto* cache : {&one, &two, &whole}) REQUIRE(cache->allocate(model.shape, options));
  REQUIRE(stream(one, model, 0, 30, workspace));
  REQUIRE(stream(whole, model, 0, 31, workspace));
  REQUIRE(stream(two, model, 3, 20, workspace));
  Status status;
  run_step(one, model, 30, 1, workspace, status);
  REQUIRE(status);
  two = std::move(one);
  BudgetedCache three(std::move(two));
  REQUIRE(three.commit(workspace));
  CHECK(saved(three) == saved(whole));
  CHECK(two.commit(workspace).code() == StatusCode::invalid_shape);  // NOLINT: moved from
  CHECK(two.rollback());
  REQUIRE(one.allocate(model.shape, options));  // NOLINT: as new
  REQUIRE(stream(one, model, 0, 31, workspace));
  CHECK(saved(one) == saved(whole));
  three.clear();
  REQUIRE(stream(three, model, 0, 31, workspace));
  CHECK(saved(three) == saved(whole));
}

TEST_CASE("tokens that nobody observed are kept by policies that look at none") {
  Model model;
  BudgetedOptions options = small_options(12);
  options.accumulate_mass = options.count_tokens = false;
  options.window = 0;
  options.engine_states = 2;
  options.engine_rules[1] = MoveRule::max;
  BudgetedCache cache(compose(ExternalScorer{}, UniformAllocator{}, EvictReducer{}));
  REQUIRE(cache.allocate(model.shape, options));
  Workspace workspace;
  for (u32 t = 0; t < 60; ++t) {
    for (u32 l = 0; l < 2; ++l) {
      const auto k = model.rows(Model::key, l, t, 1);
      const auto v = model.rows(Model::value, l, t, 1);
      REQUIRE(cache.append(l, model.tensor(Model::key, k, 1), model.tensor(Model::value, v, 1), 1));
      for (u32 h = 0; h < 2; ++h) {  // the engine's own score: multiples of 7 matter
        const u32 slot = cache.layer(l).length(h) - 1;
        cache.engine_state(0, l)(h, slot) = t % 7 == 0 ? 1.0f : 0.0f;
        cache.engine_state(1, l)(h, slot) = static_cast<float>(t);
      }
    }
    REQUIRE(cache.commit(workspace));
  }
  for (const u32 t : held(cache, 1, 1)) CHECK((t < 2 || t >= 56 || t % 7 == 0));
  for (u32 i = 0; i < 12; ++i) {
    CHECK(cache.engine_state(1, 1)(1, i) == static_cast<float>(held(cache, 1, 1)[i]));
  }
  CHECK_FALSE(cache.mass(0));
  CHECK_FALSE(cache.engine_state(2, 0));
}
