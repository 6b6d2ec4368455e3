// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// A policy of one's own: one struct with one function, usable in every composition. This one keeps
// tokens whose value is large and whose key points away from the mean key.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kvlean/kvlean.hpp"

// Thirty lines are enough. `rank` is what selection sorts by; `mass` would be attention received.
struct ValueTimesSurpriseScorer {
  float sharpness = 1.0f;

  [[nodiscard]] kvlean::Status score(const kvlean::CacheView& cache, const kvlean::Observation&,
                                     kvlean::Context& context,
                                     kvlean::Scores& scores) const noexcept {
    using namespace kvlean;
    WorkspaceScope scope(context.workspace);
    float* mean = context.workspace.take<float>(cache.keys.width);
    if (mean == nullptr) return context.workspace.exhausted();
    float key[max_row_width], value[max_row_width];
    for (u32 head = 0; head < cache.segments; ++head) {
      std::fill_n(mean, cache.keys.width, 0.0f);
      for (u32 token = 0; token < cache.length(head); ++token) {
        load_row(cache.keys, head, token, key);
        row_math::add_scaled(mean, key, 1.0f, cache.keys.width);
      }
      for (u32 token = 0; token < cache.length(head); ++token) {
        load_row(cache.keys, head, token, key);
        load_row(cache.values, head, token, value);
        const float norms = std::sqrt(row_math::squared_norm(key, cache.keys.width) *
                                      row_math::squared_norm(mean, cache.keys.width));
        const float cosine =
            norms > 0.0f ? row_math::dot(key, mean, cache.keys.width) / norms : 0.0f;
        scores.rank(head, token) = std::exp(-sharpness * cosine) *
                                   std::sqrt(row_math::squared_norm(value, cache.values.width));
      }
    }
    return StatusCode::ok;
  }
};
static_assert(kvlean::Scorer<ValueTimesSurpriseScorer>);

int main() {
  using namespace kvlean;
  constexpr std::size_t tokens = 400, kv_heads = 4, dim = 64;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> keys(kv_heads * tokens * dim), values(keys.size());
  for (float& x : keys) x = normal(random) + 0.3f;
  for (float& x : values) x = normal(random);
  auto layer =
      KVCache(strided(keys.data(), {.kv_heads = kv_heads, .tokens = tokens, .dim = dim}),
              strided(values.data(), {.kv_heads = kv_heads, .tokens = tokens, .dim = dim}));

  // It composes with every allocator and reducer, built in or not.
  Workspace workspace;
  CompressionPlan plan;
  const auto report = [&](const char* name, Status status) {
    if (!status) {
      std::fprintf(stderr, "%s: %s\n", name, status.message());
      return false;
    }
    std::printf("%-28s", name);
    for (u32 head = 0; head < kv_heads; ++head) std::printf(" %4u", plan.length[head]);
    std::printf("  %llu terms\n", static_cast<unsigned long long>(plan.num_terms));
    return true;
  };
  const Budget budget = Budget::fraction(0.25);
  const ValueTimesSurpriseScorer scorer{.sharpness = 2.0f};
  const bool fine =
      report("mine+uniform+evict", compose(scorer, UniformAllocator{}, EvictReducer{})
                                       .plan(layer, {}, budget, workspace, plan)) &&
      report("mine+adakv+evict", compose(scorer, AdaKVAllocator{}, EvictReducer{})
                                     .plan(layer, {}, budget, workspace, plan)) &&
      report("mine+adakv+kvmerger", compose(scorer, AdaKVAllocator{}, KVMergerReducer{})
                                        .plan(layer, {}, budget, workspace, plan)) &&
      report("mine+uniform+massfold", compose(scorer, UniformAllocator{}, MassFoldReducer{})
                                          .plan(layer, {}, budget, workspace, plan));
  return fine ? 0 : 1;
}
