// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <vector>

#include "adapter.h"

static_assert(__cplusplus < 202002L, "the engine must stay below C++20");

int main() {
  const std::vector<float> keys(2 * 16 * 8, 1.0f);
  const std::vector<float> values(keys);
  std::printf("KVLean %d\n", engine::kv_compression_version());
  const bool accepted = engine::check_kv_cache(keys.data(), values.data(), 2, 16, 8) == 0;
  const bool refused = engine::check_kv_cache(nullptr, values.data(), 2, 16, 8) != 0;
  return accepted && refused ? 0 : 1;
}
