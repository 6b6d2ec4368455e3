// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0

// A toy decode loop: a prompt in chunks, then one token at a time with speculation, in a cache
// that never holds more than its budget.

#include <cstdio>
#include <random>
#include <vector>

#include "kvlean/kvlean.hpp"

namespace {

using namespace kvlean;

constexpr BudgetedShape model{
    .layers = 4, .kv_heads = 2, .query_heads = 8, .key_dim = 64, .value_dim = 64};

std::vector<float> made_up(std::size_t count) {  // instead of a model
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

// One forward pass over `tokens` new tokens: every layer appends, then attends.
Status forward(BudgetedCacheBase& cache, u32 tokens, Workspace& workspace) {
  for (u32 layer = 0; layer < model.layers; ++layer) {
    const auto k = made_up(model.kv_heads * tokens * model.key_dim);
    const auto v = made_up(model.kv_heads * tokens * model.value_dim);
    const auto q = made_up(model.query_heads * tokens * model.key_dim);
    std::vector<float> output(model.query_heads * tokens * model.value_dim);
    const Extents rows{.kv_heads = model.kv_heads, .tokens = tokens, .dim = model.key_dim};
    KVLEAN_RETURN_IF_ERROR(
        cache.append(layer, strided(k.data(), rows), strided(v.data(), rows), tokens));
    const QueryExtents heads{.heads = model.query_heads, .tokens = tokens, .dim = model.key_dim};
    KVLEAN_RETURN_IF_ERROR(cache.attend(layer, queries(strided(q.data(), heads)),
                                        {output.data(), nullptr, 0, 0}, workspace));
  }
  return StatusCode::ok;
}

Status run() {
  BudgetedOptions options;
  options.budget_slots = 128;   // slots per head after a compression, averaged over all heads
  options.compress_every = 16;  // so at most 143 after any commit
  options.step_tokens = 64;     // the prompt comes in chunks of 64
  options.max_tentative = 4;    // drafts of up to 4 tokens can be taken back

  BudgetedCache cache(compose(H2OScorer{}, AdaKVLayersAllocator{}, EvictReducer{}));
  KVLEAN_RETURN_IF_ERROR(cache.allocate(model, options));  // all memory there will ever be
  Workspace workspace;  // grows at first; engines pass workspace_bytes_required() of their own

  for (u32 chunk = 0; chunk < 16; ++chunk) {  // a prompt of 1024 tokens
    KVLEAN_RETURN_IF_ERROR(forward(cache, 64, workspace));
    KVLEAN_RETURN_IF_ERROR(cache.commit(workspace));
  }
  for (u32 step = 0; step < 500; ++step) {  // a draft of 4, of which 1 to 4 are right
    KVLEAN_RETURN_IF_ERROR(forward(cache, 4, workspace));
    KVLEAN_RETURN_IF_ERROR(cache.commit(1 + step % 4, workspace));
  }
  std::printf("%llu tokens seen, %zu slots of %zu held, %.1f MiB, compressed %u times\n",
              static_cast<unsigned long long>(cache.tokens_seen()), cache.total_slots(),
              cache.total_budget(), static_cast<double>(cache.bytes_used()) / (1024.0 * 1024.0),
              cache.compressions());
  return StatusCode::ok;
}

}  // namespace

int main() {
  const Status status = run();
  if (!status) std::fprintf(stderr, "streaming: %s\n", status.message());
  return status ? 0 : 1;
}
