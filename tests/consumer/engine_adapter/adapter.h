// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// The boundary: C++11, no type of KVLean. Keys and values are float, [kv_head][token][dim].
#pragma once

#include <cstddef>

namespace engine {

/// The library's version as one number.
int kv_compression_version();

/// 0 if the two tensors make a cache that KVLean can compress, else the cause.
int check_kv_cache(const float* keys, const float* values, std::size_t kv_heads, std::size_t tokens,
                   std::size_t dim);

}  // namespace engine
