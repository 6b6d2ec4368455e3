// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <random>
#include <vector>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/observe/observation.hpp"

namespace kvlean {

/// The rotation that the random layers claim: enough for reducers that turn keys.
inline constexpr RopeSpec layer_rope{};

/// A layer of random keys whose neighbours are alike, with random values and queries of all tokens.
struct RandomLayer {
  u32 heads, group = 2, tokens, dim = 8;
  std::vector<float> keys, values, rows;
  explicit RandomLayer(u32 num_heads = 2, u32 num_tokens = 120, u32 seed = 1)
      : heads(num_heads), tokens(num_tokens) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    keys.resize(std::size_t{heads} * tokens * dim);
    values.resize(keys.size());
    rows.resize(keys.size() * group);
    for (auto* data : {&keys, &values, &rows}) {
      for (float& x : *data) x = normal(random);
    }
    for (std::size_t i = dim; i < keys.size(); ++i) keys[i] += 0.8f * keys[i - dim];
  }
  auto cache() {
    return KVCache(strided(keys.data(), {.kv_heads = heads, .tokens = tokens, .dim = dim}),
                   strided(values.data(), {.kv_heads = heads, .tokens = tokens, .dim = dim}))
        .set_rope(&layer_rope);
  }
  Observation seen() {
    return observe_prefill(
        strided(rows.data(), {.heads = heads * group, .tokens = tokens, .dim = dim}), 16);
  }
};

}  // namespace kvlean
