#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/ledger.hpp"
#include "kvlean/allocate/pyramid.hpp"
#include "kvlean/allocate/uniform.hpp"
#include "tests/support/allocation.hpp"
#include "tests/support/catch.hpp"

using kvlean::AdaKVAllocator;
using kvlean::AdaKVLayersAllocator;
using kvlean::PyramidAllocator;
using kvlean::PyramidForm;
using kvlean::SafeguardMode;
using kvlean::StatusCode;
using kvlean::u32;
using kvlean::u64;
using kvlean::UniformAllocator;
using kvlean_test::Layer;
using kvlean_test::make_layer;
using kvlean_test::Model;

namespace {

class Random {
 public:
  explicit Random(u32 seed) : engine_(seed) {}
  u32 below(u32 bound) { return static_cast<u32>(engine_() % bound); }
  float unit() { return static_cast<float>(engine_() >> 8) * 0x1p-24f; }

  enum Kind { smooth, tied, wild };
  std::vector<float> row(u32 length, Kind kind) {
    constexpr float limit = std::numeric_limits<float>::infinity();
    const float sharpness = 1.0f + 12.0f * unit();
    const bool all_nan = kind == wild && below(8) == 0;
    std::vector<float> result(length);
    for (float& score : result) {
      score = std::pow(unit(), sharpness);
      if (kind != smooth) score = std::floor(score * 4.0f) - 1.0f;
      if (kind == wild) {
        const u32 dice = below(12);
        if (dice < 2 || all_nan) score = std::numeric_limits<float>::quiet_NaN();
        if (dice == 2) score = limit;
        if (dice == 3) score = -limit;
        if (dice == 4) score = -0.0f;
      }
    }
    return result;
  }
  std::vector<std::vector<float>> rows(u32 heads, u32 length, Kind kind) {
    std::vector<std::vector<float>> result;
    for (u32 h = 0; h < heads; ++h) result.push_back(row(length, kind));
    return result;
  }
  Kind kind() { return static_cast<Kind>(below(3)); }
  kvlean::Protection protection() { return {below(3) * 2, below(3) * 3}; }

 private:
  std::mt19937 engine_;
};

AdaKVAllocator ada(float safeguard, SafeguardMode mode = SafeguardMode::hard_floor) {
  return {.safeguard = safeguard, .mode = mode};
}

constexpr float safeguards[] = {0.0f, 0.05f, 0.2f, 0.5f, 0.8f, 1.0f};

// A ragged layer with equal-fraction nominals: some may lie below their floor.
Layer ragged_layer(Random& random) {
  Layer layer;
  const u32 heads = 1 + random.below(6);
  const double fraction = random.unit();
  for (u32 h = 0; h < heads; ++h) {
    const u32 length = random.below(5) == 0 ? random.below(4) : random.below(60);
    layer.scores.push_back(random.row(length, random.kind()));
    layer.nominal.push_back(kvlean::Budget::fraction(fraction).slots_for(length));
  }
  return layer;
}

// The definition, spelled out: every segment's best are safe, then one sorted list.
std::vector<std::vector<u32>> by_sorting(const std::vector<Layer>& layers,
                                         kvlean::Protection protection, float safeguard) {
  struct Candidate {
    float score;
    u32 layer, head, token;
  };
  std::vector<Candidate> all;
  std::vector<std::vector<u32>> limits;
  u64 slots = 0;
  for (u32 l = 0; l < layers.size(); ++l) {
    limits.emplace_back();
    for (u32 h = 0; h < layers[l].scores.size(); ++h) {
      const std::vector<float>& row = layers[l].scores[h];
      const u32 length = static_cast<u32>(row.size());
      const u32 nominal = layers[l].nominal[h];
      std::vector<Candidate> mine;
      u32 covered = 0;
      for (u32 t = 0; t < length; ++t) {
        if (protection.covers(t, length, layers[l].frozen)) {
          ++covered;
        } else {
          mine.push_back({row[t], l, h, t});
        }
      }
      std::sort(mine.begin(), mine.end(), [](const Candidate& a, const Candidate& b) {
        if (std::isnan(a.score) != std::isnan(b.score)) return std::isnan(b.score);
        if (std::isnan(a.score)) return a.token > b.token;
        return a.score != b.score ? a.score > b.score : a.token < b.token;
      });
      const u32 floor = std::max(length == 0 ? 0u : std::max(covered, 1u),
                                 static_cast<u32>(static_cast<float>(nominal) * safeguard));
      all.insert(all.end(), mine.begin() + (floor - covered), mine.end());
      limits[l].push_back(floor);
      slots += nominal - floor;
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
    if (std::isnan(a.score) || std::isnan(b.score)) {
      return !std::isnan(a.score) && std::isnan(b.score);
    }
    return a.score > b.score;
  });
  for (u64 i = 0; i < slots; ++i) ++limits[all[i].layer][all[i].head];
  return limits;
}

}  // namespace

TEST_CASE("hard floor equals sorting all candidates") {
  Random random(1);
  for (int round = 0; round < 1500; ++round) {
    const u32 heads = 1 + random.below(5);
    const u32 length = 1 + random.below(40);
    const kvlean::Protection protection = random.protection();
    const u32 frozen = random.below(3) == 0 ? random.below(length + 1) : 0;
    const u32 least = std::max<u32>(protection.count(length, frozen), 1);
    const u32 nominal = least + random.below(length - least + 1);
    std::vector<Layer> layers;
    for (u32 l = 0; l < 3; ++l) {
      layers.push_back(make_layer(random.rows(heads, length, random.kind()), nominal, frozen));
    }
    const float safeguard = safeguards[random.below(6)];
    Model together(layers, protection);
    REQUIRE(together.run(AdaKVLayersAllocator{.safeguard = safeguard}) == StatusCode::ok);
    REQUIRE(together.limits == by_sorting(layers, protection, safeguard));
    Model apart(layers, protection);
    REQUIRE(apart.run(ada(safeguard)) == StatusCode::ok);
    for (u32 l = 0; l < 3; ++l) {
      REQUIRE(apart.limits[l] == by_sorting({layers[l]}, protection, safeguard)[0]);
    }
  }
}

TEST_CASE("totals are exact within floors and lengths, ragged layers included") {
  Random random(2);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const Layer layer = ragged_layer(random);
    const kvlean::Protection protection = random.protection();
    const float safeguard = safeguards[random.below(6)];
    const auto check = [&](const auto& allocator, bool exact) {
      Model model({layer}, protection);
      const u64 nominal = model.total();
      u64 floors = 0;
      for (u32 s = 0; s < layer.scores.size(); ++s) floors += model.floor(0, s);
      if (nominal < floors) {
        REQUIRE(model.run(allocator) == StatusCode::budget_below_protected);
        REQUIRE(model.limits[0] == layer.nominal);
        ++refused;
        return model.limits[0];
      }
      REQUIRE(model.run(allocator) == StatusCode::ok);
      for (u32 s = 0; s < layer.scores.size(); ++s) {
        REQUIRE(model.limits[0][s] >= model.floor(0, s));
        REQUIRE(model.limits[0][s] <= layer.scores[s].size());
      }
      if (exact) REQUIRE(model.total() == nominal);
      return model.limits[0];
    };
    const auto uniform = check(UniformAllocator{}, true);
    const auto hard = check(ada(safeguard), true);
    check(ada(safeguard, SafeguardMode::exact_mix), true);
    check(ada(safeguard, SafeguardMode::paper_literal), true);
    check(ada(safeguard, SafeguardMode::authors_mix), false);
    AdaKVAllocator normalized = ada(safeguard);
    normalized.normalize = true;
    check(normalized, true);
    if (safeguard == 1.0f) REQUIRE(hard == uniform);
    REQUIRE(check(ada(1.0f, SafeguardMode::exact_mix), true) == uniform);
    REQUIRE(check(ada(0.0f, SafeguardMode::paper_literal), true) == uniform);
    REQUIRE(check(ada(0.0f, SafeguardMode::exact_mix), true) ==
            check(ada(1.0f, SafeguardMode::paper_literal), true));
    check(AdaKVLayersAllocator{.safeguard = safeguard}, true);
    check(PyramidAllocator<>{}, true);
    check(PyramidAllocator<AdaKVAllocator>{}, true);
  }
  CHECK(refused > 0);
}

TEST_CASE("every budget from nothing to everything, and a larger one keeps more") {
  Random random(3);
  for (int round = 0; round < 60; ++round) {
    const u32 length = 1 + random.below(24);
    const kvlean::Protection protection = random.protection();
    const auto scores = random.rows(1 + random.below(4), length, random.kind());
    const u32 least = std::max<u32>(protection.count(length, 0), 1);
    std::vector<std::vector<u32>> before(scores.size());
    for (u32 nominal = 0; nominal <= length + 1; ++nominal) {
      for (auto mode : {SafeguardMode::hard_floor, SafeguardMode::exact_mix,
                        SafeguardMode::paper_literal, SafeguardMode::authors_mix}) {
        Model model({make_layer(scores, nominal)}, protection);
        const kvlean::Status status = model.run(ada(0.3f, mode));
        REQUIRE(status == (nominal < least ? StatusCode::budget_below_protected : StatusCode::ok));
        if (nominal >= length) {
          REQUIRE(model.limits[0] == std::vector<u32>(scores.size(), length));
        }
      }
      if (nominal < least) continue;
      Model model({make_layer(scores, nominal)}, protection);
      REQUIRE(model.run(ada(0.0f)) == StatusCode::ok);
      for (u32 s = 0; s < scores.size(); ++s) {
        const std::vector<u32> kept = model.kept(0, s);
        REQUIRE(std::includes(kept.begin(), kept.end(), before[s].begin(), before[s].end()));
        before[s] = kept;
      }
    }
  }
}

TEST_CASE(
    "the adaptive allocation retains at least what hard floor does, and that what uniform does") {
  Random random(4);
  for (int round = 0; round < 1500; ++round) {
    const u32 heads = 2u << random.below(3);
    const u32 length = 8 + random.below(60);
    const u32 nominal = 1 + random.below(length);
    const auto scores = random.rows(heads, length, Random::smooth);
    const auto retained = [&](const auto& allocator) {
      Model model({make_layer(scores, nominal)});
      REQUIRE(model.run(allocator) == StatusCode::ok);
      REQUIRE(model.total() == u64{heads} * nominal);
      return model.retained();
    };
    const double best = retained(ada(0.0f));
    const double hard = retained(ada(safeguards[1 + random.below(4)]));
    const double uniform = retained(UniformAllocator{});
    REQUIRE(best >= hard * (1 - 1e-12));
    REQUIRE(hard >= uniform * (1 - 1e-12));
  }
}

TEST_CASE("the authors' mix drifts within its stated bounds") {
  Random random(5);
  for (int round = 0; round < 1000; ++round) {
    const u32 heads = 2u << random.below(3);
    const u32 length = 20 + random.below(60);
    const u32 nominal = 2 + random.below(length - 2);
    Model model({make_layer(random.rows(heads, length, Random::smooth), nominal)}, {0, 1});
    REQUIRE(model.run(ada(safeguards[1 + random.below(4)], SafeguardMode::authors_mix)) ==
            StatusCode::ok);
    const double drift = static_cast<double>(model.total()) - static_cast<double>(heads) * nominal;
    REQUIRE(drift > -1.5 * heads);
    REQUIRE(drift <= 0.5 * heads);
  }
}

TEST_CASE("one head, permuted heads, scaled scores") {
  Random random(6);
  for (int round = 0; round < 1000; ++round) {
    const u32 heads = 1 + random.below(5);
    const u32 length = 2 + random.below(50);
    const u32 nominal = 1 + random.below(length);
    const float safeguard = safeguards[random.below(6)];
    const auto scores = random.rows(heads, length, Random::smooth);
    const auto counts = [&](const std::vector<std::vector<float>>& rows) {
      Model model({make_layer(rows, nominal)});
      REQUIRE(model.run(ada(safeguard)) == StatusCode::ok);
      return model.limits[0];
    };
    const auto mine = counts(scores);
    if (heads == 1) REQUIRE(mine[0] == nominal);
    std::vector<std::vector<float>> reversed(scores.rbegin(), scores.rend());
    REQUIRE(counts(reversed) == std::vector<u32>(mine.rbegin(), mine.rend()));
    auto scaled = scores;
    for (auto& row : scaled) {
      for (float& score : row) score *= 4.0f;
    }
    REQUIRE(counts(scaled) == mine);
    auto raised = scores;
    const u32 head = random.below(heads);
    for (float& score : raised[head]) score *= 1.5f;
    REQUIRE(counts(raised)[head] >= mine[head]);
  }
}

TEST_CASE("exact pyramids sum to the nominal total and never rise") {
  Random random(7);
  for (int round = 0; round < 4000; ++round) {
    const u32 tokens = 1 + random.below(round % 2 == 0 ? 60 : 40000);
    const u32 nominal = random.below(tokens + 1);
    const u32 window = random.below(nominal + 1);
    const u32 layers = 1 + random.below(80);
    const u32 beta = 1 + random.below(round % 3 == 0 ? 65536 : 40);
    u64 sum = 0;
    u32 previous = tokens;
    for (u32 l = 0; l < layers; ++l) {
      const u32 slots =
          kvlean::pyramid_slots(PyramidForm::exact, nominal, tokens, window, beta, l, layers);
      REQUIRE(slots >= window);
      REQUIRE(slots <= tokens);
      REQUIRE(slots <= previous + 1);
      previous = slots;
      sum += slots;
    }
    REQUIRE(sum == u64{nominal} * layers);
    if (beta == 1) REQUIRE(previous == nominal);
  }
}

TEST_CASE("a pyramid over all layers is exact whatever their shapes") {
  Random random(8);
  int done = 0;
  for (int round = 0; round < 1000; ++round) {
    std::vector<Layer> layers;
    for (u32 l = 0, count = 1 + random.below(6); l < count; ++l) {
      layers.push_back(ragged_layer(random));
    }
    Model model(layers, random.protection());
    model.num_layers = static_cast<u32>(layers.size());
    const u64 nominal = model.total();
    const auto before = model.limits;
    const kvlean::Status status = model.run(PyramidAllocator<AdaKVAllocator>{});
    if (!status) {
      REQUIRE(status == StatusCode::budget_below_protected);
      REQUIRE(model.limits == before);
      continue;
    }
    ++done;
    REQUIRE(model.total() == nominal);
  }
  CHECK(done > 100);
}

TEST_CASE("a ledger ends where all layers at once do, in any order") {
  Random random(9);
  for (int round = 0; round < 2000; ++round) {
    kvlean::LedgerShape shape;
    shape.tokens = random.below(30);
    shape.segments = 1 + random.below(4);
    shape.num_layers = 1 + random.below(8);
    shape.protection = random.protection();
    shape.frozen = random.below(4) == 0 ? random.below(shape.tokens + 1) : 0;
    shape.safeguard = safeguards[random.below(6)];
    const u32 covered = shape.protection.count(shape.tokens, shape.frozen);
    const u32 least = shape.tokens == 0 ? 0 : std::max<u32>(covered, 1);
    shape.nominal = least + random.below(shape.tokens - least + 1);
    std::vector<float> weights;
    for (u32 i = 0; i < shape.num_layers * shape.segments; ++i) {
      weights.push_back(static_cast<float>(random.below(4)));
    }
    if (random.below(2) == 0) {
      shape.head_weight = weights.data();
      shape.head_weight_stride = shape.segments;
    }
    const Random::Kind kind = random.kind();
    std::vector<Layer> layers;
    for (u32 l = 0; l < shape.num_layers; ++l) {
      layers.push_back(
          make_layer(random.rows(shape.segments, shape.tokens, kind), shape.nominal, shape.frozen));
    }
    Model model(layers, shape.protection);
    AdaKVLayersAllocator allocator;
    allocator.safeguard = shape.safeguard;
    allocator.head_weight = shape.head_weight;
    allocator.head_weight_stride = shape.head_weight_stride;
    REQUIRE(model.run(allocator) == StatusCode::ok);

    std::vector<u32> order(shape.num_layers);
    std::iota(order.begin(), order.end(), 0u);
    for (u32 turn = 0; turn < 3; ++turn) {
      std::vector<std::byte> memory(kvlean::LayerLedger::bytes_for(shape));
      kvlean::Workspace workspace{std::span<std::byte>(memory)};
      kvlean::LayerLedger ledger;
      REQUIRE(ledger.start(shape, workspace) == StatusCode::ok);
      std::vector<u32> before(std::size_t{shape.num_layers} * shape.segments, shape.tokens);
      for (u32 layer : order) {
        REQUIRE(ledger.add_layer(layer, model.scores(layer), model.cache(layer)) == StatusCode::ok);
        for (u32 l = 0; l < shape.num_layers; ++l) {
          for (u32 h = 0; h < shape.segments; ++h) {
            const u32 limit = ledger.limit(l, h);
            u32& last = before[std::size_t{l} * shape.segments + h];
            REQUIRE(limit <= last);
            if (limit != 0) last = limit;
          }
        }
      }
      REQUIRE(ledger.complete());
      for (u32 l = 0; l < shape.num_layers; ++l) {
        for (u32 h = 0; h < shape.segments; ++h) {
          REQUIRE(ledger.limit(l, h) == model.limits[l][h]);
        }
      }
      for (u32 i = shape.num_layers; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    }
  }
}
