// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The public functions on every target of this machine, against double.
#include <cmath>
#include <cstring>
#include <kvlean/attention/attend.hpp>
#include <kvlean/attention/attend_reference.hpp>
#include <kvlean/kvlean.hpp>
#include <kvlean/observe/attention_mass.hpp>
#include <random>
#include <vector>

#include "tests/simd/targets.hpp"
#include "tests/support/catch.hpp"

namespace {

using namespace kvlean;
using kvlean_test::targets;

template <class T>
std::vector<T> normals(std::size_t count, u32 seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& x : values) x = T(normal(random));
  return values;
}

/// Runs tasks from last to first, on three workers in turn.
Executor backward() {
  Executor executor;
  executor.workers = 3;
  executor.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
    for (u32 i = tasks; i-- > 0;) task(arg, i % 3, i);
  };
  return executor;
}

struct Shape {
  u32 heads, group, count, tokens, key_width, value_width;
};

// Few query rows, one block, two blocks and a rest; widths off every lane count.
constexpr Shape shapes[] = {{2, 1, 1, 100, 64, 64},  {1, 4, 1, 257, 128, 128},
                            {2, 3, 2, 70, 40, 24},   {1, 8, 1, 33, 17, 131},
                            {1, 9, 1, 65, 128, 128}, {1, 2, 8, 90, 72, 80},
                            {1, 1, 21, 50, 33, 65},  {1, 2, 40, 130, 128, 128},
                            {1, 4, 3, 40, 300, 200}, {1, 20, 1, 40, 256, 64}};

template <class T>
void check_shape(const Shape& shape, bool with_options) {
  const std::size_t rows = std::size_t{shape.heads} * shape.group * shape.count;
  std::vector<T> k = normals<T>(std::size_t{shape.heads} * shape.tokens * shape.key_width, 1);
  std::vector<T> v = normals<T>(std::size_t{shape.heads} * shape.tokens * shape.value_width, 2);
  std::vector<T> q = normals<T>(rows * shape.key_width, 3);
  std::vector<float> mass = normals<float>(std::size_t{shape.heads} * shape.tokens, 4);
  std::vector<float> sinks = normals<float>(std::size_t{shape.heads} * shape.group, 5);
  CacheView cache =
      KVCache(strided(k.data(), Extents{shape.heads, shape.tokens, shape.key_width}),
              strided(v.data(), Extents{shape.heads, shape.tokens, shape.value_width}))
          .view();
  const Queries asked = queries(strided(
      q.data(), Extents{std::size_t{shape.heads} * shape.group, shape.count, shape.key_width}));
  AttentionSpec spec;
  if (with_options) {
    cache.log_mass = Ragged<float>(mass.data(), u64{shape.tokens});
    spec.softcap = 5.0f;
    spec.sliding_window = shape.tokens / 2 + 1;
    spec.sink_logits = sinks.data();
  }
  std::vector<double> exact(rows * shape.value_width);
  std::vector<double> exact_lse(rows);
  REQUIRE(attend_reference(asked, cache, spec,
                           BasicAttentionOutput<double>{exact.data(), exact_lse.data()}));
  for (const simd::Target target : targets()) {
    CAPTURE(simd::name(target), shape.group, shape.count, shape.tokens, shape.key_width);
    spec.target = target;
    std::vector<float> got(exact.size());
    std::vector<float> lse(rows);
    REQUIRE(detail::attend_view(asked, cache, spec, AttentionOutput{got.data(), lse.data()}, {}));
    double worst = 0.0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      worst = std::max(worst, std::abs(static_cast<double>(got[i]) - exact[i]));
    }
    for (std::size_t i = 0; i < rows; ++i) {
      worst = std::max(worst, std::abs(static_cast<double>(lse[i]) - exact_lse[i]));
    }
    CHECK(worst < 1e-5);

    // Column sums of the probabilities add up to one for each query that has no sink.
    Workspace workspace;
    std::vector<float> received(std::size_t{shape.heads} * shape.tokens);
    REQUIRE(accumulate_attention(cache, asked, spec, GroupReduction::sum, workspace, {},
                                 Ragged<float>(received.data(), u64{shape.tokens})));
    std::vector<float> given(received.size());
    Queries with_lse = asked;
    with_lse.lse = lse.data();
    REQUIRE(accumulate_attention(cache, with_lse, spec, GroupReduction::sum, workspace, {},
                                 Ragged<float>(given.data(), u64{shape.tokens})));
    double sum = 0.0;
    double gap = 0.0;
    for (std::size_t i = 0; i < received.size(); ++i) {
      sum += static_cast<double>(received[i]);
      gap = std::max(gap, std::abs(static_cast<double>(received[i] - given[i])));
    }
    CHECK(gap < 1e-4);
    if (!with_options) CHECK(sum == Approx(static_cast<double>(rows)).epsilon(1e-5));

    // The same bits with any executor.
    std::vector<float> spread(got.size());
    std::vector<float> spread_lse(rows);
    REQUIRE(detail::attend_view(asked, cache, spec,
                                AttentionOutput{spread.data(), spread_lse.data()}, backward()));
    CHECK(spread == got);
    CHECK(spread_lse == lse);
    std::vector<float> spread_mass(received.size());
    REQUIRE(accumulate_attention(cache, asked, spec, GroupReduction::sum, workspace, backward(),
                                 Ragged<float>(spread_mass.data(), u64{shape.tokens})));
    CHECK(spread_mass == received);

    // The same bits in any layout: rows with gaps, read in another order of memory.
    std::vector<T> wide(k.size() * 2);
    const std::size_t width = shape.key_width;
    for (std::size_t i = 0; i < k.size(); ++i) wide[i / width * 2 * width + i % width] = k[i];
    CacheView gaps = cache;
    gaps.keys.data = wide.data();
    gaps.keys.token_stride *= 2;
    gaps.keys.head_stride *= 2;
    std::vector<float> again(got.size());
    std::vector<float> again_lse(rows);
    REQUIRE(detail::attend_view(asked, gaps, spec, AttentionOutput{again.data(), again_lse.data()},
                                {}));
    CHECK(again == got);
    CHECK(again_lse == lse);
  }
}

}  // namespace

TEST_CASE("attention and its column sums on every target, type and shape", "[simd]") {
  for (const Shape& shape : shapes) {
    for (const bool with_options : {false, true}) {
      check_shape<float>(shape, with_options);
      check_shape<f16>(shape, with_options);
      check_shape<bf16>(shape, with_options);
    }
  }
}
