// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "kvlean/observe/attention_mass.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"
#include "tests/support/reference.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

/// Probabilities of every query head and query, [head][query][token], and LSE, through the tiles.
struct Rows2D {
  std::vector<float> p;
  std::vector<float> lse;
};

Rows2D run_tiles(const CacheView& cache, const Queries& seen, const AttentionSpec& spec = {}) {
  const u32 length = cache.max_length();
  Rows2D out;
  out.p.assign(static_cast<std::size_t>(seen.rows.heads) * seen.count * length, 0.0f);
  out.lse.assign(static_cast<std::size_t>(seen.rows.heads) * seen.count, nan_value);
  std::vector<float> floats(attention_scratch_floats(length, cache.keys.width), nan_value);
  const AttentionScratch scratch(floats.data(), length, cache.keys.width);
  for (u32 s = 0; s < cache.segments; ++s) {
    for_each_attention_tile(
        cache, s, seen, spec, 0, seen.count, scratch, [&](const AttentionTile& tile) noexcept {
          for (u32 r = 0; r < tile.rows; ++r) {
            const std::size_t at =
                static_cast<std::size_t>(tile.query_head[r]) * seen.count + tile.query[r];
            out.lse[at] = tile.lse[r];
            for (u32 t = tile.seen.begin; t < tile.seen.end; ++t) {
              out.p[at * length + t] = tile.row(r)[t];
            }
          }
        });
  }
  return out;
}

/// Compares the tiles with the reference for a cache of equal lengths.
void check(const RandomCache& data, const CacheView& cache, const Queries& seen,
           const AttentionSpec& spec, ReferenceOptions options) {
  const Rows2D got = run_tiles(cache, seen, spec);
  const u32 length = cache.uniform_length;
  const u32 group = seen.rows.heads / cache.segments;
  options.scale = static_cast<double>(spec.scale);
  options.softcap = static_cast<double>(spec.softcap);
  options.window = static_cast<long>(spec.sliding_window);
  double worst = 0.0;
  double worst_lse = 0.0;
  for (u32 h = 0; h < seen.rows.heads; ++h) {
    if (spec.sink_logits != nullptr) {
      options.has_sink = true;
      options.sink = static_cast<double>(spec.sink_logits[h]);
    }
    const double* q =
        data.queries.head(h) + static_cast<std::size_t>(seen.first_row) * data.queries.rows().width;
    const ReferenceAttention expected = reference_attention(
        q, seen.count, data.keys.head(h / group), length, data.keys.rows().width, options);
    for (u32 i = 0; i < seen.count; ++i) {
      const std::size_t at = static_cast<std::size_t>(h) * seen.count + i;
      for (u32 t = 0; t < length; ++t) {
        worst = std::max(worst,
                         std::fabs(static_cast<double>(got.p[at * length + t]) - expected.p(i, t)));
      }
      if (std::isinf(expected.lse[i])) {
        CHECK(got.lse[at] == -inf);
      } else {
        worst_lse =
            std::max(worst_lse, std::fabs(static_cast<double>(got.lse[at]) - expected.lse[i]));
      }
    }
  }
  CHECK(worst < 3e-6);
  CHECK(worst_lse < 2e-5);
}

/// Three "workers" that take the tasks in an odd order.
Executor shuffled_executor() {
  Executor executor;
  executor.workers = 3;
  executor.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
    for (u32 i = tasks; i-- > 0;) task(arg, (i * 2 + 1) % 3, i);
  };
  return executor;
}

}  // namespace

TEST_CASE("attention tiles equal the reference over odd shapes") {
  for (const u32 dim : {1u, 3u, 7u, 64u, 80u, 128u}) {
    for (const u32 group : {1u, 3u, 4u, 7u}) {
      for (const u32 tokens : {1u, 2u, 31u, 77u}) {
        CAPTURE(dim, group, tokens);
        const RandomCache data = random_cache({.seed = dim * 100 + tokens,
                                               .kv_heads = 2,
                                               .group = group,
                                               .tokens = tokens,
                                               .dim = dim});
        check(data, data.cache().view(), data.all_queries(), {}, {});
      }
    }
  }
}

TEST_CASE("attention tiles read every type and layout") {
  for (const DType dtype : all_dtypes) {
    for (u32 l = 0; l < static_cast<u32>(Layout::count); ++l) {
      const auto layout = static_cast<Layout>(l);
      CAPTURE(name(dtype), l);
      const RandomCache data = random_cache({.seed = l + 5,
                                             .kv_heads = 3,
                                             .group = 2,
                                             .tokens = 43,
                                             .queries = 35,
                                             .dim = 24,
                                             .dtype = dtype,
                                             .key_layout = layout,
                                             .query_layout = layout});
      check(data, data.cache().view(), data.all_queries(), {}, {});
    }
  }
}

TEST_CASE("attention options: scale, softcap, window, sinks, log mass, mask") {
  const RandomCache data = random_cache({.kv_heads = 2, .group = 3, .tokens = 70, .dim = 32});
  auto cache = data.cache();
  Queries seen = data.all_queries();
  SECTION("scale and softcap") {
    check(data, cache.view(), seen, {.scale = 0.7f, .softcap = 2.5f}, {});
  }
  SECTION("sliding window") {
    for (const u32 window : {1u, 5u, 69u, 70u, 1000u}) {
      check(data, cache.view(), seen, {.sliding_window = window}, {});
    }
  }
  SECTION("sink logits") {
    const float sinks[6] = {0.0f, 3.0f, -2.0f, 40.0f, -inf, 1.0f};
    check(data, cache.view(), seen, {.sink_logits = sinks}, {});
  }
  SECTION("log mass comes after softcap") {
    std::vector<float> log_mass(2 * 70);
    ReferenceOptions options;
    for (u32 t = 0; t < 70; ++t) {
      log_mass[t] = log_mass[70 + t] = 0.05f * static_cast<float>(t % 11);
      options.log_mass.push_back(static_cast<double>(log_mass[t]));
    }
    log_mass[3] = log_mass[73] = -inf;
    options.log_mass[3] = -std::numeric_limits<double>::infinity();
    cache.set_log_mass({log_mass.data(), 70});
    check(data, cache.view(), seen, {.softcap = 1.5f}, options);
  }
  SECTION("no mask") {
    seen.mask = Mask::none;
    check(data, cache.view(), seen, {}, {.causal = false});
  }
  SECTION("a few of the queries") {
    seen.first_row = 40;
    seen.count = 30;
    check(data, cache.view(), seen, {}, {});
  }
  SECTION("a shorter valid length") {
    cache.set_length(20);
    check(data, cache.view(), seen, {}, {});  // 50 queries see nothing
  }
}

TEST_CASE("queries and tokens meet by position") {
  const RandomCache data =
      random_cache({.kv_heads = 2, .group = 2, .tokens = 40, .queries = 9, .dim = 16});
  auto cache = data.cache();
  Queries seen = data.all_queries();
  ReferenceOptions options;
  SECTION("given query positions, no token positions: the index is the position") {
    const i32 at[9] = {-3, 0, 1, 7, 8, 20, 39, 40, 1000};
    seen.positions = at;
    for (const i32 p : at) options.query_position.push_back(p);
    check(data, cache.view(), seen, {.sliding_window = 6}, options);
  }
  SECTION("first position") {
    seen.first_position = 12;
    for (long i = 0; i < 9; ++i) options.query_position.push_back(12 + i);
    check(data, cache.view(), seen, {}, options);
  }
  SECTION("token positions with gaps; the queries are the newest positions") {
    std::vector<i32> at(80);
    for (u32 t = 0; t < 40; ++t) at[t] = at[40 + t] = static_cast<i32>(3 * t + 1);
    for (u32 t = 0; t < 40; ++t) options.key_position.push_back(at[t]);
    cache.set_positions({at.data(), 40}, 124);
    for (long i = 0; i < 9; ++i) options.query_position.push_back(124 - 9 + i);
    check(data, cache.view(), seen, {}, options);
    check(data, cache.view(), seen, {.sliding_window = 30}, options);
  }
}

TEST_CASE("a given log-sum-exp replaces the softmax") {
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = 50, .dim = 16});
  const CacheView cache = data.cache().view();
  Queries seen = data.all_queries();
  const Rows2D computed = run_tiles(cache, seen);
  seen.lse = computed.lse.data();
  const Rows2D given = run_tiles(cache, seen);
  for (std::size_t i = 0; i < computed.p.size(); ++i) {
    REQUIRE(given.p[i] == Approx(computed.p[i]).epsilon(1e-5));
  }
  std::vector<float> nothing(computed.lse.size(), -inf);
  seen.lse = nothing.data();
  for (const float p : run_tiles(cache, seen).p) REQUIRE(p == 0.0f);
}

TEST_CASE("bad numbers stay with their token or their query") {
  RandomCache data = random_cache({.kv_heads = 1, .group = 1, .tokens = 40, .dim = 8});
  const CacheView cache = data.cache().view();
  const Queries seen = data.all_queries();
  const Rows2D clean = run_tiles(cache, seen);
  SECTION("a NaN query spoils no other") {
    data.queries.set_row(0, 10, std::vector<float>(8, nan_value));
    const Rows2D got = run_tiles(cache, seen);
    for (u32 i = 0; i < 40; ++i) {
      for (u32 t = 0; t < 40; ++t) {
        if (i == 10 && t <= 10) {
          REQUIRE(std::isnan(got.p[i * 40 + t]));
        } else {
          REQUIRE(got.p[i * 40 + t] == clean.p[i * 40 + t]);
        }
      }
    }
  }
  SECTION("a NaN key spoils no other token") {
    data.keys.set_row(0, 5, std::vector<float>(8, nan_value));
    const Rows2D got = run_tiles(cache, seen);
    for (u32 i = 0; i < 40; ++i) {
      double sum = 0.0;
      for (u32 t = 0; t < 40; ++t) {
        if (t == 5 && i >= 5) {
          REQUIRE(std::isnan(got.p[i * 40 + t]));
        } else {
          sum += static_cast<double>(got.p[i * 40 + t]);
        }
      }
      REQUIRE(sum == Approx(1.0).margin(1e-5));
    }
  }
  SECTION("infinite logits share the mass") {
    std::vector<float> log_mass(40, 0.0f);
    log_mass[2] = log_mass[4] = inf;
    CacheView biased = cache;
    biased.log_mass = {log_mass.data(), 40};
    const Rows2D got = run_tiles(biased, seen);
    CHECK(got.p[39 * 40 + 2] == 0.5f);
    CHECK(got.p[39 * 40 + 4] == 0.5f);
    CHECK(got.p[39 * 40 + 5] == 0.0f);
    CHECK(got.p[3 * 40 + 2] == 1.0f);
    CHECK(got.p[1 * 40 + 0] == clean.p[1 * 40 + 0]);
  }
  SECTION("all logits -inf: zeros") {
    std::vector<float> log_mass(40, -inf);
    CacheView biased = cache;
    biased.log_mass = {log_mass.data(), 40};
    const Rows2D got = run_tiles(biased, seen);
    for (const float p : got.p) REQUIRE(p == 0.0f);
    for (const float lse : got.lse) REQUIRE(lse == -inf);
  }
}

TEST_CASE("accumulated attention equals the column sums of the reference") {
  const u32 n = 75;
  const RandomCache data = random_cache({.kv_heads = 2, .group = 3, .tokens = n, .dim = 24});
  const CacheView cache = data.cache().view();
  const Queries seen = data.all_queries();
  std::vector<double> expected(6 * n, 0.0);
  for (u32 h = 0; h < 6; ++h) {
    const auto rows = reference_attention(data.queries.head(h), n, data.keys.head(h / 3), n, 24);
    for (u32 i = 0; i < n; ++i) {
      for (u32 t = 0; t < n; ++t) expected[h * n + t] += rows.p(i, t);
    }
  }
  Workspace workspace;
  std::vector<float> per_head(6 * n, 0.0f);
  REQUIRE(
      accumulate_attention_per_query_head(cache, seen, {}, workspace, {}, {per_head.data(), n}));
  for (u32 i = 0; i < 6 * n; ++i) {
    REQUIRE(static_cast<double>(per_head[i]) == Approx(expected[i]).epsilon(1e-5));
  }

  for (const auto reduction : {GroupReduction::mean, GroupReduction::max, GroupReduction::sum}) {
    std::vector<float> mass(2 * n, 1.0f);  // the call adds
    std::vector<float> reduced(2 * n, -1.0f);
    REQUIRE(accumulate_attention(cache, seen, {}, reduction, workspace, {}, {mass.data(), n}));
    REQUIRE(reduce_group(cache, Ragged<const float>(per_head.data(), n), 3, reduction,
                         {reduced.data(), n}));
    for (u32 s = 0; s < 2; ++s) {
      for (u32 t = 0; t < n; ++t) {
        const double a = expected[(s * 3 + 0) * n + t];
        const double b = expected[(s * 3 + 1) * n + t];
        const double c = expected[(s * 3 + 2) * n + t];
        const double want = reduction == GroupReduction::max   ? std::max({a, b, c})
                            : reduction == GroupReduction::sum ? a + b + c
                                                               : (a + b + c) / 3.0;
        REQUIRE(static_cast<double>(reduced[s * n + t]) == Approx(want).epsilon(1e-5));
        REQUIRE(static_cast<double>(mass[s * n + t]) == Approx(want + 1.0).epsilon(1e-5));
      }
    }
  }
}

TEST_CASE("decode steps accumulate to the whole prefill") {
  const u32 n = 45;
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = n, .dim = 16});
  Workspace workspace;
  std::vector<float> whole(2 * n, 0.0f);
  std::vector<float> steps(2 * n, 0.0f);
  auto cache = data.cache();
  REQUIRE(accumulate_attention(cache.view(), data.all_queries(), {}, GroupReduction::mean,
                               workspace, {}, {whole.data(), n}));
  for (u32 at = 0; at < n;) {
    const u32 count = std::min(at == 0 ? 40u : 1u, n - at);
    Queries step = data.all_queries();
    step.first_row = at;
    step.count = count;
    at += count;
    cache.set_length(at);
    REQUIRE(accumulate_step(cache.view(), step, {}, GroupReduction::mean, workspace, {},
                            {steps.data(), n}));
  }
  for (u32 i = 0; i < 2 * n; ++i) REQUIRE(steps[i] == Approx(whole[i]).epsilon(1e-5));
}

TEST_CASE("segments of different lengths, one of them empty") {
  const RandomCache data =
      random_cache({.kv_heads = 3, .group = 2, .tokens = 30, .queries = 4, .dim = 8});
  u32 lengths[3] = {30, 0, 11};
  auto cache = data.cache();
  cache.set_lengths(lengths);
  Workspace workspace;
  const u64 first[4] = {0, 30, 30, 41};
  std::vector<float> mass(42, 0.0f);
  REQUIRE(accumulate_attention(cache.view(), data.all_queries(), {}, GroupReduction::sum, workspace,
                               {}, {mass.data(), first}));
  for (u32 s = 0; s < 3; s += 2) {
    for (u32 t = 0; t < lengths[s]; ++t) {
      double want = 0.0;
      for (u32 h = 2 * s; h < 2 * s + 2; ++h) {
        const auto rows =
            reference_attention(data.queries.head(h), 4, data.keys.head(s), lengths[s], 8);
        for (u32 i = 0; i < 4; ++i) want += rows.p(i, t);
      }
      REQUIRE(static_cast<double>(mass[first[s] + t]) == Approx(want).margin(1e-6));
    }
  }
  CHECK(mass[41] == 0.0f);
}

TEST_CASE("accumulated attention does not depend on the workers") {
  const u32 n = 120;
  const RandomCache data =
      random_cache({.kv_heads = 5, .group = 2, .tokens = n, .dim = 40, .dtype = DType::bf16});
  Workspace workspace;
  for (const auto reduction : {GroupReduction::mean, GroupReduction::max}) {
    std::vector<float> serial(5 * n, 0.0f);
    std::vector<float> spread(5 * n, 0.0f);
    REQUIRE(accumulate_attention(data.cache().view(), data.all_queries(), {}, reduction, workspace,
                                 {}, {serial.data(), n}));
    REQUIRE(accumulate_attention(data.cache().view(), data.all_queries(), {}, reduction, workspace,
                                 shuffled_executor(), {spread.data(), n}));
    CHECK(std::memcmp(serial.data(), spread.data(), serial.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("accumulated attention refuses what it cannot read, and writes nothing") {
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = 20, .dim = 8});
  const CacheView cache = data.cache().view();
  std::vector<float> mass(80, 0.0f);
  const Ragged<float> out(mass.data(), 20);
  Workspace workspace;
  const auto run = [&](const CacheView& view, const Queries& seen, Workspace& memory,
                       Ragged<float> to) {
    const Status status =
        accumulate_attention(view, seen, {}, GroupReduction::mean, memory, {}, to);
    CHECK(accumulate_attention_per_query_head(view, seen, {}, memory, {}, to) == status);
    for (const float m : mass) REQUIRE(m == 0.0f);
    return status;
  };
  CHECK(run(cache, Queries{}, workspace, out) == StatusCode::missing_observation);
  CHECK(run(cache, data.all_queries(), workspace, Ragged<float>{}) == StatusCode::null_pointer);
  Random random(3);
  const RandomTensor three = random_tensor(random, 3, 20, 8);
  CHECK(run(cache, queries(three.view()), workspace, out) == StatusCode::invalid_group);
  const RandomTensor wide = random_tensor(random, 4, 20, 9);
  CHECK(run(cache, queries(wide.view()), workspace, out) == StatusCode::shape_mismatch);
  Queries beyond = data.all_queries();
  beyond.first_row = 1;
  CHECK(run(cache, beyond, workspace, out) == StatusCode::invalid_length);
  std::byte little[256];
  Workspace small{std::span<std::byte>(little)};
  CHECK(run(cache, data.all_queries(), small, out) == StatusCode::workspace_too_small);
  CHECK(reduce_group(cache, Ragged<const float>(mass.data(), 20), 0, GroupReduction::mean, out) ==
        StatusCode::invalid_group);
}
