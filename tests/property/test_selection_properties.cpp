// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Selection against sorting, on sizes where a sample, a copy and passes over all scores are used.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kvlean/allocate/adakv.hpp"
#include "kvlean/allocate/adakv_layers.hpp"
#include "kvlean/allocate/ledger.hpp"
#include "kvlean/reduce/evict.hpp"
#include "tests/support/allocation.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::Layer;
using kvlean_test::make_layer;
using kvlean_test::Model;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// Kinds of data that a search by sample and counts may go wrong on.
enum class Data {
  smooth,    // all different
  skewed,    // over many orders of magnitude
  pooled,    // runs of equal scores
  periodic,  // what a fixed step through the tokens would miss
  few,       // three values
  zeros,     // mostly zero, of both signs
  equal,     // one value
  wild,      // NaN, infinities, negative, subnormal
  nan,       // almost nothing else
  falling,   // sorted
};
constexpr Data all_data[] = {Data::smooth, Data::skewed, Data::pooled, Data::periodic,
                             Data::few,    Data::zeros,  Data::equal,  Data::wild,
                             Data::nan,    Data::falling};

std::vector<float> row(u32 count, Data data, u64 seed) {
  std::mt19937 random(static_cast<u32>(seed));
  const auto unit = [&] { return static_cast<float>(random() >> 8) * 0x1p-24f; };
  std::vector<float> x(count);
  for (u32 t = 0; t < count; ++t) {
    float& score = x[t];
    score = unit();
    switch (data) {
      case Data::smooth:
        break;
      case Data::skewed:
        score = std::exp(40.0f * (score - 0.8f));
        break;
      case Data::pooled:
        if (t % 7 != 0) score = x[t - 1];
        break;
      case Data::periodic:
        score += t % 16 == 3 ? 1.0f : 0.0f;
        break;
      case Data::few:
        score = std::floor(score * 3.0f);
        break;
      case Data::zeros:
        if (score < 0.9f) score = score < 0.4f ? -0.0f : 0.0f;
        break;
      case Data::equal:
        score = 0.25f;
        break;
      case Data::wild: {
        const u32 dice = static_cast<u32>(random() % 10);
        if (dice == 0) score = not_a_number;
        if (dice == 1) score = infinity;
        if (dice == 2) score = -infinity;
        if (dice == 3) score *= 0x1p-130f;
        if (dice == 4) score = -score;
        break;
      }
      case Data::nan:
        if (score < 0.97f) score = not_a_number;
        break;
      case Data::falling:
        score = 1.0f / (1.0f + static_cast<float>(t));
        break;
    }
  }
  return x;
}

/// What the best `wanted` are by definition.
std::vector<u8> best_by_sorting(const std::vector<float>& x, u32 wanted) {
  std::vector<u64> keys;
  for (u32 t = 0; t < x.size(); ++t) keys.push_back(token_key(x[t], t));
  std::sort(keys.rbegin(), keys.rend());
  std::vector<u8> keep(x.size());
  for (u32 i = 0; i < wanted; ++i) keep[token_of_key(keys[i])] = 1;
  return keep;
}

/// `room` floats of scratch for `runs` runs.
struct Scratch {
  Scratch(std::size_t run_count, u64 room) : runs(2 * run_count), floats(room + 1) {
    cut = {runs.data(), floats.data(), room};
  }
  std::vector<detail::ScoreRun> runs;
  std::vector<float> floats;
  detail::CutScratch cut;
};

/// All layers' limits by the definition: the best of each segment are safe, the rest is one list.
std::vector<std::vector<u32>> limits_by_sorting(const std::vector<Layer>& layers,
                                                Protection protection, float safeguard) {
  std::vector<std::vector<u32>> limits;
  std::vector<std::pair<u32, u64>> rest;  // key, then place in the order of ties
  u64 slots = 0;
  u64 place = 0;
  std::vector<u32*> owner;
  for (const Layer& layer : layers) limits.emplace_back(layer.scores.size());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    for (std::size_t h = 0; h < layers[l].scores.size(); ++h) {
      const std::vector<float>& x = layers[l].scores[h];
      const u32 length = static_cast<u32>(x.size());
      const u32 covered = protection.count(length, layers[l].frozen);
      const u32 nominal = layers[l].nominal[h];
      const u32 safe = std::max({covered, length != 0 ? 1u : 0u,
                                 static_cast<u32>(static_cast<float>(nominal) * safeguard)});
      std::vector<u32> keys;
      for (u32 t = 0; t < length; ++t) {
        if (!protection.covers(t, length, layers[l].frozen)) keys.push_back(score_key(x[t]));
      }
      std::sort(keys.rbegin(), keys.rend());
      limits[l][h] = safe;
      for (std::size_t i = safe - covered; i < keys.size(); ++i) {
        rest.emplace_back(~keys[i], place++);
        owner.push_back(&limits[l][h]);
      }
      slots += nominal - safe;
    }
  }
  std::sort(rest.begin(), rest.end());
  for (u64 i = 0; i < slots; ++i) ++*owner[rest[i].second];
  return limits;
}

}  // namespace

TEST_CASE("the best of one segment equal sorting, whatever the data and the scratch") {
  u32 seed = 1;
  for (const Data data : all_data) {
    for (const u32 count : {1u, 2u, 17u, 511u, 513u, 600u, 2000u, 5003u}) {
      const std::vector<float> x = row(count, data, ++seed);
      for (const u32 wanted :
           {0u, 1u, 2u, count / 20, count / 4, count / 2, count - count / 9, count - 1, count}) {
        if (wanted > count) continue;
        const std::vector<u8> expected = best_by_sorting(x, wanted);
        for (const u64 room : {detail::CutScratch::floats_for(count), u64{0}, u64{40}}) {
          CAPTURE(static_cast<int>(data), count, wanted, room);
          Scratch scratch(1, room);
          std::vector<u8> keep(count, 9);
          detail::mark_best(x.data(), count, wanted, keep.data(), scratch.cut);
          REQUIRE(keep == expected);
        }
      }
    }
  }
}

TEST_CASE("protected tokens stay beside the best others") {
  u32 seed = 100;
  for (const Data data : all_data) {
    for (const u32 length : {0u, 1u, 5u, 40u, 900u, 3001u}) {
      const std::vector<float> x = row(length, data, ++seed);
      for (const Protection protection : {Protection{0, 0}, Protection{4, 32}, Protection{1, 0},
                                          Protection{0, 7}, Protection{600, 600}}) {
        for (const u32 frozen : {0u, 9u}) {
          for (const u32 slots : {0u, 3u, 41u, length / 3, length, length + 5}) {
            CAPTURE(static_cast<int>(data), length, protection.sinks, protection.recent, frozen,
                    slots);
            std::vector<u64> keys;
            std::vector<u8> expected(length);
            u32 kept = 0;
            for (u32 t = 0; t < length; ++t) {
              if (protection.covers(t, length, frozen)) {
                expected[t] = 1;
                ++kept;
              } else {
                keys.push_back(token_key(x[t], t));
              }
            }
            std::sort(keys.rbegin(), keys.rend());
            for (std::size_t i = 0; i < keys.size() && kept < slots; ++i, ++kept) {
              expected[token_of_key(keys[i])] = 1;
            }
            Scratch scratch(1, detail::CutScratch::floats_for(length));
            std::vector<u8> keep(length, 9);
            CHECK(select_top(x.data(), length, slots, protection, frozen, keep.data(),
                             scratch.cut) == kept);
            REQUIRE(keep == expected);
          }
        }
      }
    }
  }
}

TEST_CASE("the cut of many weighted runs equals sorting, whatever the scratch") {
  std::mt19937 random(3);
  for (int round = 0; round < 150; ++round) {
    const std::size_t count = 1 + random() % 6;
    const Data data = all_data[random() % std::size(all_data)];
    std::vector<std::vector<float>> rows;
    std::vector<detail::ScoreRun> runs;
    std::vector<u32> rest;
    for (std::size_t r = 0; r < count; ++r) {
      const u32 length = static_cast<u32>(random() % 3 == 0 ? random() % 9 : random() % 1500);
      const Data kind = random() % 2 == 0 ? data : Data::smooth;
      rows.push_back(row(length, kind, random()));
      const u32 safe = static_cast<u32>(random() % 2 * (random() % (length + 1)));
      const float weight = round % 3 == 0 ? 1.0f : static_cast<float>(random() % 4) * 0.37f;
      runs.push_back({rows.back().data(), length, weight, safe});
      std::vector<u32> keys;
      for (const float x : rows.back()) keys.push_back(score_key(x * weight));
      std::sort(keys.rbegin(), keys.rend());
      rest.insert(rest.end(), keys.begin() + safe, keys.end());
    }
    for (std::size_t r = 0; r < count; ++r) runs[r].scores = rows[r].data();
    std::sort(rest.rbegin(), rest.rend());
    const u64 most = rest.size();
    for (const u64 wanted : {u64{0}, std::min<u64>(most, 1), most / 10, most / 2, most}) {
      for (const u64 room : {detail::CutScratch::floats_for(most * 2), u64{0}, u64{100}}) {
        CAPTURE(round, static_cast<int>(data), wanted, room);
        Scratch scratch(count, room);
        detail::CutSearch search(runs, wanted, scratch.cut);
        const detail::KeyCut cut = search.find();
        u64 above = 0;
        u64 reaching = 0;
        for (std::size_t r = 0; r < count; ++r) {
          above += search.above_cut(r);
          reaching += search.reaching_cut(r);
        }
        if (wanted == 0) {
          CHECK((cut.ties == 0 && above == 0 && reaching == 0));
          continue;
        }
        const u32 key = rest[wanted - 1];
        REQUIRE(cut.key == key);
        REQUIRE(above == static_cast<u64>(std::count_if(rest.begin(), rest.end(),
                                                        [=](u32 k) { return k > key; })));
        REQUIRE(reaching == static_cast<u64>(std::count_if(rest.begin(), rest.end(),
                                                           [=](u32 k) { return k >= key; })));
        REQUIRE(cut.ties == wanted - above);
      }
    }
  }
}

TEST_CASE("heads, and layers, compete as in one sorted list; a ledger agrees") {
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    const u32 layer_count = 1 + static_cast<u32>(random() % 4);
    const u32 heads = 1 + static_cast<u32>(random() % 4);
    const u32 length = 200 + static_cast<u32>(random() % 900);
    const Data data = all_data[static_cast<std::size_t>(round) % std::size(all_data)];
    const Protection protection{static_cast<u32>(random() % 3) * 2,
                                static_cast<u32>(random() % 3) * 8};
    const float safeguard = round % 4 == 0 ? 0.0f : 0.2f;
    const u32 nominal = 40 + static_cast<u32>(random() % (length - 40));
    std::vector<Layer> layers;
    for (u32 l = 0; l < layer_count; ++l) {
      std::vector<std::vector<float>> rows;
      for (u32 h = 0; h < heads; ++h) {
        const Data kind = random() % 3 == 0 ? Data::smooth : data;
        rows.push_back(row(length, kind, random()));
      }
      layers.push_back(make_layer(rows, nominal));
    }
    CAPTURE(round, static_cast<int>(data), layer_count, heads, length, nominal, safeguard);
    Model together(layers, protection);
    AdaKVLayersAllocator across;
    across.safeguard = safeguard;
    REQUIRE(together.run(across) == StatusCode::ok);
    CHECK(together.limits == limits_by_sorting(layers, protection, safeguard));

    Model apart(layers, protection);
    AdaKVAllocator within;
    within.safeguard = safeguard;
    REQUIRE(apart.run(within) == StatusCode::ok);
    for (u32 l = 0; l < layer_count; ++l) {
      CHECK(apart.limits[l] == limits_by_sorting({layers[l]}, protection, safeguard)[0]);
    }

    LedgerShape shape;
    shape.tokens = length;
    shape.segments = heads;
    shape.num_layers = layer_count;
    shape.nominal = nominal;
    shape.protection = protection;
    shape.safeguard = safeguard;
    std::vector<std::byte> memory(LayerLedger::bytes_for(shape));
    Workspace workspace{std::span<std::byte>(memory)};
    LayerLedger ledger;
    REQUIRE(ledger.start(shape, workspace) == StatusCode::ok);
    std::vector<u32> order(layer_count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (const u32 l : order) {
      REQUIRE(ledger.add_layer(l, together.scores(l), together.cache(l)) == StatusCode::ok);
    }
    for (u32 l = 0; l < layer_count; ++l) {
      for (u32 h = 0; h < heads; ++h) CHECK(ledger.limit(l, h) == together.limits[l][h]);
    }
  }
}

TEST_CASE("pages are kept by their mean score") {
  std::mt19937 random(8);
  for (const Data data : all_data) {
    for (const u32 length : {1u, 16u, 100u, 1003u, 9000u}) {
      for (const u32 page : {1u, 3u, 16u}) {
        const std::vector<float> x = row(length, data, random());
        const Protection protection{static_cast<u32>(random() % 3) * 4,
                                    static_cast<u32>(random() % 3) * 9};
        const u32 frozen = static_cast<u32>(random() % 2) * 21;
        for (const u32 slots : {length / 8 + 40, length / 2 + 16, length}) {
          CAPTURE(static_cast<int>(data), length, page, slots, protection.sinks);
          std::vector<u8> expected(length);
          std::vector<u64> keys;
          u32 wanted = 0;
          for (u32 begin = 0; begin < length; begin += page) {
            const u32 end = std::min(begin + page, length);
            bool covered = end - begin < page;
            double sum = 0.0;
            for (u32 t = begin; t < end; ++t) {
              covered = covered || protection.covers(t, length, frozen);
              sum += static_cast<double>(x[t]);
            }
            if (covered) {
              std::fill(expected.begin() + begin, expected.begin() + end, u8{1});
              wanted += end - begin;
            } else {
              keys.push_back(token_key(static_cast<float>(sum / page), begin / page));
            }
          }
          std::sort(keys.rbegin(), keys.rend());
          const bool possible = wanted <= slots;
          for (std::size_t i = 0; i < keys.size() && wanted + page <= slots; ++i, wanted += page) {
            std::fill_n(expected.begin() + token_of_key(keys[i]) * page, page, u8{1});
          }
          Scratch scratch(1, detail::CutScratch::floats_for(length));
          std::vector<u8> keep(length, 9);
          std::vector<u8> page_keep(length);
          std::vector<float> page_score(length);
          u32 kept = 0;
          const Status status =
              detail::select_pages(x.data(), length, slots, page, protection, frozen, keep.data(),
                                   page_score.data(), page_keep.data(), scratch.cut, kept);
          if (!possible || wanted == 0) {
            CHECK(status == StatusCode::budget_below_protected);
            continue;
          }
          REQUIRE(status == StatusCode::ok);
          CHECK(kept == wanted);
          REQUIRE(keep == expected);
        }
      }
    }
  }
}
