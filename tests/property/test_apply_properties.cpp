// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <vector>

#include "kvlean/apply/apply.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/layouts.hpp"
#include "tests/support/plan_builder.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

// A random cache in a random layout; the same seed gives the same one again.
struct RandomCache {
  TensorMemory keys;
  TensorMemory values;
  std::vector<u32> lengths;
  std::vector<i32> positions;
  std::vector<float> log_mass;
  CacheView view;

  explicit RandomCache(u32 seed) {
    Random random(seed);
    const u32 heads = random.between(1, 4);
    const u32 tokens = random.between(1, 40);
    const u32 page_tokens = random.between(1, 6);
    const auto tensor = [&] {
      const auto layout =
          static_cast<Layout>(random.between(0, static_cast<u32>(Layout::count) - 1));
      return make_tensor(layout, dtypes[random.between(0, 2)], heads, tokens, random.between(1, 19),
                         page_tokens, random);
    };
    keys = tensor();
    values = tensor();
    view.keys = keys.rows;
    view.values = values.rows;
    view.segments = heads;
    view.capacity = tokens;
    view.uniform_length = random.between(1, tokens);
    if (random.chance(60)) {
      for (u32 s = 0; s < heads; ++s) lengths.push_back(random.between(1, tokens));
      view.lengths = lengths.data();
    }
    u32 shortest = tokens;
    for (u32 s = 0; s < heads; ++s) shortest = std::min(shortest, view.length(s));
    if (random.chance(40)) view.frozen = random.between(0, shortest);
    if (random.chance(50)) {
      for (u32 s = 0; s < heads; ++s) {
        i32 position = 0;
        for (u32 t = 0; t < tokens; ++t) {
          positions.push_back(position += static_cast<i32>(random.between(1, 5)));
        }
      }
      view.positions = Ragged<i32>(positions.data(), tokens);
    }
    if (random.chance(60)) {
      for (u32 i = 0; i < heads * tokens; ++i) log_mass.push_back(random.real(-1.0f, 3.0f));
      view.log_mass = Ragged<float>(log_mass.data(), tokens);
    }
    view.next_position = 1000;
    view.rope_pairing = RopePairing::neox;
    view.origin = {1, 2, 3};
  }
};

// A random plan that fits a cache. `flat` says that unequal lengths can be held.
struct RandomPlan {
  PlanBuilder builder;
  TensorMemory literal_keys;
  TensorMemory literal_values;

  RandomPlan(const CacheView& cache, Random& random) {
    const bool ragged = cache.lengths != nullptr && random.chance(80);
    u32 shortest = cache.max_length();
    for (u32 s = 0; s < cache.segments; ++s) shortest = std::min(shortest, cache.length(s));
    const u32 common = random.between(cache.frozen, shortest);
    std::vector<std::vector<u32>> dropped;
    for (u32 s = 0; s < cache.segments; ++s) {
      const u32 kept = ragged ? random.between(cache.frozen, cache.length(s)) : common;
      std::vector<u32> anchors(cache.frozen);
      std::iota(anchors.begin(), anchors.end(), 0u);
      for (const u32 t : random.subset(cache.length(s) - cache.frozen, kept - cache.frozen)) {
        anchors.push_back(cache.frozen + t);
      }
      builder.add_segment(anchors);
      dropped.emplace_back();
      for (u32 t = 0; t < cache.length(s); ++t) {
        if (!std::binary_search(anchors.begin(), anchors.end(), t)) dropped.back().push_back(t);
      }
    }
    builder.moves_keys = random.chance(50);
    if (random.chance(60)) add_terms(cache, dropped, random);
    if (random.chance(40)) add_weights(cache, builder.self_weight, random);
    if (random.chance(30)) add_weights(cache, builder.self_value_weight, random);
    if (cache.log_mass && random.chance(50)) {
      for (u32 s = 0; s < cache.segments; ++s) {
        for (u32 j = 0; j < builder.length[s]; ++j) {
          builder.log_mass.push_back(j < cache.frozen ? cache.mass_bias(s, j)
                                                      : random.real(-1.0f, 2.0f));
        }
      }
    }
    if (cache.positions && random.chance(50)) {
      for (u32 s = 0; s < cache.segments; ++s) {
        i32 position = -1;
        for (u32 j = 0; j < builder.length[s]; ++j) {
          position = j < cache.frozen ? cache.position(s, j)
                                      : position + static_cast<i32>(random.between(1, 3));
          builder.position.push_back(position);
        }
      }
    }
    const u32 longest = *std::max_element(builder.length.begin(), builder.length.end());
    if (cache.frozen == 0 && longest != 0) {
      const auto literal = [&](u32 width) {
        const auto layout = static_cast<Layout>(random.between(0, 5));
        return make_tensor(layout, dtypes[random.between(0, 2)], cache.segments, longest, width, 1,
                           random);
      };
      if (random.chance(15)) {
        literal_keys = literal(cache.keys.width);
        builder.literal_keys = literal_keys.rows;
      }
      if (random.chance(15)) {
        literal_values = literal(cache.values.width);
        builder.literal_values = literal_values.rows;
      }
    }
  }

 private:
  void add_terms(const CacheView& cache, const std::vector<std::vector<u32>>& dropped,
                 Random& random) {
    const u32 kind = random.between(0, 2);
    for (u32 s = 0; s < cache.segments; ++s) {
      const u64 pool_begin = builder.term_token.size();
      const auto push = [&](u32 token) {
        builder.term_token.push_back(token);
        builder.term_weight.push_back(random.real(-0.5f, 1.0f));
        builder.term_value_weight.push_back(random.real(-0.5f, 1.0f));
      };
      // 0: ranges of one shared pool, which overlap; 1: next to the anchor; 2: anywhere.
      if (kind == 0) {
        for (const u32 token : dropped[s]) push(token);
      }
      const u64 pool_end = builder.term_token.size();
      for (u32 j = 0; j < builder.length[s]; ++j) {
        u64 begin = builder.term_token.size();
        u64 end = begin;
        if (j >= cache.frozen && !dropped[s].empty() && random.chance(70)) {
          const u32 anchor = builder.anchor[builder.first[s] + j];
          const u32 count = static_cast<u32>(dropped[s].size());
          if (kind == 0) {
            const u32 a = random.between(0, count);
            const u32 b = random.between(0, count);
            begin = pool_begin + std::min(a, b);
            end = pool_begin + std::max(a, b);
            CHECK(end <= pool_end);
          } else {
            const u32 terms = random.between(1, 4);
            for (u32 i = 0; i < terms; ++i) {
              u32 at = random.between(0, count - 1);
              if (kind == 1) {
                const auto near = std::lower_bound(dropped[s].begin(), dropped[s].end(), anchor);
                at = std::min(static_cast<u32>(near - dropped[s].begin()) + i, count - 1);
              }
              push(dropped[s][at]);
            }
            end = builder.term_token.size();
          }
        }
        builder.term_begin.push_back(begin);
        builder.term_end.push_back(end);
      }
    }
    if (random.chance(50)) builder.term_value_weight.clear();
  }
  void add_weights(const CacheView& cache, std::vector<float>& weights, Random& random) {
    for (u32 s = 0; s < cache.segments; ++s) {
      for (u32 j = 0; j < builder.length[s]; ++j) {
        weights.push_back(j < cache.frozen || random.chance(30) ? 1.0f : random.real(0.1f, 1.5f));
      }
    }
  }
};

// One row computed in double, and a bound on the error that float and storage may add.
void reference_row(const CompressionPlan& plan, const Rows& from, bool key, u32 s, u32 j,
                   std::vector<double>& row, std::vector<double>& bound) {
  const u64 slot = plan.first[s] + j;
  row.assign(from.width, 0.0);
  bound.assign(from.width, 0.0);
  std::vector<float> loaded(from.width);
  const auto add = [&](const Rows& rows, u32 token, double weight) {
    load_row(rows, s, token, loaded.data());
    for (u32 d = 0; d < from.width; ++d) {
      row[d] += weight * static_cast<double>(loaded[d]);
      bound[d] += std::abs(weight * static_cast<double>(loaded[d]));
    }
  };
  const bool literal = key ? plan.has_literal_keys() : plan.has_literal_values();
  if (literal) {
    add(key ? plan.literal_keys : plan.literal_values, j, 1.0);
    return;
  }
  const bool blends = !key || (plan.needs & needs_moved_keys) != 0;
  const float self = key ? plan.key_self_weight(slot) : plan.value_self_weight(slot);
  add(from, plan.anchor[slot], blends ? static_cast<double>(self) : 1.0);
  if (!blends || !plan.has_terms()) return;
  for (u64 term = plan.term_begin[slot]; term < plan.term_end[slot]; ++term) {
    const float weight = key ? plan.term_weight[term] : plan.value_term_weight(term);
    add(from, plan.term_token[term], static_cast<double>(weight));
  }
}

double unit(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

u64 compare_with_reference(const CompressionPlan& plan, const Rows& from, const Rows& to,
                           bool key) {
  u64 wrong = 0;
  std::vector<double> row;
  std::vector<double> bound;
  std::vector<float> loaded(from.width);
  for (u32 s = 0; s < plan.segments; ++s) {
    for (u32 j = 0; j < plan.length[s]; ++j) {
      reference_row(plan, from, key, s, j, row, bound);
      load_row(to, s, j, loaded.data());
      for (u32 d = 0; d < from.width; ++d) {
        const double allowed = bound[d] * 64.0 * 0x1p-24 + std::abs(row[d]) * unit(to.dtype) + 1e-7;
        wrong += std::abs(row[d] - static_cast<double>(loaded[d])) <= allowed ? 0u : 1u;
      }
    }
  }
  return wrong;
}

bool same_bits(const Rows& a, u32 a_token, const Rows& b, u32 b_token, u32 s) {
  std::vector<float> left(a.width);
  std::vector<float> right(b.width);
  load_row(a, s, a_token, left.data());
  load_row(b, s, b_token, right.data());
  return std::memcmp(left.data(), right.data(), a.width * sizeof(float)) == 0;
}

// Slots of two caches that should be equal.
u64 count_differences(const CacheView& a, const CacheView& b, const CacheView& positions_of) {
  u64 wrong = 0;
  for (u32 s = 0; s < a.segments; ++s) {
    if (a.length(s) != b.length(s)) return 1;
    for (u32 j = 0; j < a.length(s); ++j) {
      wrong += same_bits(a.keys, j, b.keys, j, s) ? 0u : 1u;
      wrong += same_bits(a.values, j, b.values, j, s) ? 0u : 1u;
      wrong += a.mass_bias(s, j) == b.mass_bias(s, j) ? 0u : 1u;
      if (positions_of.positions) wrong += a.position(s, j) == b.position(s, j) ? 0u : 1u;
    }
  }
  return wrong;
}

RaggedKVCache make_destination(const CompressionPlan& plan, const CacheView& cache,
                               Random& random) {
  RaggedShape shape = ragged_shape(plan, cache);
  if (random.chance(50)) {
    shape.layout = RaggedLayout::fixed;
    shape.capacity_per_head = *std::max_element(plan.length, plan.length + plan.segments);
    shape.capacity_per_head += random.between(0, 5);
  }
  RaggedKVCache destination;
  REQUIRE(destination.allocate(shape));
  return destination;
}

// Bytes of a tensor that belong to none of its first length(s) rows must not change.
u64 changed_outside(const TensorMemory& now, const TensorMemory& before, const CacheView& cache) {
  if (now.tiles != nullptr) return 0;
  const Rows& rows = now.rows;
  std::vector<bool> inside(now.bytes.size());
  const std::size_t element = size_bytes(rows.dtype);
  for (u32 s = 0; s < cache.segments; ++s) {
    for (u32 t = cache.frozen; t < cache.length(s); ++t) {
      const std::byte* at = row_address(rows, s, t);
      for (u32 d = 0; d < rows.width; ++d) {
        const auto offset = at + static_cast<i64>(d) * rows.dim_stride * static_cast<i64>(element) -
                            now.bytes.data();
        for (std::size_t i = 0; i < element; ++i)
          inside[static_cast<std::size_t>(offset) + i] = true;
      }
    }
  }
  u64 changed = 0;
  for (std::size_t i = 0; i < inside.size(); ++i) {
    changed += !inside[i] && now.bytes[i] != before.bytes[i] ? 1u : 0u;
  }
  return changed;
}

// Runs tasks last to first, as a pool might.
Executor backwards_executor() {
  return {nullptr, 4,
          [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
            for (u32 i = tasks; i > 0; --i) task(arg, i % 4, i - 1);
          }};
}

}  // namespace

TEST_CASE("in place, out of place and a double reference agree on random plans", "[apply]") {
  for (u32 seed = 0; seed < 3000; ++seed) {
    CAPTURE(seed);
    const RandomCache source(seed);
    Random random(seed + 1000000);
    RandomPlan made(source.view, random);
    const CompressionPlan plan = made.builder.plan();
    REQUIRE(validate_plan(plan, source.view) == Status());

    RaggedKVCache destination = make_destination(plan, source.view, random);
    const Executor executor = random.chance(30) ? backwards_executor() : Executor{};
    REQUIRE(apply(plan, source.view, destination, executor) == Status());
    const CacheView result = destination.view();
    REQUIRE(check_cache(result));
    REQUIRE(compare_with_reference(plan, source.view.keys, result.keys, true) == 0);
    REQUIRE(compare_with_reference(plan, source.view.values, result.values, false) == 0);
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u32 j = 0; j < plan.length[s]; ++j) {
        const u64 slot = plan.first[s] + j;
        REQUIRE(result.position(s, j) == (plan.position != nullptr
                                              ? plan.position[slot]
                                              : source.view.position(s, plan.anchor[slot])));
        REQUIRE(result.mass_bias(s, j) == (plan.log_mass != nullptr
                                               ? plan.log_mass[slot]
                                               : source.view.mass_bias(s, plan.anchor[slot])));
      }
    }
    REQUIRE(result.next_position == source.view.next_position);
    REQUIRE(result.rope_pairing == RopePairing::neox);
    REQUIRE(result.origin.layer == 2);

    RandomCache changed(seed);
    REQUIRE(apply(plan, changed.view, in_place, executor) == Status());
    REQUIRE(count_differences(changed.view, result, changed.view) == 0);
    REQUIRE(changed.view.next_position == source.view.next_position);
    REQUIRE(changed_outside(changed.keys, source.keys, source.view) == 0);
    REQUIRE(changed_outside(changed.values, source.values, source.view) == 0);
  }
}

TEST_CASE("a compressed cache compresses again", "[apply]") {
  for (u32 seed = 0; seed < 600; ++seed) {
    CAPTURE(seed);
    const RandomCache source(seed);
    Random random(seed + 2000000);
    RandomPlan made(source.view, random);
    const CompressionPlan plan = made.builder.plan();
    RaggedKVCache once = make_destination(plan, source.view, random);
    REQUIRE(apply(plan, source.view, once));

    for (u32 round = 0; round < 3; ++round) {
      if (round == 1) once.pack();
      const CacheView before = once.view();
      RandomPlan next(before, random);
      const CompressionPlan again = next.builder.plan();
      REQUIRE(validate_plan(again, before) == Status());
      RaggedKVCache twice = make_destination(again, before, random);
      REQUIRE(apply(again, once, twice) == Status());
      REQUIRE(compare_with_reference(again, before.keys, twice.view().keys, true) == 0);
      REQUIRE(compare_with_reference(again, before.values, twice.view().values, false) == 0);
      REQUIRE(apply(again, once, in_place) == Status());
      REQUIRE(count_differences(once.view(), twice.view(), twice.view()) == 0);
      REQUIRE(once.view().next_position == source.view.next_position);
    }
  }
}

TEST_CASE("storage types are converted by one rounding", "[apply]") {
  for (u32 seed = 0; seed < 300; ++seed) {
    CAPTURE(seed);
    const RandomCache source(seed);
    Random random(seed + 3000000);
    PlanBuilder builder;
    for (u32 s = 0; s < source.view.segments; ++s) {
      builder.add_segment(random.subset(source.view.length(s), source.view.length(s)));
    }
    const CompressionPlan plan = builder.plan();
    RaggedShape shape = ragged_shape(plan, source.view);
    shape.key_dtype = dtypes[random.between(0, 2)];
    shape.value_dtype = dtypes[random.between(0, 2)];
    RaggedKVCache destination;
    REQUIRE(destination.allocate(shape));
    REQUIRE(apply(plan, source.view, destination));
    const CacheView result = destination.view();
    std::vector<float> row(max_row_width);
    u64 wrong = 0;
    for (u32 s = 0; s < plan.segments; ++s) {
      for (u32 t = 0; t < plan.length[s]; ++t) {
        load_row(source.view.keys, s, t, row.data());
        for (u32 d = 0; d < result.keys.width; ++d) {
          std::byte expected[4];
          store_element(expected, shape.key_dtype, row[d]);
          const std::byte* stored =
              row_address(result.keys, s, t) + d * size_bytes(shape.key_dtype);
          wrong += std::memcmp(expected, stored, size_bytes(shape.key_dtype)) == 0 ? 0u : 1u;
        }
      }
    }
    REQUIRE(wrong == 0);
  }
}

TEST_CASE("dropping pages gives the same cache as moving rows", "[apply]") {
  for (u32 seed = 0; seed < 600; ++seed) {
    CAPTURE(seed);
    Random setup(seed + 4000000);
    const u32 heads = setup.between(1, 3);
    const u32 tokens = setup.between(1, 40);
    const u32 page_tokens = setup.between(1, 7);
    const bool per_head = setup.chance(50);
    const bool blends = setup.chance(40);
    const bool has_lengths = setup.chance(60);

    std::vector<u32> lengths;
    for (u32 s = 0; s < heads; ++s) lengths.push_back(setup.between(1, tokens));
    const u32 longest = has_lengths ? *std::max_element(lengths.begin(), lengths.end()) : tokens;
    PlanBuilder builder;
    builder.page_tokens = page_tokens;
    std::vector<bool> keep(tokens);
    std::vector<std::vector<u32>> dropped(heads);
    for (u32 s = 0; s < heads; ++s) {
      const u32 length = has_lengths ? lengths[s] : longest;
      if (s == 0 || (per_head && has_lengths)) {
        for (u32 p = 0; p < keep.size(); ++p) keep[p] = setup.chance(60);
      }
      std::vector<u32> anchors;
      for (u32 t = 0; t < length; ++t) {
        if (keep[t / page_tokens]) {
          anchors.push_back(t);
        } else {
          dropped[s].push_back(t);
        }
      }
      builder.add_segment(anchors);
    }
    if (blends) {
      builder.moves_keys = true;
      for (u32 s = 0; s < heads; ++s) {
        for (u32 j = 0; j < builder.length[s]; ++j) {
          const std::size_t slot = builder.first[s] + j;
          if (dropped[s].empty()) continue;
          builder.add_terms(slot, {{dropped[s][slot % dropped[s].size()], 0.25f, 0.5f}});
        }
      }
    }
    const CompressionPlan plan = builder.plan();

    struct Memory {
      TensorMemory keys, values;
      std::vector<u32> lengths;
      std::vector<i32> positions;
      CacheView view;
    };
    const auto build = [&](Memory& memory) {
      Random random(seed);
      const Layout layout = per_head ? Layout::paged_heads : Layout::paged;
      memory.keys = make_tensor(layout, DType::f16, heads, tokens, 8, page_tokens, random);
      memory.values = make_tensor(layout, DType::bf16, heads, tokens, 5, page_tokens, random);
      memory.values.rows.page_table = nullptr;
      memory.values.page_table = memory.keys.page_table;  // one table for K and V
      memory.values.rows.page_table = memory.keys.page_table.data();
      memory.lengths = lengths;
      memory.positions.resize(std::size_t{heads} * tokens);
      for (std::size_t i = 0; i < memory.positions.size(); ++i) {
        memory.positions[i] = static_cast<i32>(3 * i);
      }
      memory.view.keys = memory.keys.rows;
      memory.view.values = memory.values.rows;
      memory.view.segments = heads;
      memory.view.capacity = tokens;
      memory.view.uniform_length = longest;
      memory.view.lengths = has_lengths ? memory.lengths.data() : nullptr;
      memory.view.positions = Ragged<i32>(memory.positions.data(), tokens);
      memory.view.next_position = 10000;
    };
    Memory source;
    Memory paged;
    build(source);
    build(paged);
    RaggedKVCache moved;
    REQUIRE(moved.allocate(ragged_shape(plan, source.view)));
    REQUIRE(apply(plan, source.view, moved) == Status());

    std::size_t pages_kept = 0;
    REQUIRE(apply_to_page_table(plan, paged.view, paged.keys.page_table, pages_kept) == Status());
    REQUIRE(count_differences(paged.view, moved.view(), moved.view()) == 0);
    std::size_t expected = 0;
    for (u32 s = 0; s < heads; ++s) {
      const u32 pages = pages_used(paged.view.length(s), page_tokens);
      expected = per_head ? expected + pages : std::max<std::size_t>(expected, pages);
    }
    REQUIRE(pages_kept == expected);
    auto before = source.keys.page_table;
    auto after = paged.keys.page_table;
    std::sort(before.begin(), before.end());
    std::sort(after.begin(), after.end());
    REQUIRE(before == after);  // every page is still there, kept or to be freed
  }
}

TEST_CASE("state moves with a plan by its rule", "[apply]") {
  for (u32 seed = 0; seed < 500; ++seed) {
    CAPTURE(seed);
    const RandomCache source(seed);
    Random random(seed + 5000000);
    RandomPlan made(source.view, random);
    const CompressionPlan plan = made.builder.plan();
    const std::size_t stride = source.view.capacity;
    std::vector<float> state(source.view.segments * stride);
    for (float& x : state) x = random.real(-3.0f, 3.0f);
    for (const MoveRule rule :
         {MoveRule::anchor, MoveRule::sum, MoveRule::max, MoveRule::logaddexp}) {
      std::vector<float> moved = state;
      REQUIRE(apply_state(plan, Ragged<float>(moved.data(), stride), rule));
      double worst = 0.0;
      for (u32 s = 0; s < plan.segments; ++s) {
        for (u32 j = 0; j < plan.length[s]; ++j) {
          const u64 slot = plan.first[s] + j;
          const auto of = [&](u32 token) { return static_cast<double>(state[s * stride + token]); };
          double expected = of(plan.anchor[slot]);
          double exponentials = std::exp(expected);
          for (u64 term = plan.has_terms() ? plan.term_begin[slot] : 0;
               plan.has_terms() && term < plan.term_end[slot]; ++term) {
            const double x = of(plan.term_token[term]);
            if (rule == MoveRule::sum) expected += x;
            if (rule == MoveRule::max) expected = std::max(expected, x);
            exponentials += std::exp(x);
          }
          if (rule == MoveRule::logaddexp) expected = std::log(exponentials);
          const double got = static_cast<double>(moved[s * stride + j]);
          worst = std::max(worst, std::abs(got - expected));
        }
      }
      REQUIRE(worst < 2e-4);
    }
  }
}
