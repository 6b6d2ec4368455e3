// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <vector>

#include "tests/support/catch.hpp"
#include "tests/support/random_cache.hpp"
#include "tests/support/stream.hpp"

using namespace kvlean;
using namespace kvlean_test;

namespace {

/// Z of one segment as the formula says, in double. Keys [token][dim], queries [head][query][dim].
std::vector<double> reference_rkv(const RKVScorer& scorer, const double* keys, u32 length, u32 dim,
                                  const std::vector<const double*>& heads, u32 read,
                                  const std::vector<double>& log_mass) {
  const u32 prefix = length - std::min(read, length);
  std::vector<double> importance(length, 0.0);
  for (u32 i = 0; i < read; ++i) {
    std::vector<double> p(prefix);
    double total = 0.0;
    for (u32 t = 0; t < prefix; ++t) {
      double best = -1e300;
      for (const double* queries : heads) {
        double dot = 0.0;
        for (u32 d = 0; d < dim; ++d) dot += queries[i * dim + d] * keys[t * dim + d];
        best = std::max(best, dot / std::sqrt(static_cast<double>(dim)));
      }
      p[t] = std::exp(best + (log_mass.empty() ? 0.0 : log_mass[t]));
      total += p[t];
    }
    for (u32 t = 0; t < prefix; ++t) importance[t] += p[t] / total / read;
  }
  std::vector<double> similarity(length, 0.0);
  for (u32 i = 0; i < length; ++i) {
    std::vector<double> row(length, 0.0);
    for (u32 j = 0; j < length; ++j) {
      double dot = 0.0, a = 0.0, b = 0.0;
      for (u32 d = 0; d < dim; ++d) {
        dot += keys[i * dim + d] * keys[j * dim + d];
        a += keys[i * dim + d] * keys[i * dim + d];
        b += keys[j * dim + d] * keys[j * dim + d];
      }
      if (i != j) row[j] = dot / std::sqrt(a * b);
    }
    u32 left = scorer.retained;
    for (u32 j = length; j-- > 0 && left > 0;) {
      if (row[j] > static_cast<double>(scorer.threshold)) {
        row[j] = 0.0;
        --left;
      }
    }
    for (u32 j = 0; j < length; ++j) similarity[j] += row[j] / length;
  }
  double total = 0.0;
  for (const double x : similarity) total += std::exp(x);
  std::vector<double> z(length, 2.0);
  const double lambda = static_cast<double>(scorer.lambda);
  for (u32 t = 0; t < prefix; ++t) {
    const u32 half = scorer.kernel / 2;
    double pooled = 0.0;
    for (u32 j = t > half ? t - half : 0; j < std::min(prefix, t + half + 1); ++j) {
      pooled = std::max(pooled, importance[j]);
    }
    z[t] = lambda * pooled - (1.0 - lambda) * std::exp(similarity[t]) / total;
  }
  return z;
}

struct Scored {
  Status status;
  std::vector<float> rank;
  Scores scores;
};

Scored run(const RKVScorer& scorer, const CacheView& cache, const Observation& seen,
           const Executor& executor = {}) {
  Scored result;
  Workspace workspace;
  PlanOptions options;
  options.executor = executor;
  Context context{workspace, options, 0, 1};
  static std::vector<u32> lengths;
  lengths.clear();
  for (u32 s = 0; s < cache.segments; ++s) lengths.push_back(cache.length(s));
  result.rank.assign(std::size_t{cache.segments} * cache.max_length(), -7.0f);
  result.scores.segments = cache.segments;
  result.scores.lengths = lengths.data();
  result.scores.rank = Ragged<float>(result.rank.data(), cache.max_length());
  result.scores.has_mass = true;
  result.status = scorer.score(cache, seen, context, result.scores);
  return result;
}

}  // namespace

TEST_CASE("R-KV equals the formula over odd shapes") {
  for (const u32 group : {1u, 3u}) {
    for (const u32 tokens : {9u, 41u}) {
      for (const u32 dim : {5u, 16u, 33u}) {
        for (const u32 read : {8u, 3u, 11u}) {
          for (const DType dtype : all_dtypes) {
            RandomCache data = random_cache({.seed = tokens * dim + group,
                                             .kv_heads = 2,
                                             .group = group,
                                             .tokens = tokens,
                                             .queries = 11,
                                             .dim = dim,
                                             .dtype = dtype,
                                             .key_layout = Layout::transposed});
            for (u32 t = 3; t < tokens; t += 5) {  // copies
              std::vector<float> row(dim);
              load_row(data.keys.rows(), 1, t - 3, row.data());
              data.keys.set_row(1, t, row);
            }
            CAPTURE(group, tokens, dim, read, static_cast<int>(dtype));
            RKVScorer scorer;
            scorer.window = read;
            scorer.kernel = read == 3 ? 1 : 7;
            scorer.retained = read == 11 ? 3 : 1;
            scorer.threshold = read == 8 ? 0.5f : 0.1f;
            auto cache = data.cache();
            std::vector<float> bias(2 * tokens, 0.0f);
            if (read == 8) {
              for (u32 i = 0; i < bias.size(); ++i) bias[i] = 0.1f * static_cast<float>(i % 7);
              cache.set_log_mass({bias.data(), tokens});
            }
            Observation seen;
            seen.window = data.all_queries();
            const Scored scored = run(scorer, cache.view(), seen);
            REQUIRE(scored.status);
            CHECK_FALSE(scored.scores.has_mass);
            for (u32 s = 0; s < 2; ++s) {
              std::vector<const double*> heads;
              for (u32 h = 0; h < group; ++h) {
                heads.push_back(data.queries.head(s * group + h) + (11 - read) * dim);
              }
              const std::vector<double> own(bias.begin() + s * tokens,
                                            bias.begin() + (s + 1) * tokens);
              const auto expected =
                  reference_rkv(scorer, data.keys.head(s), tokens, dim, heads, read, own);
              for (u32 t = 0; t < tokens; ++t) {
                REQUIRE_THAT(static_cast<double>(scored.rank[s * tokens + t]),
                             WithinAbs(expected[t], 2e-6));
              }
            }
            const Scored spread = run(scorer, cache.view(), seen, odd_executor());
            CHECK(spread.rank == scored.rank);
          }
        }
      }
    }
  }
}

TEST_CASE("R-KV keeps the newest of several copies") {
  // Four directions, told five times; the window holds the last of them.
  constexpr u32 tokens = 20;
  std::vector<float> keys(tokens * 4, 0.0f);
  for (u32 t = 0; t < tokens; ++t) keys[t * 4 + t % 4] = 1.0f;
  std::vector<float> q(4 * 4, 0.0f);  // indifferent queries
  const auto tensor = strided(keys.data(), {.kv_heads = 1, .tokens = tokens, .dim = 4});
  const KVCache cache(tensor, tensor);
  Observation seen = observe_window(strided(q.data(), QueryExtents{1, 4, 4}));
  RKVPolicy policy;
  PlanOptions options;
  options.protection = {0, 0};
  Workspace workspace;
  CompressionPlan plan;
  REQUIRE(policy.plan(cache, seen, Budget::slots(8), workspace, plan, options));
  for (u32 i = 0; i < 8; ++i) {
    // 12 to 15 are the newest copies before the window, which itself stays.
    if (i >= 4) CHECK(plan.anchor[i] == 12 + i);
  }
  // The copy that all others leave out is the newest: it has the best rank of its kind.
  RKVScorer scorer;
  scorer.window = 1;
  scorer.kernel = 1;
  const Scored scored = run(scorer, cache.view(), seen);
  REQUIRE(scored.status);
  for (u32 t = 0; t < 15; ++t) CHECK(scored.rank[t] < scored.rank[t % 4 == 3 ? 19 : 16 + t % 4]);
}

TEST_CASE("R-KV survives bad keys and says what it misses") {
  RandomCache data = random_cache({.seed = 4, .kv_heads = 2, .tokens = 30, .queries = 8});
  std::vector<float> row(16, std::numeric_limits<float>::quiet_NaN());
  data.keys.set_row(0, 5, row);
  std::fill(row.begin(), row.end(), 0.0f);
  data.keys.set_row(1, 7, row);
  const auto cache = data.cache();
  Observation seen;
  seen.reference = data.all_queries();  // no window: the newest reference queries
  const Scored scored = run({}, cache.view(), seen);
  REQUIRE(scored.status);
  u32 lost = 0;
  for (const float z : scored.rank) lost += z == z ? 0 : 1;
  CHECK(lost == 1);
  CHECK(scored.rank[5] != scored.rank[5]);
  CHECK(scored.rank[30 + 22] == 2.0f);
  CHECK(scored.rank[30 + 21] < 1.0f);

  CHECK(run({}, cache.view(), Observation{}).status.code() == StatusCode::missing_observation);
  RKVScorer bad;
  bad.kernel = 4;
  CHECK(run(bad, cache.view(), seen).status.code() == StatusCode::invalid_option);
  bad = {};
  bad.lambda = 1.5f;
  CHECK(run(bad, cache.view(), seen).status.code() == StatusCode::invalid_option);
  bad = {};
  bad.threshold = std::numeric_limits<float>::quiet_NaN();
  CHECK(run(bad, cache.view(), seen).status.code() == StatusCode::invalid_option);

  // Fewer tokens than the window: all of them are the window.
  auto few = data.cache();
  few.set_length(6);
  for (const float z : run({}, few.view(), seen).rank) CHECK((z == 2.0f || z == -7.0f));

  AnyPolicy policy;
  REQUIRE(make_policy("rkv", policy));
  CHECK(std::get_if<RKVScorer>(&policy.scorer)->lambda == 0.1f);
  REQUIRE(make_policy("rkv+adakv+massfold", policy));
}

TEST_CASE("R-KV fits the workspace that policies are promised") {
  RandomCache data =
      random_cache({.seed = 9, .kv_heads = 3, .group = 2, .tokens = 700, .queries = 8, .dim = 64});
  Observation seen;
  seen.window = data.all_queries();
  PlanOptions options;
  options.executor = odd_executor();
  std::vector<std::byte> memory(plan_bytes_required({.num_layers = 1,
                                                     .num_kv_heads = 3,
                                                     .num_query_heads = 6,
                                                     .tokens = 700,
                                                     .key_dim = 64,
                                                     .workers = 3}));
  Workspace workspace{std::span<std::byte>(memory)};
  CompressionPlan plan;
  REQUIRE(RKVPolicy().plan(data.cache(), seen, Budget::slots(100), workspace, plan, options));
  CHECK(plan.num_slots() == 300);
}
