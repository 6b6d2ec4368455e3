// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// KVMerger in one pass against plan and apply: the same bits in every array, for random shapes,
// options, types and layouts, broken data among them.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

/// One layer with everything that in-place work touches. Two from one seed are equal.
struct Layer {
  CacheSpec spec;
  RandomCache tensors;
  std::vector<u32> lengths;
  std::vector<u64> first;
  std::vector<i32> positions;
  std::vector<float> log_mass;
  std::vector<float> scores;
  RopeSpec rope;
  bool with_mass = false;
  u32 frozen = 0;

  Layer(const CacheSpec& shape, bool mass, u32 frozen_tokens, bool broken)
      : spec(shape), tensors(random_cache(shape)), with_mass(mass), frozen(frozen_tokens) {
    Random random(shape.seed + 1000);
    first.push_back(0);
    for (u32 h = 0; h < spec.kv_heads; ++h) {
      lengths.push_back(random.chance(10) ? frozen : random.between(frozen, spec.tokens));
      first.push_back(first.back() + spec.tokens);
      i32 position = 0;
      for (u32 t = 0; t < spec.tokens; ++t) {
        position += static_cast<i32>(random.between(1, 3));
        positions.push_back(position);
        log_mass.push_back(random.chance(50) ? 0.0f : random.real(0.0f, 3.0f));
        scores.push_back(random.chance(broken ? 10 : 0) ? nan : random.real(0.0f, 1.0f));
        if (broken && t >= frozen && random.chance(3)) {
          std::vector<float> row(spec.dim, random.chance(50) ? nan : 1e30f);
          tensors.keys.set_row(h, t, row);
        }
        if (broken && t >= frozen && random.chance(3)) log_mass.back() = -INFINITY;
        if (t > 0 && random.chance(50)) {  // a key close to the one before
          std::vector<float> row(spec.dim);
          load_row(tensors.keys.rows(), h, t - 1, row.data());
          for (float& x : row) x += random.real(-0.6f, 0.6f);
          tensors.keys.set_row(h, t, row);
        }
      }
    }
    rope.pairing = RopePairing::neox;
  }
  [[nodiscard]] CacheView view() {
    auto cache = tensors.cache();
    cache.set_lengths(lengths.data());
    cache.set_positions(Ragged<i32>(positions.data(), first.data()), 10000);
    if (with_mass) cache.set_log_mass(Ragged<float>(log_mass.data(), first.data()));
    cache.set_frozen(frozen).set_rope(&rope);
    return cache.view();
  }
  [[nodiscard]] Scores scored() {
    Scores result;
    result.segments = spec.kv_heads;
    result.lengths = lengths.data();
    result.rank = result.mass = Ragged<float>(scores.data(), first.data());
    result.has_mass = spec.seed % 2 == 0;
    return result;
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// The bits of the slots that are left.
bool same_slots(const Layer& a, const Layer& b, u32 h) {
  for (u32 t = 0; t < a.lengths[h]; ++t) {
    for (const auto tensor : {&RandomCache::keys, &RandomCache::values}) {
      const Rows& rows = (a.tensors.*tensor).rows();
      std::vector<float> x(rows.width), y(rows.width);
      load_row(rows, h, t, x.data());
      load_row((b.tensors.*tensor).rows(), h, t, y.data());
      if (!same(x, y)) return false;
    }
  }
  return true;
}

KVMergerReducer random_options(Random& random) {
  KVMergerReducer reducer;
  reducer.form = random.chance(70) ? KVMergerForm::threshold : KVMergerForm::slots;
  reducer.epsilon = random.real(0.0f, 0.98f);
  reducer.sigma = static_cast<Sigma>(random.between(0, 2));
  reducer.fixed_sigma = 1.5f;
  reducer.keys = static_cast<MergedKeys>(random.between(0, 2));
  reducer.enforce_limit = random.chance(60);
  if (random.chance(40)) {
    reducer.values = ValueScale::paper_set_size;
  } else {
    reducer.log_mass = static_cast<LogMass>(random.between(0, 2));
  }
  if (random.chance(50)) reducer.recent_tokens = random.between(0, 8);
  if (random.chance(50)) reducer.heavy_tokens = random.between(0, 8);
  return reducer;
}

}  // namespace

TEST_CASE("KVMerger in one pass has the bits of plan and apply") {
  Random random(77);
  u32 at_once = 0;
  u32 merged = 0;
  u32 above_limit = 0;
  constexpr Layout layouts[] = {Layout::contiguous, Layout::token_major,   Layout::padded,
                                Layout::backwards,  Layout::paged,         Layout::paged_heads,
                                Layout::indexed,    Layout::indexed_heads, Layout::indexed_pages,
                                Layout::transposed, Layout::strided_dims,  Layout::accessor};
  for (u32 round = 0; round < 1200; ++round) {
    CacheSpec spec;
    spec.seed = round + 1;
    spec.kv_heads = random.between(1, 3);
    spec.group = 1;
    spec.queries = 1;
    spec.tokens = random.between(1, random.chance(20) ? 300 : 80);
    spec.dim = 2 * random.between(1, 40);
    spec.value_dim = random.between(1, 80);
    spec.dtype = all_dtypes[random.between(0, 2)];
    const bool both = random.chance(85);  // rows that can be merged in place
    spec.key_layout = layouts[random.between(0, both ? 8 : 11)];
    spec.value_layout = layouts[random.between(0, both ? 8 : 11)];
    const bool mass = random.chance(60);
    const u32 frozen = random.chance(20) ? random.between(0, std::min(spec.tokens, 5u)) : 0;
    const bool broken = random.chance(30);
    Layer two_steps(spec, mass, frozen, broken);
    Layer one_step(spec, mass, frozen, broken);
    const KVMergerReducer reducer = random_options(random);
    PlanOptions options;
    options.protection = {.sinks = random.between(0, 3), .recent = random.between(0, 6)};
    if (random.chance(15)) options.sharing = Sharing::equal_count();
    std::vector<u32> limit(spec.kv_heads);
    for (u32 h = 0; h < spec.kv_heads; ++h) {
      const u32 length = two_steps.lengths[h];
      const u32 least = std::min(length, options.protection.count(length, frozen));
      limit[h] = random.between(least, length);
    }
    if (options.sharing.kind == SharingKind::equal_count) {
      limit.assign(spec.kv_heads, *std::min_element(limit.begin(), limit.end()));
    }
    CAPTURE(round, name(spec.dtype), spec.tokens, spec.dim, spec.value_dim);
    CAPTURE(static_cast<int>(reducer.form), static_cast<int>(reducer.keys), reducer.epsilon);

    Workspace workspace;
    Context context{workspace, options};
    CacheView view = two_steps.view();
    CompressionPlan plan;
    const std::vector<u32> before = two_steps.lengths;
    Status status = reducer.reduce(view, two_steps.scored(), limit.data(), context, plan);
    if (status) status = apply(plan, view, in_place);

    bool done = false;
    CacheView fused = one_step.view();
    const Status fused_status =
        reducer.reduce_in_place(fused, one_step.scored(), limit.data(), context, done);
    if (!done) {
      CHECK(one_step.lengths == before);
      CHECK((fused_status.ok() || fused_status.code() == status.code()));
      continue;
    }
    ++at_once;
    REQUIRE(status);
    REQUIRE(fused_status);
    REQUIRE(one_step.lengths == two_steps.lengths);
    if (plan.num_terms != 0) ++merged;
    for (u32 h = 0; h < spec.kv_heads; ++h) {
      if (plan.slots_evicted[h] != 0) ++above_limit;
      REQUIRE(same_slots(one_step, two_steps, h));
      const std::size_t at = one_step.first[h];
      for (u32 t = 0; t < one_step.lengths[h]; ++t) {
        REQUIRE(one_step.positions[at + t] == two_steps.positions[at + t]);
        const float a = one_step.log_mass[at + t];
        const float b = two_steps.log_mass[at + t];
        REQUIRE((a == b || !mass));
      }
    }
  }
  CHECK(at_once > 500);
  CHECK(merged > 300);
  CHECK(above_limit > 50);
}

TEST_CASE("compress() of a policy with KVMerger has the bits of plan() and apply()") {
  Random random(5);
  for (u32 round = 0; round < 60; ++round) {
    CacheSpec spec;
    spec.seed = 500 + round;
    spec.tokens = random.between(40, 200);
    spec.dim = 32;
    spec.dtype = all_dtypes[round % 3];
    Layer a(spec, round % 2 == 0, 0, false);
    Layer b(spec, round % 2 == 0, 0, false);
    const char* names[] = {"kvmerger_threshold",    "kvmerger", "kvmerger_paper", "kvmerger_pivot",
                           "snapkv+adakv+kvmerger", "h2o"};
    AnyPolicy policy;
    REQUIRE(make_policy(names[round % 6], policy));
    PlanOptions options;
    options.protection.recent = 4;
    const Observation seen = a.tensors.observation(4);
    Workspace workspace;
    CacheView first = a.view();
    CacheView second = b.view();
    CompressionPlan plan;
    Status status = policy.plan(first, seen, Budget::fraction(0.5), workspace, plan, options);
    if (status) status = apply(plan, first, in_place);
    const Status at_once = policy.compress(second, seen, Budget::fraction(0.5), workspace, options);
    CAPTURE(round, status.message(), at_once.message());
    REQUIRE(status.code() == at_once.code());
    if (!status) continue;
    REQUIRE(a.lengths == b.lengths);
    for (u32 h = 0; h < spec.kv_heads; ++h) REQUIRE(same_slots(a, b, h));
  }
}
