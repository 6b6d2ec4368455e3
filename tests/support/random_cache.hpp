// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <vector>

#include "kvlean/core/kv_cache.hpp"
#include "kvlean/observe/observation.hpp"
#include "tests/support/layouts.hpp"

// A layer of random K, V and Q in any layout, with the stored values at hand in double.

namespace kvlean_test {

inline constexpr kvlean::DType all_dtypes[] = {kvlean::DType::f32, kvlean::DType::f16,
                                               kvlean::DType::bf16};

/// A non-owning kvlean::Tensor over Rows that were set up by hand.
struct RowsView {
  kvlean::Rows description;
  kvlean::Rows rows() const noexcept { return description; }
};

/// Owns one tensor [head][token][dim] of values in [-2, 2). Movable; its Rows stay valid.
struct RandomTensor {
  TensorMemory memory;
  std::vector<double> values;  ///< [head][token][dim] as stored, i.e. after rounding to the type

  const kvlean::Rows& rows() const noexcept { return memory.rows; }
  RowsView view() const noexcept { return {memory.rows}; }
  /// Values of one head, [token][dim].
  const double* head(kvlean::u32 h) const {
    return values.data() + static_cast<std::size_t>(h) * rows().tokens * rows().width;
  }
  /// Overwrites one row, in memory and in `values`.
  void set_row(kvlean::u32 h, kvlean::u32 token, const std::vector<float>& row) {
    kvlean::store_row(memory.rows, h, token, row.data());
    read_back(h, token);
  }
  void read_back(kvlean::u32 h, kvlean::u32 token) {
    const kvlean::u32 width = rows().width;
    std::vector<float> row(width);
    kvlean::load_row(rows(), h, token, row.data());
    const std::size_t first = (static_cast<std::size_t>(h) * rows().tokens + token) * width;
    for (kvlean::u32 d = 0; d < width; ++d) values[first + d] = static_cast<double>(row[d]);
  }
};

inline RandomTensor random_tensor(Random& random, kvlean::u32 heads, kvlean::u32 tokens,
                                  kvlean::u32 dim, kvlean::DType dtype = kvlean::DType::f32,
                                  Layout layout = Layout::contiguous) {
  RandomTensor tensor;
  tensor.memory = make_tensor(layout, dtype, heads, tokens, dim, 5, random);
  tensor.values.resize(static_cast<std::size_t>(heads) * tokens * dim);
  for (kvlean::u32 h = 0; h < heads; ++h) {
    for (kvlean::u32 t = 0; t < tokens; ++t) tensor.read_back(h, t);
  }
  return tensor;
}

/// What random_cache() makes. Zeros mean: as many queries as tokens, values as wide as keys.
struct CacheSpec {
  kvlean::u32 seed = 1;
  kvlean::u32 kv_heads = 2;
  kvlean::u32 group = 2;  ///< query heads a KV head
  kvlean::u32 tokens = 33;
  kvlean::u32 queries = 0;
  kvlean::u32 dim = 16;
  kvlean::u32 value_dim = 0;
  kvlean::DType dtype = kvlean::DType::f32;
  Layout key_layout = Layout::contiguous;
  Layout value_layout = Layout::contiguous;
  Layout query_layout = Layout::contiguous;
};

/// Keys, values and queries with their views. Movable; views made earlier stay valid.
struct RandomCache {
  RandomTensor keys;
  RandomTensor values;
  RandomTensor queries;

  /// A KVCache to which lengths, positions and so on can be added.
  kvlean::KVCache<RowsView, RowsView> cache() const {
    return kvlean::KVCache<RowsView, RowsView>(keys.view(), values.view());
  }
  /// All queries, causal, the newest of the cache.
  kvlean::Queries all_queries() const { return kvlean::queries(queries.view()); }
  /// All queries as reference, the last `window` as window.
  kvlean::Observation observation(std::size_t window = 32) const {
    return kvlean::observe_prefill(queries.view(), window);
  }
};

inline RandomCache random_cache(const CacheSpec& spec) {
  Random random(spec.seed);
  RandomCache result;
  result.keys =
      random_tensor(random, spec.kv_heads, spec.tokens, spec.dim, spec.dtype, spec.key_layout);
  result.values =
      random_tensor(random, spec.kv_heads, spec.tokens,
                    spec.value_dim == 0 ? spec.dim : spec.value_dim, spec.dtype, spec.value_layout);
  result.queries = random_tensor(random, spec.kv_heads * spec.group,
                                 spec.queries == 0 ? spec.tokens : spec.queries, spec.dim,
                                 spec.dtype, spec.query_layout);
  return result;
}

}  // namespace kvlean_test
