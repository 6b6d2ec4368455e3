// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kvlean/score/external.hpp"
#include "kvlean/score/h2o.hpp"
#include "kvlean/score/key_norm.hpp"
#include "kvlean/score/observed_attention.hpp"
#include "kvlean/score/random.hpp"
#include "kvlean/score/snapkv.hpp"
#include "kvlean/score/streaming_llm.hpp"
#include "kvlean/score/tova.hpp"
#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"
#include "tests/support/reference.hpp"

using namespace kvlean;
using namespace kvlean_test;

static_assert(std::is_trivially_copyable_v<SnapKVScorer>);
static_assert(std::is_trivially_copyable_v<H2OScorer>);

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

/// Scores with memory behind them, filled with junk.
struct Scored {
  std::vector<u32> lengths;
  std::vector<float> rank;
  std::vector<float> mass;
  u32 stride;
  Scores scores;

  explicit Scored(const CacheView& cache) : stride(cache.max_length()) {
    for (u32 s = 0; s < cache.segments; ++s) lengths.push_back(cache.length(s));
    rank.assign(static_cast<std::size_t>(cache.segments) * stride, -7.0f);
    mass = rank;
    scores.segments = cache.segments;
    scores.lengths = lengths.data();
    scores.rank = {rank.data(), stride};
    scores.mass = {mass.data(), stride};
  }
  Scored(const Scored&) = delete;
  double rank_at(u32 s, u32 t) const { return static_cast<double>(rank[s * stride + t]); }
  double mass_at(u32 s, u32 t) const { return static_cast<double>(mass[s * stride + t]); }
};

template <class S>
Status score(const S& scorer, const CacheView& cache, const Observation& seen, Scored& out,
             const PlanOptions& options = {}) {
  Workspace workspace;
  Context context{workspace, options};
  return scorer.score(cache, seen, context, out.scores);
}

/// Mean attention of the last `window` queries, [query_head][token].
std::vector<std::vector<double>> window_mean(const RandomCache& data, u32 window) {
  const u32 n = data.keys.rows().tokens;
  const u32 dim = data.keys.rows().width;
  const u32 count = data.queries.rows().tokens;
  const u32 group = data.queries.rows().heads / data.keys.rows().heads;
  std::vector<std::vector<double>> mean(data.queries.rows().heads, std::vector<double>(n, 0.0));
  for (u32 h = 0; h < data.queries.rows().heads; ++h) {
    const double* q = data.queries.head(h) + static_cast<std::size_t>(count - window) * dim;
    const auto rows = reference_attention(q, window, data.keys.head(h / group), n, dim);
    for (u32 i = 0; i < window; ++i) {
      for (u32 t = 0; t < n; ++t) mean[h][t] += rows.p(i, t) / window;
    }
  }
  return mean;
}

std::vector<double> pool(const std::vector<double>& x, u32 count, u32 kernel, Pooling pooling) {
  std::vector<double> out(count);
  for (u32 t = 0; t < count; ++t) {
    double sum = 0.0;
    double largest = -std::numeric_limits<double>::infinity();
    for (i64 i = static_cast<i64>(t) - kernel / 2; i <= static_cast<i64>(t) + kernel / 2; ++i) {
      if (i < 0 || i >= static_cast<i64>(count)) continue;
      sum += x[static_cast<std::size_t>(i)];
      largest = std::max(largest, x[static_cast<std::size_t>(i)]);
    }
    out[t] = pooling == Pooling::max ? largest : sum / kernel;
  }
  return out;
}

std::vector<double> reduce(const std::vector<std::vector<double>>& heads, u32 first, u32 group,
                           GroupReduction reduction) {
  std::vector<double> out = heads[first];
  for (u32 h = first + 1; h < first + group; ++h) {
    for (std::size_t t = 0; t < out.size(); ++t) {
      out[t] =
          reduction == GroupReduction::max ? std::max(out[t], heads[h][t]) : out[t] + heads[h][t];
    }
  }
  if (reduction == GroupReduction::mean) {
    for (double& x : out) x /= group;
  }
  return out;
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

TEST_CASE("pooling: edges, even spread, NaN") {
  const float x[5] = {1.0f, 2.0f, 3.0f, 4.0f, 10.0f};
  float out[5];
  pool_scores(x, 5, 3, Pooling::average, out);
  CHECK(out[0] == 1.0f);
  CHECK(out[2] == 3.0f);
  CHECK(out[4] == Approx(14.0 / 3.0));
  pool_scores(x, 5, 101, Pooling::max, out);
  for (const float o : out) CHECK(o == 10.0f);
  const float negative[3] = {-3.0f, -2.0f, -4.0f};
  pool_scores(negative, 3, 3, Pooling::max, out);
  CHECK(out[2] == -2.0f);
  const float bad[3] = {1.0f, nan_value, 3.0f};
  pool_scores(bad, 3, 3, Pooling::max, out);
  CHECK((out[0] == 1.0f && std::isnan(out[1]) && out[2] == 3.0f));
}

TEST_CASE("SnapKV equals its definition in every order, pooling and reduction") {
  const u32 n = 61;
  const RandomCache data = random_cache({.kv_heads = 2, .group = 3, .tokens = n, .dim = 16});
  const CacheView cache = data.cache().view();
  for (const u32 window : {1u, 16u, 61u}) {
    const auto mean = window_mean(data, window);
    const u32 prefix = n - window;
    for (const auto pooling : {Pooling::average, Pooling::max}) {
      for (const auto group : {GroupReduction::mean, GroupReduction::max, GroupReduction::sum}) {
        for (const u32 kernel : {1u, 5u, 63u}) {
          for (const auto order :
               {PoolOrder::query_mean_pool_group, PoolOrder::query_mean_group_pool,
                PoolOrder::pool_query_mean_group}) {
            CAPTURE(window, kernel, static_cast<int>(pooling), static_cast<int>(group),
                    static_cast<int>(order));
            Scored out(cache);
            REQUIRE(score(SnapKVScorer{.window = window,
                                       .kernel = kernel,
                                       .pooling = pooling,
                                       .order = order,
                                       .group = group,
                                       .pin_window = false},
                          cache, data.observation(n), out));
            REQUIRE(out.scores.has_mass);
            for (u32 s = 0; s < 2; ++s) {
              std::vector<std::vector<double>> pooled;
              for (u32 h = s * 3; h < s * 3 + 3; ++h) {
                if (order == PoolOrder::pool_query_mean_group) {
                  const double* q =
                      data.queries.head(h) + static_cast<std::size_t>(n - window) * 16;
                  const auto rows = reference_attention(q, window, data.keys.head(s), n, 16);
                  std::vector<double> sum(prefix, 0.0);
                  for (u32 i = 0; i < window; ++i) {
                    const auto row = rows.probability.begin() + static_cast<std::ptrdiff_t>(i) * n;
                    const auto one =
                        pool(std::vector<double>(row, row + prefix), prefix, kernel, pooling);
                    for (u32 t = 0; t < prefix; ++t) sum[t] += one[t] / window;
                  }
                  pooled.push_back(sum);
                } else {
                  pooled.push_back(pool(mean[h], prefix, kernel, pooling));
                }
              }
              const auto mass = reduce(mean, s * 3, 3, group);
              const auto rank = order == PoolOrder::query_mean_group_pool
                                    ? pool(mass, prefix, kernel, pooling)
                                    : reduce(pooled, 0, 3, group);
              for (u32 t = 0; t < n; ++t) {
                REQUIRE(out.mass_at(s, t) == Approx(mass[t]).margin(1e-6));
                REQUIRE(out.rank_at(s, t) == Approx(t < prefix ? rank[t] : mass[t]).margin(1e-6));
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("SnapKV pins its window above the best of all heads") {
  const u32 n = 50;
  const RandomCache data = random_cache({.kv_heads = 3, .group = 2, .tokens = n, .dim = 16});
  const CacheView cache = data.cache().view();
  Scored out(cache);
  REQUIRE(score(SnapKVScorer{.window = 8}, cache, data.observation(20), out));
  double best = 0.0;
  for (u32 s = 0; s < 3; ++s) {
    for (u32 t = 0; t < 42; ++t) best = std::max(best, out.rank_at(s, t));
  }
  for (u32 s = 0; s < 3; ++s) {
    for (u32 t = 42; t < n; ++t) REQUIRE(out.rank_at(s, t) == Approx(best + 1.0));
  }
  SECTION("0 reads all window queries, and fewer are enough") {
    Scored all(cache);
    Scored more(cache);
    REQUIRE(score(SnapKVScorer{.window = 0}, cache, data.observation(8), all));
    REQUIRE(score(SnapKVScorer{.window = 32}, cache, data.observation(8), more));
    CHECK(all.rank == out.rank);
    CHECK(more.rank == out.rank);
  }
  SECTION("a window longer than the segment pins everything") {
    auto short_cache = data.cache();
    short_cache.set_length(5);
    Scored all(short_cache.view());
    REQUIRE(score(SnapKVScorer{}, short_cache.view(), data.observation(), all));
    for (const float r : all.rank) REQUIRE(r == 1.0f);
  }
  SECTION("without a window the reference queries serve") {
    Observation seen = data.observation();
    seen.window = {};
    Scored other(cache);
    REQUIRE(score(SnapKVScorer{.window = 8}, cache, seen, other));
    CHECK(other.rank == out.rank);
  }
}

TEST_CASE("H2O sums attention, or takes what the engine has") {
  const u32 n = 37;
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = n, .dim = 7});
  const CacheView cache = data.cache().view();
  const auto mean = window_mean(data, n);
  Scored out(cache);
  REQUIRE(score(H2OScorer{}, cache, data.observation(), out));
  Scored observed(cache);
  REQUIRE(score(ObservedAttentionScorer{}, cache, data.observation(), observed));
  for (u32 s = 0; s < 2; ++s) {
    for (u32 t = 0; t < n; ++t) {
      const double want = (mean[2 * s][t] + mean[2 * s + 1][t]) / 2.0 * n;
      REQUIRE(out.rank_at(s, t) == Approx(want).epsilon(1e-5));
      REQUIRE(out.mass_at(s, t) == out.rank_at(s, t));
      REQUIRE(observed.mass_at(s, t) == out.mass_at(s, t));
      REQUIRE(observed.rank_at(s, t) == Approx(want / (n - t)).epsilon(1e-5));
    }
  }
  SECTION("ready-made mass needs no queries") {
    const Observation seen = observe_mass({out.mass.data(), n}, n);
    Scored again(cache);
    REQUIRE(score(H2OScorer{}, cache, seen, again));
    CHECK(again.rank == out.rank);
    REQUIRE(score(ObservedAttentionScorer{}, cache, seen, again));
    CHECK(again.rank == observed.rank);
  }
  SECTION("observers are counted by what the mask shows") {
    Observation seen = data.observation();
    seen.attention.sliding_window = 4;
    REQUIRE(score(ObservedAttentionScorer{}, cache, seen, observed));
    for (u32 t = 0; t < n; ++t) {
      const double observers = std::min(4u, n - t);
      REQUIRE(observed.rank_at(1, t) == Approx(observed.mass_at(1, t) / observers));
    }
  }
}

TEST_CASE("TOVA gives every head the mean row of the last query") {
  const u32 n = 29;
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = n, .dim = 16});
  auto cache = data.cache();
  const auto mean = window_mean(data, 1);
  Scored out(cache.view());
  REQUIRE(score(TOVAScorer{}, cache.view(), data.observation(5), out));
  double best = 0.0;
  for (u32 t = 0; t < n; ++t) {
    const double want = (mean[0][t] + mean[1][t] + mean[2][t] + mean[3][t]) / 4.0;
    for (u32 s = 0; s < 2; ++s) {
      REQUIRE(out.mass_at(s, t) == Approx(want).margin(1e-6));
      if (t + 1 < n) REQUIRE(out.rank_at(s, t) == out.mass_at(s, t));
    }
    if (t + 1 < n) best = std::max(best, want);
  }
  CHECK(out.rank_at(1, n - 1) == Approx(best + 1.0));
  Scored free(cache.view());
  REQUIRE(score(TOVAScorer{.pin_last = false}, cache.view(), data.observation(5), free));
  CHECK(free.rank == free.mass);

  SECTION("heads that hold other tokens are matched by position") {
    std::vector<i32> positions(2 * n);
    for (u32 t = 0; t < n; ++t) {
      positions[t] = static_cast<i32>(2 * t);
      positions[n + t] = static_cast<i32>(3 * t);
    }
    cache.set_positions({positions.data(), n}, 200);
    Scored ragged(cache.view());
    REQUIRE(score(TOVAScorer{}, cache.view(), data.observation(5), ragged));
    CHECK(ragged.mass_at(0, 3) ==
          Approx((mean[0][3] + mean[1][3] + mean[2][2] + mean[3][2]) / 4.0));
    CHECK(ragged.mass_at(1, 1) == Approx((mean[2][1] + mean[3][1]) / 4.0));
  }
}

TEST_CASE("scorers without queries: StreamingLLM, key norm, random, external") {
  const u32 n = 23;
  const RandomCache data =
      random_cache({.kv_heads = 2, .group = 1, .tokens = n, .dim = 80, .dtype = DType::f16});
  auto cache = data.cache();
  cache.set_origin({.layer = 3, .head = 4});
  const CacheView view = cache.view();
  Scored out(view);
  SECTION("StreamingLLM") {
    REQUIRE(score(StreamingLLMScorer{.sinks = 2}, view, {}, out));
    CHECK_FALSE(out.scores.has_mass);
    for (u32 t = 3; t < n; ++t) REQUIRE(out.rank_at(0, t) > out.rank_at(0, t - 1));
    CHECK(out.rank_at(0, 1) > out.rank_at(0, n - 1));
    CHECK(std::isfinite(out.rank_at(0, 0)));
  }
  SECTION("key norm") {
    REQUIRE(score(KeyNormScorer{}, view, {}, out));
    CHECK_FALSE(out.scores.has_mass);
    for (u32 s = 0; s < 2; ++s) {
      for (u32 t = 0; t < n; ++t) {
        double sum = 0.0;
        for (u32 d = 0; d < 80; ++d) {
          sum += data.keys.head(s)[t * 80 + d] * data.keys.head(s)[t * 80 + d];
        }
        REQUIRE(out.rank_at(s, t) == Approx(-std::sqrt(sum)).epsilon(1e-5));
      }
    }
  }
  SECTION("KeyDiff") {
    REQUIRE(score(KeyDiffScorer{}, view, {}, out));
    CHECK_FALSE(out.scores.has_mass);
    for (u32 s = 0; s < 2; ++s) {
      std::vector<double> mean(80, 0.0);
      std::vector<double> norm(n, 0.0);
      for (u32 t = 0; t < n; ++t) {
        const double* key = data.keys.head(s) + t * 80;
        for (u32 d = 0; d < 80; ++d) norm[t] += key[d] * key[d];
        norm[t] = std::sqrt(norm[t]);
        for (u32 d = 0; d < 80; ++d) mean[d] += key[d] / norm[t] / n;
      }
      double mean_norm = 0.0;
      for (const double x : mean) mean_norm += x * x;
      for (u32 t = 0; t < n; ++t) {
        double product = 0.0;
        for (u32 d = 0; d < 80; ++d) product += data.keys.head(s)[t * 80 + d] * mean[d];
        const double cosine = product / (norm[t] * std::sqrt(mean_norm));
        REQUIRE(out.rank_at(s, t) == Approx(-cosine).epsilon(1e-5).margin(1e-6));
      }
    }
  }
  SECTION("random") {
    PlanOptions options;
    options.seed = 9;
    options.step = 2;
    REQUIRE(score(RandomScorer{}, view, {}, out, options));
    CHECK_FALSE(out.scores.has_mass);
    CHECK(out.rank[n + 7] == draw(9, 3, 5, 7, 2));
  }
  SECTION("external") {
    std::vector<float> given(2 * n);
    for (u32 i = 0; i < 2 * n; ++i) given[i] = static_cast<float>(i);
    given[4] = nan_value;
    Observation seen;
    seen.external = {given.data(), n};
    REQUIRE(score(ExternalScorer{}, view, seen, out));
    CHECK_FALSE(out.scores.has_mass);
    CHECK(out.mass[0] == -7.0f);
    CHECK(std::isnan(out.rank[4]));
    REQUIRE(score(ExternalScorer{.is_mass = true}, view, seen, out));
    CHECK(out.scores.has_mass);
    CHECK(out.mass[2 * n - 1] == given[2 * n - 1]);
    CHECK(score(ExternalScorer{}, view, {}, out) == StatusCode::missing_observation);
  }
}

TEST_CASE("bad data never fails a scorer, and ranks its own token NaN") {
  RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = 48, .dim = 16});
  const CacheView cache = data.cache().view();
  data.keys.set_row(0, 6, std::vector<float>(16, nan_value));
  data.keys.set_row(1, 9, std::vector<float>(16, inf));  // inf - inf: NaN logits
  const auto run = [&](const auto& scorer) {
    Scored out(cache);
    REQUIRE(score(scorer, cache, data.observation(16), out));
    CHECK(std::isnan(out.rank_at(0, 6)));
    for (u32 t = 0; t < 48; ++t) {
      if (t != 6 && t != 9) REQUIRE(std::isfinite(out.rank_at(0, t)));
    }
  };
  run(H2OScorer{});
  run(ObservedAttentionScorer{});
  run(SnapKVScorer{});
  run(SnapKVScorer{.pooling = Pooling::max, .order = PoolOrder::pool_query_mean_group});
  run(TOVAScorer{});
  run(KeyNormScorer{});
  run(KeyDiffScorer{});
}

TEST_CASE("scores do not depend on the workers") {
  const RandomCache data = random_cache({.kv_heads = 5, .group = 3, .tokens = 70, .dim = 24});
  const CacheView cache = data.cache().view();
  PlanOptions spread;
  spread.executor = shuffled_executor();
  const auto run = [&](const auto& scorer) {
    Scored a(cache);
    Scored b(cache);
    REQUIRE(score(scorer, cache, data.observation(16), a));
    REQUIRE(score(scorer, cache, data.observation(16), b, spread));
    CHECK(std::memcmp(a.rank.data(), b.rank.data(), a.rank.size() * sizeof(float)) == 0);
    CHECK(std::memcmp(a.mass.data(), b.mass.data(), a.mass.size() * sizeof(float)) == 0);
  };
  run(H2OScorer{.group = GroupReduction::max});
  run(ObservedAttentionScorer{});
  run(SnapKVScorer{});
  run(TOVAScorer{});
  run(KeyNormScorer{});
  run(KeyDiffScorer{});
}

TEST_CASE("scorers refuse what they cannot read") {
  const RandomCache data = random_cache({.kv_heads = 2, .group = 2, .tokens = 48, .dim = 16});
  const CacheView cache = data.cache().view();
  const Observation seen = data.observation();
  Scored out(cache);
  const auto common = [&](const auto& scorer) {
    CHECK(score(scorer, cache, {}, out) == StatusCode::missing_observation);
    std::byte little[128];
    Workspace small{std::span<std::byte>(little)};
    const PlanOptions options;
    Context context{small, options};
    CHECK(scorer.score(cache, seen, context, out.scores) == StatusCode::workspace_too_small);
    Random random(3);
    const RandomTensor three = random_tensor(random, 3, 48, 16);
    CHECK(score(scorer, cache, observe_prefill(three.view()), out) == StatusCode::invalid_group);
    const RandomTensor wide = random_tensor(random, 4, 48, 17);
    CHECK(score(scorer, cache, observe_prefill(wide.view()), out) == StatusCode::shape_mismatch);
    Scored no_mass(cache);
    no_mass.scores.mass = {};
    CHECK(score(scorer, cache, seen, no_mass) == StatusCode::null_pointer);
  };
  common(H2OScorer{});
  common(ObservedAttentionScorer{});
  common(SnapKVScorer{});
  common(TOVAScorer{});
  CHECK(score(SnapKVScorer{.kernel = 4}, cache, seen, out) == StatusCode::invalid_option);
  CHECK(score(SnapKVScorer{.kernel = 0}, cache, seen, out) == StatusCode::invalid_option);
  Scored wrong(cache);
  wrong.lengths[1] = 47;
  CHECK(score(KeyNormScorer{}, cache, seen, wrong) == StatusCode::shape_mismatch);
  wrong.scores.segments = 1;
  CHECK(score(RandomScorer{}, cache, seen, wrong) == StatusCode::shape_mismatch);
  wrong.scores = {};
  wrong.scores.segments = 2;
  CHECK(score(StreamingLLMScorer{}, cache, seen, wrong) == StatusCode::null_pointer);
}
