// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Accumulated attention on every target, tiles included, against the reference in double.
#include <algorithm>
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

std::vector<simd::Target> all_targets() {
  using simd::Target;
  std::vector<Target> all{Target::scalar};
  for (const Target target : {Target::avx2, Target::avx512, Target::neon, Target::amx}) {
    if (simd::supported(target)) all.push_back(target);
  }
  return all;
}

/// What the reference says that every token receives from every query head, [head][token].
struct Expected {
  std::vector<double> mass;
  std::vector<float> lse;  // [head][query]
};

Expected expect(const RandomCache& data, u32 tokens, const Queries& seen, const AttentionSpec& spec,
                ReferenceOptions options = {}) {
  options.scale = static_cast<double>(spec.scale);
  options.softcap = static_cast<double>(spec.softcap);
  options.window = static_cast<long>(spec.sliding_window);
  const u32 heads = seen.rows.heads;
  const u32 group = heads / data.keys.rows().heads;
  Expected result;
  result.mass.assign(std::size_t{heads} * tokens, 0.0);
  for (u32 h = 0; h < heads; ++h) {
    if (spec.sink_logits != nullptr) {
      options.has_sink = true;
      options.sink = static_cast<double>(spec.sink_logits[h]);
    }
    const double* q =
        data.queries.head(h) + std::size_t{seen.first_row} * data.queries.rows().width;
    const ReferenceAttention rows = reference_attention(q, seen.count, data.keys.head(h / group),
                                                        tokens, data.keys.rows().width, options);
    for (u32 i = 0; i < seen.count; ++i) {
      result.lse.push_back(static_cast<float>(rows.lse[i]));
      for (u32 t = 0; t < tokens; ++t) result.mass[std::size_t{h} * tokens + t] += rows.p(i, t);
    }
  }
  return result;
}

std::vector<float> accumulate(const CacheView& cache, const Queries& seen,
                              const AttentionSpec& spec, const Executor& executor = {}) {
  Workspace workspace;
  const u32 tokens = cache.uniform_length;
  std::vector<float> mass(std::size_t{seen.rows.heads} * tokens, 0.0f);
  REQUIRE(accumulate_attention_per_query_head(cache, seen, spec, workspace, executor,
                                              {mass.data(), u64{tokens}}));
  return mass;
}

/// The largest error relative to what a token receives; tokens that receive nearly nothing count
/// against 1e-3.
double worst_error(const std::vector<float>& got, const std::vector<double>& expected) {
  double worst = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double gap = std::fabs(static_cast<double>(got[i]) - expected[i]);
    if (!(gap <= 1e30)) return gap;  // NaN too
    worst = std::max(worst, gap / std::max(expected[i], 1e-3));
  }
  return worst;
}

/// Every target, with the log-sum-exp given and not.
void check(const RandomCache& data, const CacheView& cache, const Queries& seen, AttentionSpec spec,
           const ReferenceOptions& options = {}, double bound = 2e-5) {
  const Expected expected = expect(data, cache.uniform_length, seen, spec, options);
  Queries with_lse = seen;
  with_lse.lse = expected.lse.data();
  for (const simd::Target target : all_targets()) {
    CAPTURE(simd::name(target));
    spec.target = target;
    CHECK(worst_error(accumulate(cache, seen, spec), expected.mass) < bound);
    CHECK(worst_error(accumulate(cache, with_lse, spec), expected.mass) < bound);
  }
}

Executor shuffled_executor() {
  Executor executor;
  executor.workers = 3;
  executor.run = [](void*, u32 tasks, void (*task)(void*, u32, u32) noexcept, void* arg) noexcept {
    for (u32 i = tasks; i-- > 0;) task(arg, (i * 2 + 1) % 3, i);
  };
  return executor;
}

}  // namespace

TEST_CASE("column sums of every type over odd shapes, on every target") {
  struct Shape {
    u32 dim, group, tokens, queries;
  };
  // Rows that fill tiles and that do not, heads that share a tile of rows, widths off 32.
  for (const Shape& shape :
       {Shape{128, 4, 300, 32}, Shape{64, 1, 257, 64}, Shape{96, 3, 63, 33}, Shape{256, 2, 90, 40},
        Shape{33, 16, 65, 5}, Shape{40, 5, 100, 8}, Shape{128, 1, 150, 150}, Shape{128, 16, 70, 1},
        Shape{320, 3, 40, 7}, Shape{16, 9, 17, 17}, Shape{600, 2, 20, 9}, Shape{64, 7, 31, 20}}) {
    for (const DType dtype : all_dtypes) {
      CAPTURE(shape.dim, shape.group, shape.tokens, shape.queries, name(dtype));
      const RandomCache data = random_cache({.seed = shape.dim + shape.tokens,
                                             .kv_heads = 1,
                                             .group = shape.group,
                                             .tokens = shape.tokens,
                                             .queries = shape.queries,
                                             .dim = shape.dim,
                                             .dtype = dtype});
      check(data, data.cache().view(), data.all_queries(), {});
    }
  }
}

TEST_CASE("column sums with every option, on every target") {
  const u32 n = 330;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const RandomCache data = random_cache(
        {.kv_heads = 2, .group = 3, .tokens = n, .queries = 50, .dim = 64, .dtype = dtype});
    auto cache = data.cache();
    Queries seen = data.all_queries();
    check(data, cache.view(), seen, {.scale = 0.3f, .softcap = 2.5f});
    for (const u32 window : {1u, 40u, 290u}) {
      check(data, cache.view(), seen, {.sliding_window = window});
    }
    const float sinks[6] = {0.0f, 3.0f, -2.0f, 20.0f, -inf, 1.0f};
    check(data, cache.view(), seen, {.sink_logits = sinks});
    std::vector<float> log_mass(2 * n);
    ReferenceOptions options;
    for (u32 t = 0; t < n; ++t) {
      log_mass[t] = log_mass[n + t] = t % 37 == 3 ? -inf : 0.05f * static_cast<float>(t % 11);
      options.log_mass.push_back(static_cast<double>(log_mass[t]));
    }
    cache.set_log_mass({log_mass.data(), n});
    check(data, cache.view(), seen, {.softcap = 1.5f, .sliding_window = 100}, options);
    seen.mask = Mask::none;
    options.causal = false;
    check(data, cache.view(), seen, {}, options);
    cache.set_log_mass({});
    seen.mask = Mask::causal;
    cache.set_length(30);  // 20 queries see nothing
    check(data, cache.view(), seen, {});
  }
}

TEST_CASE("large logits stay within a float, and those that do not take the other way") {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    RandomCache data = random_cache(
        {.kv_heads = 1, .group = 1, .tokens = 200, .queries = 40, .dim = 32, .dtype = dtype});
    for (const float scale : {4.0f, 30.0f}) {
      // The largest logit comes late.
      data.keys.set_row(0, 150, std::vector<float>(32, scale == 4.0f ? 1.0f : 2.0f));
      check(data, data.cache().view(), data.all_queries(), {.scale = scale}, {}, 5e-4);
    }
  }
}

TEST_CASE("bf16 keys and other queries: the products lose nothing that counts") {
  Random random(5);
  RandomCache data = random_cache(
      {.kv_heads = 1, .group = 4, .tokens = 140, .queries = 32, .dim = 128, .dtype = DType::bf16});
  for (const DType dtype : {DType::f32, DType::f16}) {
    data.queries = random_tensor(random, 4, 32, 128, dtype);
    check(data, data.cache().view(), data.all_queries(), {}, {}, 1e-4);
  }
}

TEST_CASE("rounding to bf16 is asked for") {
  for (const DType dtype : {DType::f32, DType::f16}) {
    const RandomCache data = random_cache(
        {.kv_heads = 1, .group = 4, .tokens = 140, .queries = 32, .dim = 128, .dtype = dtype});
    const CacheView cache = data.cache().view();
    const Queries seen = data.all_queries();
    const Expected expected = expect(data, 140, seen, {});
    const AttentionSpec rounded{.round_to_bf16 = true};
    const std::vector<float> got = accumulate(cache, seen, rounded);
    CHECK(worst_error(got, expected.mass) < 3e-2);
    if (simd::supported(simd::Target::amx)) {
      CHECK(got != accumulate(cache, seen, {}));
      AttentionSpec forbidden = rounded;
      forbidden.target = simd::Target::avx512;
      AttentionSpec plain;
      plain.target = simd::Target::avx512;
      CHECK(accumulate(cache, seen, forbidden) == accumulate(cache, seen, plain));
    }
  }
}

TEST_CASE("NaN and infinity, on every target") {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    RandomCache data = random_cache(
        {.kv_heads = 1, .group = 2, .tokens = 90, .queries = 40, .dim = 64, .dtype = dtype});
    const Queries seen = data.all_queries();
    std::vector<float> log_mass(90, 0.0f);
    SECTION("a NaN key") { data.keys.set_row(0, 60, std::vector<float>(64, nan_value)); }
    SECTION("a NaN query") { data.queries.set_row(1, 7, std::vector<float>(64, nan_value)); }
    SECTION("infinite logits") { log_mass[3] = log_mass[55] = inf; }
    SECTION("nothing but -inf") { log_mass.assign(90, -inf); }
    CacheView cache = data.cache().view();
    cache.log_mass = {log_mass.data(), 90};
    // Rows of probabilities keep the rules: sum them.
    std::vector<float> expected(2 * 90, 0.0f);
    std::vector<float> floats(attention_scratch_floats(90, 64));
    for_each_attention_tile(cache, 0, seen, {}, 0, seen.count,
                            AttentionScratch(floats.data(), 90, 64),
                            [&](const AttentionTile& tile) noexcept {
                              for (u32 r = 0; r < tile.rows; ++r) {
                                for (u32 t = tile.seen.begin; t < tile.seen.end; ++t) {
                                  expected[tile.query_head[r] * 90 + t] += tile.row(r)[t];
                                }
                              }
                            });
    for (const simd::Target target : all_targets()) {
      CAPTURE(simd::name(target), name(dtype));
      AttentionSpec spec;
      spec.target = target;
      const std::vector<float> got = accumulate(cache, seen, spec);
      bool same = true;
      for (std::size_t i = 0; i < got.size(); ++i) {
        same = same && (std::isnan(expected[i]) ? std::isnan(got[i])
                                                : got[i] == Approx(expected[i]).margin(1e-5));
      }
      CHECK(same);
    }
  }
}

TEST_CASE("column sums do not depend on the layout of keys") {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const RandomCache data = random_cache(
        {.kv_heads = 2, .group = 2, .tokens = 290, .queries = 32, .dim = 64, .dtype = dtype});
    const Queries seen = data.all_queries();
    for (const simd::Target target : all_targets()) {
      AttentionSpec spec{.sliding_window = 200};
      spec.target = target;
      const std::vector<float> expected = accumulate(data.cache().view(), seen, spec);
      for (u32 l = 0; l < static_cast<u32>(Layout::count); ++l) {
        Random random(l);
        RandomTensor keys = random_tensor(random, 2, 290, 64, dtype, static_cast<Layout>(l));
        if (keys.rows().load != nullptr) continue;  // its elements are floats
        for (u32 h = 0; h < 2; ++h) {
          for (u32 t = 0; t < 290; ++t) {
            std::vector<float> row(64);
            load_row(data.keys.rows(), h, t, row.data());
            keys.set_row(h, t, row);
          }
        }
        CAPTURE(simd::name(target), name(dtype), l);
        const CacheView cache = KVCache<RowsView, RowsView>(keys.view(), data.values.view()).view();
        CHECK(accumulate(cache, seen, spec) == expected);
      }
    }
  }
}

TEST_CASE("few segments are cut into parts, and the bits depend on no worker") {
  struct Shape {
    u32 heads, group, tokens, queries;
  };
  // Parts of the keys, of the heads, of the queries; segments enough to need no parts.
  for (const Shape& shape : {Shape{1, 4, 9000, 32}, Shape{1, 1, 9000, 32}, Shape{1, 16, 300, 32},
                             Shape{3, 1, 400, 400}, Shape{8, 2, 60, 60}}) {
    const RandomCache data = random_cache({.kv_heads = shape.heads,
                                           .group = shape.group,
                                           .tokens = shape.tokens,
                                           .queries = shape.queries,
                                           .dim = 32,
                                           .dtype = DType::bf16});
    const CacheView cache = data.cache().view();
    const Expected expected = expect(data, shape.tokens, data.all_queries(), {});
    for (const bool given : {false, true}) {
      Queries seen = data.all_queries();
      if (given) seen.lse = expected.lse.data();
      for (const simd::Target target : {simd::Target::best, simd::Target::avx2}) {
        AttentionSpec spec;
        spec.target = target;
        for (const auto reduction : {GroupReduction::sum, GroupReduction::max}) {
          CAPTURE(shape.heads, shape.group, shape.tokens, given, simd::name(target));
          Workspace workspace;
          const std::size_t size = std::size_t{shape.heads} * shape.tokens;
          std::vector<float> serial(size, 0.0f);
          std::vector<float> spread(size, 0.0f);
          const u64 stride = shape.tokens;
          REQUIRE(accumulate_attention(cache, seen, spec, reduction, workspace, {},
                                       {serial.data(), stride}));
          REQUIRE(accumulate_attention(cache, seen, spec, reduction, workspace, shuffled_executor(),
                                       {spread.data(), stride}));
          CHECK(std::memcmp(serial.data(), spread.data(), size * sizeof(float)) == 0);
          double worst = 0.0;
          for (std::size_t i = 0; i < size; ++i) {
            const std::size_t head = i / shape.tokens;
            double want = 0.0;
            for (u32 g = 0; g < shape.group; ++g) {
              const double one =
                  expected.mass[(head * shape.group + g) * shape.tokens + i % shape.tokens];
              want = reduction == GroupReduction::sum ? want + one : std::max(want, one);
            }
            worst = std::max(
                worst, std::fabs(static_cast<double>(serial[i]) - want) / std::max(want, 1e-3));
          }
          CHECK(worst < 4e-5);
        }
      }
    }
  }
}

TEST_CASE("parts of the keys take NaN, and empty segments beside long ones") {
  RandomCache data = random_cache(
      {.kv_heads = 2, .group = 2, .tokens = 9000, .queries = 32, .dim = 32, .dtype = DType::bf16});
  data.keys.set_row(1, 8000, std::vector<float>(32, nan_value));
  u32 lengths[2] = {0, 9000};
  auto cache = data.cache();
  cache.set_lengths(lengths);
  Workspace workspace;
  std::vector<float> mass(9000, 0.0f);
  const u64 first[3] = {0, 0, 9000};
  REQUIRE(accumulate_attention(cache.view(), data.all_queries(), {}, GroupReduction::sum, workspace,
                               {}, {mass.data(), first}));
  double sum = 0.0;
  for (u32 t = 0; t < 9000; ++t) {
    if (t == 8000) {
      CHECK(std::isnan(mass[t]));
    } else {
      sum += static_cast<double>(mass[t]);
    }
  }
  CHECK(sum == Approx(64.0).epsilon(1e-5));
}
