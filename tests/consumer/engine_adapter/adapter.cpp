// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "adapter.h"

#include <kvlean/kvlean.hpp>

namespace engine {

int kv_compression_version() { return KVLEAN_VERSION; }

int check_kv_cache(const float* keys, const float* values, std::size_t kv_heads, std::size_t tokens,
                   std::size_t dim) {
  const kvlean::Extents extents{.kv_heads = kv_heads, .tokens = tokens, .dim = dim};
  const kvlean::KVCache cache(kvlean::strided(keys, extents), kvlean::strided(values, extents));
  return static_cast<int>(kvlean::check_cache(cache.view()).code());
}

}  // namespace engine
