// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bench/io/capture.hpp"
#include "kvlean/config.hpp"

namespace kvlean::bench {

/// Extents of a toy capture: those of the bundled ones, a layer less.
struct ToyShape {
  std::size_t layers = 3;
  std::size_t query_heads = 9;
  std::size_t kv_heads = 3;
  std::size_t dim = 64;
  std::size_t context = 1024;
  std::size_t future = 128;
};

/// Synthetic queries, keys and values with what makes real caches compressible: topics that drift
/// (first-order autoregressive keys), attention that falls with distance (rotary position
/// embedding), sinks, heavy hitters, and heads that differ in how much they care for each. The same
/// seed gives the same bytes.
[[nodiscard]] io::Capture make_toy_capture(const ToyShape& shape, u64 seed);

}  // namespace kvlean::bench
