// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Error measures and the eviction bound on numbers worked out by hand, and every error they return.
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kvlean/attention/error_measures.hpp"
#include "kvlean/attention/eviction_bound.hpp"
#include "kvlean/kvlean.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;

constexpr float infinity = std::numeric_limits<float>::infinity();

ConstAttentionOutput of(const float* values) { return {values, nullptr}; }

}  // namespace

TEST_CASE("relative error is |o^ - o| / |o| a row, defined for zero references", "[errors]") {
  const float reference[] = {3, 4, 0, 0, 0, 0, 1e-30f, 0};
  const float output[] = {3, 9, 0, 0, 5, 0, 0, 0};
  float errors[4] = {};
  REQUIRE(relative_error(of(output), of(reference), {2, 2, 2}, errors));
  REQUIRE(errors[0] == 1.0f);
  REQUIRE(errors[1] == 0.0f);  // both zero
  REQUIRE(errors[2] == 1.0f);  // only the reference is zero
  REQUIRE(errors[3] == 1.0f);  // tiny is not zero
  const float bad[] = {NAN, 4};
  REQUIRE(relative_error(of(bad), of(reference), {1, 1, 2}, errors));
  REQUIRE(std::isnan(errors[0]));
}

TEST_CASE("relative error reads strided outputs", "[errors]") {
  const float output[] = {1, 5, 2, 5};  // [query][head], two elements a query
  const float reference[] = {1, 1, 5, 10};
  float errors[4] = {};
  REQUIRE(relative_error({output, nullptr, 1, 2}, of(reference), {2, 2, 1}, errors));
  REQUIRE(std::vector<float>(errors, errors + 4) == std::vector<float>{0, 1, 0, 0.5f});
}

TEST_CASE("absolute loss sums over dimensions, layer loss over W_O", "[errors]") {
  const AttentionShape shape{2, 1, 2};
  const float reference[] = {1, 2, 3, 4};
  const float output[] = {2, 0, 3, 5};  // differences (1, -2) and (0, 1)
  float losses[2] = {};
  REQUIRE(absolute_loss(of(output), of(reference), shape, losses));
  REQUIRE(losses[0] == 3.0f);
  REQUIRE(losses[1] == 1.0f);
  Workspace workspace;
  float loss = 0.0f;
  REQUIRE(layer_loss(of(output), of(reference), shape, Rows{}, &loss, workspace));
  REQUIRE(loss == 4.0f);
  // [head][dim][hidden 3]: 1 (1,0,1) - 2 (0,1,1) + 1 (-1,1,0) = (0,-1,-1)
  const float projection[] = {1, 0, 1, 0, 1, 1, 9, 9, 9, -1, 1, 0};
  const Rows rows = strided(projection, Extents{2, 2, 3}).rows();
  REQUIRE(layer_loss(of(output), of(reference), shape, rows, &loss, workspace));
  REQUIRE(loss == 2.0f);
}

TEST_CASE("layer loss takes a W_O wider than a cache row may be", "[errors]") {
  constexpr u32 hidden = 3 * max_row_width;
  const std::vector<float> projection(hidden, 0.5f);
  const float output = 3.0f;
  const float reference = 1.0f;
  Workspace workspace;
  float loss = 0.0f;
  REQUIRE(layer_loss(of(&output), of(&reference), {1, 1, 1},
                     strided(projection.data(), Extents{1, 1, hidden}).rows(), &loss, workspace));
  REQUIRE(loss == static_cast<float>(hidden));
}

TEST_CASE("lost mass is what the LSE shows to be gone", "[errors]") {
  const float full[] = {0.0f, 0.0f, 0.0f, -infinity, -infinity, 1e4f, NAN};
  const float compressed[] = {std::log(0.75f), 0.2f, -infinity, -infinity, 0.0f, 1e4f, 0.0f};
  float lost[7] = {};
  REQUIRE(lost_mass(compressed, full, 7, lost));
  REQUIRE_THAT(static_cast<double>(lost[0]), WithinAbs(0.25, 1e-7));
  REQUIRE(lost[1] == 0.0f);  // over-counted
  REQUIRE(lost[2] == 1.0f);  // everything gone
  REQUIRE(lost[3] == 0.0f);  // nothing to lose
  REQUIRE(lost[4] == 0.0f);
  REQUIRE(lost[5] == 0.0f);
  REQUIRE(std::isnan(lost[6]));
}

TEST_CASE("a summary has the mean, the nearest-rank p95 and the maximum", "[errors]") {
  Workspace workspace;
  ErrorSummary summary;
  std::vector<float> errors;
  for (u32 i = 0; i < 100; ++i) errors.push_back(static_cast<float>((i * 37) % 100 + 1));
  REQUIRE(summarize(errors.data(), 100, workspace, summary));
  REQUIRE(summary.count == 100);
  REQUIRE(summary.mean == 50.5);
  REQUIRE(summary.p95 == 95.0f);
  REQUIRE(summary.max == 100.0f);
  for (const u64 count : {1u, 2u, 19u, 20u, 21u, 40u, 41u}) {
    for (u32 i = 0; i < count; ++i) errors[i] = static_cast<float>(count - i);
    REQUIRE(summarize(errors.data(), count, workspace, summary));
    CAPTURE(count);
    REQUIRE(summary.p95 == static_cast<float>((count * 19 + 19) / 20));  // ceil(0.95 count)
    REQUIRE(summary.max == static_cast<float>(count));
  }
  const float bad[] = {1, NAN, 3};
  REQUIRE(summarize(bad, 3, workspace, summary));
  REQUIRE(std::isnan(summary.mean));
  REQUIRE(std::isnan(summary.max));
}

TEST_CASE("error measures refuse null pointers and empty shapes", "[errors]") {
  float a[2] = {};
  const ConstAttentionOutput some = of(a);
  Workspace workspace;
  ErrorSummary summary;
  const AttentionShape shape{1, 2, 1};
  REQUIRE(relative_error({}, some, shape, a) == StatusCode::null_pointer);
  REQUIRE(relative_error(some, {}, shape, a) == StatusCode::null_pointer);
  REQUIRE(relative_error(some, some, shape, nullptr) == StatusCode::null_pointer);
  REQUIRE(relative_error(some, some, {0, 2, 1}, a) == StatusCode::invalid_shape);
  REQUIRE(absolute_loss({}, some, shape, a) == StatusCode::null_pointer);
  REQUIRE(absolute_loss(some, some, {1, 0, 1}, a) == StatusCode::invalid_shape);
  REQUIRE(layer_loss(some, some, shape, {}, nullptr, workspace) == StatusCode::null_pointer);
  REQUIRE(layer_loss(some, some, {1, 2, 0}, {}, a, workspace) == StatusCode::invalid_shape);
  REQUIRE(lost_mass(nullptr, a, 2, a) == StatusCode::null_pointer);
  REQUIRE(lost_mass(a, nullptr, 2, a) == StatusCode::null_pointer);
  REQUIRE(lost_mass(a, a, 2, nullptr) == StatusCode::null_pointer);
  REQUIRE(lost_mass(a, a, 0, a) == StatusCode::invalid_shape);
  REQUIRE(summarize(nullptr, 1, workspace, summary) == StatusCode::null_pointer);
  REQUIRE(summarize(a, 0, workspace, summary) == StatusCode::invalid_shape);
}

TEST_CASE("an output projection must fit, and scratch must be there", "[errors]") {
  float a[2] = {};
  const float projection[8] = {};
  const ConstAttentionOutput some = of(a);
  const AttentionShape shape{1, 1, 2};
  Workspace workspace;
  Workspace none{std::span<std::byte>{}};
  ErrorSummary summary;
  const Rows fits = strided(projection, Extents{1, 2, 4}).rows();
  REQUIRE(layer_loss(some, some, shape, fits, a, workspace));
  REQUIRE(layer_loss(some, some, shape, strided(projection, Extents{2, 2, 2}).rows(), a,
                     workspace) == StatusCode::shape_mismatch);
  REQUIRE(layer_loss(some, some, shape, strided(projection, Extents{1, 4, 2}).rows(), a,
                     workspace) == StatusCode::shape_mismatch);
  REQUIRE(layer_loss(some, some, shape, strided(projection, Extents{1, 2, 0}).rows(), a,
                     workspace) == StatusCode::invalid_shape);
  REQUIRE(layer_loss(some, some, shape, fits, a, none) == StatusCode::workspace_too_small);
  REQUIRE(summarize(a, 2, none, summary) == StatusCode::workspace_too_small);
}

TEST_CASE("the eviction bound on numbers worked out by hand", "[bound]") {
  // One KV head read by two query heads, three tokens, two dimensions.
  const float keys[6] = {};
  const float values[] = {1, 0, 0, 2, -1, 1};
  const CacheView cache =
      KVCache(strided(keys, Extents{1, 3, 2}), strided(values, Extents{1, 3, 2})).view();
  const float retained[] = {0.75f, 0.5f};
  Workspace workspace;
  EvictionBound bound;
  float constants[2] = {};
  SECTION("identity: C_i = max |V_j|_1 = 2") {
    REQUIRE(eviction_loss_bound(cache, {}, 2, retained, bound, constants, workspace));
    REQUIRE(constants[0] == 2.0f);
    REQUIRE(constants[1] == 2.0f);
    REQUIRE(bound.constant == 2.0);
    REQUIRE(bound.bound == 3.0);
    REQUIRE(bound.per_head_bound == 3.0);
  }
  SECTION("a projection a head: rows (1,1) (0,1) and (3,0) (0,1)") {
    const float projection[] = {1, 1, 0, 1, 3, 0, 0, 1};
    // head 0: (1,1) (0,2) (-1,0): 2; head 1: (3,0) (0,2) (-3,1): 4
    REQUIRE(eviction_loss_bound(cache, strided(projection, Extents{2, 2, 2}).rows(), 2, retained,
                                bound, constants, workspace));
    REQUIRE(constants[0] == 2.0f);
    REQUIRE(constants[1] == 4.0f);
    REQUIRE(bound.constant == 4.0);
    REQUIRE(bound.bound == 6.0);           // 2 * 4 * (0.25 + 0.5)
    REQUIRE(bound.per_head_bound == 5.0);  // 2 * 2 * 0.25 + 2 * 4 * 0.5
  }
  SECTION("retained mass above one by rounding loses nothing") {
    const float above[] = {1.0000001f, 1.0f};
    REQUIRE(eviction_loss_bound(cache, {}, 2, above, bound, nullptr, workspace));
    REQUIRE(bound.bound == 0.0);
    REQUIRE(bound.per_head_bound == 0.0);
  }
}

TEST_CASE("retained mass sums a row over the kept tokens of its KV head", "[bound]") {
  const float attention[] = {0.5f, 0.25f, 0.25f, 0.1f, 0.2f, 0.7f, 1.0f, 0, 0, 0.5f, 0.5f, 0};
  const u8 keep[] = {1, 0, 1, 0, 1, 1};
  const u32 lengths[] = {3, 2};
  const Ragged<const float> rows(attention, u64{3});
  const Ragged<const u8> kept(keep, u64{3});
  float retained[4] = {};
  REQUIRE(retained_mass(rows, kept, lengths, 4, 2, retained));
  REQUIRE(retained[0] == 0.75f);
  REQUIRE_THAT(static_cast<double>(retained[1]), WithinAbs(0.8, 1e-7));
  REQUIRE(retained[2] == 0.0f);
  REQUIRE(retained[3] == 0.5f);
  REQUIRE(retained_mass({}, kept, lengths, 4, 2, retained) == StatusCode::null_pointer);
  REQUIRE(retained_mass(rows, {}, lengths, 4, 2, retained) == StatusCode::null_pointer);
  REQUIRE(retained_mass(rows, kept, nullptr, 4, 2, retained) == StatusCode::null_pointer);
  REQUIRE(retained_mass(rows, kept, lengths, 4, 2, nullptr) == StatusCode::null_pointer);
  REQUIRE(retained_mass(rows, kept, lengths, 0, 2, retained) == StatusCode::invalid_shape);
  REQUIRE(retained_mass(rows, kept, lengths, 4, 0, retained) == StatusCode::invalid_group);
  REQUIRE(retained_mass(rows, kept, lengths, 4, 3, retained) == StatusCode::invalid_group);
}

TEST_CASE("the eviction bound refuses what does not fit and writes nothing", "[bound]") {
  const float rows[16] = {};
  CacheView cache =
      KVCache(strided(rows, Extents{2, 4, 2}), strided(rows, Extents{2, 4, 2})).view();
  const float retained[4] = {};
  Workspace workspace;
  EvictionBound bound{7.0, 7.0, 7.0};
  float constants[4] = {7, 7, 7, 7};
  const auto run = [&](u32 group, const Rows& projection = {}) {
    return eviction_loss_bound(cache, projection, group, retained, bound, constants, workspace);
  };
  REQUIRE(eviction_loss_bound(cache, {}, 2, nullptr, bound, constants, workspace) ==
          StatusCode::null_pointer);
  REQUIRE(run(0) == StatusCode::invalid_group);
  REQUIRE(run(std::numeric_limits<u32>::max()) == StatusCode::invalid_shape);
  REQUIRE(run(2, strided(rows, Extents{2, 2, 4}).rows()) == StatusCode::shape_mismatch);
  REQUIRE(run(2, strided(rows, Extents{4, 1, 4}).rows()) == StatusCode::shape_mismatch);
  REQUIRE(run(2, strided(rows, Extents{4, 2, 0}).rows()) == StatusCode::invalid_shape);
  cache.uniform_length = 5;
  REQUIRE(run(2) == StatusCode::invalid_length);
  cache.uniform_length = 4;
  Workspace none{std::span<std::byte>{}};
  REQUIRE(eviction_loss_bound(cache, {}, 2, retained, bound, constants, none) ==
          StatusCode::workspace_too_small);
  REQUIRE(bound.bound == 7.0);
  REQUIRE(constants[0] == 7.0f);
  REQUIRE(run(2));
  REQUIRE(bound.bound == 0.0);
}
