// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// A cache of all layers that is compressed and appended to in turns: what its total may be.

#include <random>
#include <string>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

using namespace kvlean;

namespace {

// All layers of one sequence in one block, with the mass and the observers of each slot as states.
struct Stream {
  std::mt19937& random;
  u32 layers, heads, dim, budget, step;
  Protection protection;
  RaggedKVCache cache;
  std::vector<float> head_weight;
  RopeSpec rope;

  explicit Stream(std::mt19937& engine) : random(engine) {
    const auto pick = [&](u32 low, u32 high) {
      return std::uniform_int_distribution<u32>(low, high)(random);
    };
    layers = pick(1, 3);
    heads = pick(1, 4);
    dim = pick(2, 6);
    protection = {pick(0, 2), pick(0, 6)};
    budget = std::max(protection.sinks + protection.recent, 1u) + pick(0, 20);
    step = pick(1, 12);
    rope.rotary_dims = 2;
    RaggedShape shape = RaggedShape::flat(std::size_t{layers} * heads, dim, DType::f32,
                                          std::size_t{layers} * heads * (budget + step));
    shape.layer_heads = heads;
    shape.log_mass = true;
    shape.state_arrays = 2;
    REQUIRE(cache.allocate(shape));
    cache.set_rope(&rope);
    cache.respace();
    // Some heads see a thousand times the attention of others: Ada-KV makes them long.
    for (u32 h = 0; h < layers * heads; ++h) {
      head_weight.push_back(static_cast<float>(std::pow(10.0, static_cast<double>(pick(0, 3)))));
    }
  }

  void append(u32 count) {
    std::normal_distribution<float> normal;
    const i32 at = cache.next_position();
    for (u32 l = 0; l < layers; ++l) {
      std::vector<float> data(std::size_t{2} * heads * count * dim);
      for (float& x : data) x = normal(random);
      const Extents extents{heads, count, dim};
      const Rows keys = strided(data.data(), extents).rows();
      const Rows values = strided(data.data() + data.size() / 2, extents).rows();
      REQUIRE(cache.append(l * heads, heads, keys, values, count, at));
    }
    for (u32 h = 0; h < layers * heads; ++h) {
      for (u32 t = 0; t < cache.length(h); ++t) {
        cache.state(0)(h, t) += head_weight[h] * static_cast<float>(random() % 1000) / 1000.0f;
        cache.state(1)(h, t) += static_cast<float>(count);
      }
    }
  }

  Status compress(const AnyPolicy& policy, const Budget& slots, Workspace& workspace) {
    std::vector<CacheView> views;
    std::vector<Observation> seen;
    std::vector<CompressionPlan> plans(layers);
    for (u32 l = 0; l < layers; ++l) {
      views.push_back(cache.layer(l));
      seen.push_back(observe_mass(Ragged<const float>(cache.state(0, l * heads)),
                                  Ragged<const float>(cache.state(1, l * heads))));
    }
    PlanOptions options;
    options.protection = protection;
    KVLEAN_RETURN_IF_ERROR(policy.plan(views, seen, slots, workspace, plans, options));
    for (u32 l = 0; l < layers; ++l) {
      KVLEAN_RETURN_IF_ERROR(validate_plan(plans[l], views[l]));
      REQUIRE(apply(plans[l], views[l], in_place));
      REQUIRE(apply_state(plans[l], cache.state(0, l * heads), MoveRule::sum));
      REQUIRE(apply_state(plans[l], cache.state(1, l * heads), MoveRule::max));
    }
    return StatusCode::ok;
  }

  u64 total(u32 layer) const { return cache.view(layer * heads, heads).total_length(); }
  u64 floors(u32 layer) const {
    u64 sum = 0;
    for (u32 h = 0; h < heads; ++h) {
      sum += std::max(protection.count(cache.length(layer * heads + h), 0), 1u);
    }
    return sum;
  }
};

// Threshold forms may keep fewer slots than they are given.
bool fills_its_limit(const std::string& reducer) {
  return reducer != "kvmerger_threshold" && reducer != "kvmerger_paper";
}

}  // namespace

TEST_CASE("Compressing again and again keeps the total, whatever the heads' lengths") {
  std::mt19937 random(17);
  u32 ragged = 0;
  u32 exact = 0;
  for (int round = 0; round < 12; ++round) {
    for (const auto& reducer : reducer_names) {
      for (const auto& allocator : allocator_names) {
        const std::string name =
            "h2o+" + std::string(allocator.name) + "+" + std::string(reducer.name);
        AnyPolicy policy;
        REQUIRE(make_policy(name, policy));
        Stream stream(random);
        const u64 each = u64{stream.heads} * stream.budget;
        const u64 slots = stream.layers * each;
        INFO(name << " layers " << stream.layers << " heads " << stream.heads << " budget "
                  << stream.budget << " step " << stream.step);
        std::vector<std::byte> memory(
            plan_bytes_required({.num_layers = stream.layers,
                                 .num_kv_heads = stream.heads,
                                 .tokens = stream.cache.shape().total_slots,
                                 .key_dim = stream.dim,
                                 .total_tokens = stream.cache.shape().total_slots}));
        const std::byte* storage = stream.cache.storage().data();
        stream.append(stream.budget);
        for (int turn = 0; turn < 6; ++turn) {
          stream.append(1 + static_cast<u32>(random() % stream.step));
          u64 before = stream.cache.total_length();
          std::vector<u64> layer_before;
          u64 uniform = 0;
          for (u32 l = 0; l < stream.layers; ++l) {
            layer_before.push_back(stream.total(l));
            for (u32 h = 0; h < stream.heads; ++h) {
              uniform += std::min(stream.cache.length(l * stream.heads + h), stream.budget);
            }
          }
          Workspace workspace{std::span<std::byte>(memory)};
          REQUIRE(stream.compress(policy, Budget::slots(stream.budget), workspace));
          const bool fills = fills_its_limit(std::string(reducer.name));
          const u64 after = stream.cache.total_length();
          // Never above, and exact where the reducer fills what it is given.
          REQUIRE(after <= slots);
          if (allocator.name == "uniform") {
            if (fills) REQUIRE(after == uniform);
            for (u32 h = 0; h < stream.layers * stream.heads; ++h) {
              REQUIRE(stream.cache.length(h) <= stream.budget);
            }
          } else if (fills) {
            REQUIRE(after == std::min(slots, before));
            if (after == slots) ++exact;
          }
          for (u32 l = 0; l < stream.layers; ++l) {
            if (allocator.name != "adakv") continue;
            REQUIRE(stream.total(l) <= each);
            if (fills) REQUIRE(stream.total(l) == std::min(each, layer_before[l]));
          }
          for (u32 h = 1; h < stream.heads; ++h) {
            if (stream.cache.length(h) != stream.cache.length(0)) ++ragged;
          }
          REQUIRE(validate(stream.cache));
          stream.cache.respace();
          REQUIRE(validate(stream.cache));
          // What compression freed is room for the next tokens, in every head, in the same memory.
          REQUIRE(stream.cache.min_room() >= stream.step);
          REQUIRE(stream.cache.storage().data() == storage);
        }
      }
    }
  }
  CHECK(ragged > 1000);
  CHECK(exact > 1000);
}

TEST_CASE("Equal lengths and fractions: nominals above the length change nothing") {
  // The same heads through a slot budget and through the fraction that gives the same number.
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    for (const auto& allocator : allocator_names) {
      AnyPolicy policy;
      REQUIRE(make_policy("h2o+" + std::string(allocator.name) + "+evict", policy));
      const u32 seed = static_cast<u32>(random());
      std::vector<std::vector<u32>> lengths;
      Status status[2];
      for (const bool fraction : {false, true}) {
        std::mt19937 engine(seed);
        Stream stream(engine);
        stream.append(stream.budget + stream.step);
        const u32 tokens = stream.cache.length(0);
        Workspace workspace;
        const Budget budget = fraction ? Budget::fraction((stream.budget + 0.5) / tokens)
                                       : Budget::slots(stream.budget);
        status[fraction] = stream.compress(policy, budget, workspace);
        const CacheView view = stream.cache.view();
        lengths.emplace_back(view.lengths, view.lengths + view.segments);
      }
      REQUIRE(status[0] == status[1]);
      REQUIRE(lengths[0] == lengths[1]);
    }
  }
}

TEST_CASE("A fraction is one of each head's length, and its total exact") {
  std::mt19937 random(29);
  for (int round = 0; round < 300; ++round) {
    for (const auto& allocator : allocator_names) {
      AnyPolicy policy;
      REQUIRE(make_policy("h2o+" + std::string(allocator.name) + "+evict", policy));
      Stream stream(random);
      stream.append(stream.budget);
      AnyPolicy ragged;
      REQUIRE(make_policy("h2o+adakv+evict", ragged));
      Workspace workspace;
      REQUIRE(stream.compress(ragged, Budget::slots(stream.budget * 3 / 4 + 8), workspace));
      const Budget half = Budget::fraction(static_cast<double>(random() % 101) / 100.0);
      std::vector<u64> nominal(stream.layers);
      u64 all = 0;
      bool enough = true;
      for (u32 l = 0; l < stream.layers; ++l) {
        for (u32 h = 0; h < stream.heads; ++h) {
          nominal[l] += half.slots_for(stream.cache.length(l * stream.heads + h));
        }
        enough = enough && nominal[l] >= stream.floors(l);
        all += nominal[l];
      }
      const Status status = stream.compress(policy, half, workspace);
      if (!status) {
        REQUIRE(status == StatusCode::budget_below_protected);
        REQUIRE_FALSE(enough);
        continue;
      }
      REQUIRE(stream.cache.total_length() == all);
      for (u32 l = 0; l < stream.layers; ++l) {
        if (allocator.name == "uniform" || allocator.name == "adakv") {
          REQUIRE(stream.total(l) == nominal[l]);
        }
      }
    }
  }
}
