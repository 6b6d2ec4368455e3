// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// The smallest complete program: wrap a layer's cache, compress it to 35 %, attend to what is left.

#include <cstdio>
#include <random>
#include <vector>

#include "kvlean/kvlean.hpp"

namespace {

// README begin
// One layer of an engine's cache, [kv_head][token][dim], and the queries of its last 32 tokens.
kvlean::Status compress_layer(float* keys, float* values, const float* last_queries,
                              std::size_t tokens, kvlean::Workspace& workspace,
                              kvlean::RaggedKVCache& small) {
  using namespace kvlean;
  auto layer = KVCache(strided(keys, {.kv_heads = 8, .tokens = tokens, .dim = 128}),
                       strided(values, {.kv_heads = 8, .tokens = tokens, .dim = 128}));
  auto seen = observe_window(strided(last_queries, {.heads = 32, .tokens = 32, .dim = 128}));
  auto policy = compose(SnapKVScorer{}, AdaKVAllocator{.safeguard = 0.2f}, EvictReducer{});
  CompressionPlan plan;
  if (Status s = policy.plan(layer, seen, Budget::fraction(0.35), workspace, plan); !s) return s;
  return apply(plan, layer, small);  // or apply(plan, layer, in_place)
}
// README end

}  // namespace

int main() {
  using namespace kvlean;
  constexpr std::size_t tokens = 512, kv_heads = 8, query_heads = 32, dim = 128;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> keys(kv_heads * tokens * dim), values(keys.size());
  std::vector<float> queries_(query_heads * 32 * dim);
  for (auto* data : {&keys, &values, &queries_}) {
    for (float& x : *data) x = normal(random);
  }

  Workspace workspace;  // grows by itself; engines pass plan_bytes_required() bytes of their own
  RaggedKVCache small;  // heads of different lengths
  if (Status s = small.allocate(
          RaggedShape::flat(kv_heads, dim, DType::f32, kv_heads * tokens * 35 / 100));
      !s) {
    std::fprintf(stderr, "allocate: %s\n", s.message());
    return 1;
  }
  if (Status s =
          compress_layer(keys.data(), values.data(), queries_.data(), tokens, workspace, small);
      !s) {
    std::fprintf(stderr, "compress: %s\n", s.message());
    return 1;
  }

  // Read it: the next query of each of the 32 heads, over the compressed cache.
  std::vector<float> next(query_heads * dim), output(query_heads * dim);
  for (float& x : next) x = normal(random);
  const Queries step =
      queries(strided(next.data(), {.heads = query_heads, .tokens = 1, .dim = dim}), Mask::none);
  if (Status s = attend(step, small, AttentionOutput{.values = output.data()}); !s) {
    std::fprintf(stderr, "attend: %s\n", s.message());
    return 1;
  }
  std::printf("%zu of %zu slots kept, %zu of %zu bytes\n", small.total_length(), kv_heads * tokens,
              small.bytes_used(), 2 * keys.size() * sizeof(float));
  for (u32 head = 0; head < kv_heads; ++head)
    std::printf("head %u: %u\n", head, small.length(head));
  return 0;
}
