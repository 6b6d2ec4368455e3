// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <kvlean/kvlean.hpp>
#include <vector>

#include "tests/support/catch.hpp"
#include "tests/support/reference.hpp"

// A made-up model whose tokens stream into a BudgetedCache, and attention over any set of its
// tokens in double.

namespace kvlean_test {

/// Keys, values and queries of every token, a pure function of (kind, layer, head, token, dim).
struct StreamModel {
  kvlean::BudgetedShape shape{.layers = 2,
                              .kv_heads = 2,
                              .query_heads = 4,
                              .key_dim = 8,
                              .value_dim = 6,
                              .key_dtype = kvlean::DType::f32,
                              .value_dtype = kvlean::DType::f32};
  kvlean::u64 seed = 1;
  float sharpness = 2.0f;  ///< of the queries: larger makes attention more uneven

  enum Kind : kvlean::u32 { key, value, query };

  float at(Kind kind, kvlean::u32 layer, kvlean::u32 head, kvlean::u32 token, kvlean::u32 d) const {
    const float x =
        2.0f * kvlean::draw(seed * 3 + kind, layer, head, static_cast<kvlean::i32>(token), d) -
        1.0f;
    return kind == query ? sharpness * x : x;
  }
  kvlean::u32 width(Kind kind) const {
    return static_cast<kvlean::u32>(kind == value ? shape.value_dim : shape.key_dim);
  }
  kvlean::u32 heads(Kind kind) const {
    return static_cast<kvlean::u32>(kind == query ? shape.query_heads : shape.kv_heads);
  }
  /// [head][count][width] of tokens [first, first + count).
  std::vector<float> rows(Kind kind, kvlean::u32 layer, kvlean::u32 first,
                          kvlean::u32 count) const {
    std::vector<float> result;
    for (kvlean::u32 h = 0; h < heads(kind); ++h) {
      for (kvlean::u32 t = first; t < first + count; ++t) {
        for (kvlean::u32 d = 0; d < width(kind); ++d) result.push_back(at(kind, layer, h, t, d));
      }
    }
    return result;
  }
  kvlean::Strided<const float> tensor(Kind kind, const std::vector<float>& data,
                                      kvlean::u32 count) const {
    return kvlean::strided(
        data.data(), kvlean::Extents{.kv_heads = heads(kind), .tokens = count, .dim = width(kind)});
  }
  kvlean::u32 group() const { return static_cast<kvlean::u32>(shape.query_heads / shape.kv_heads); }
};

/// Attention of the query of one token and head over some tokens, in double.
struct ExactAttention {
  std::vector<double> probability;
  std::vector<double> output;
  double lse = 0.0;
};

inline ExactAttention exact_attention(const StreamModel& model, kvlean::u32 layer,
                                      kvlean::u32 query_head, kvlean::u32 token,
                                      const std::vector<kvlean::u32>& seen) {
  using Model = StreamModel;
  const kvlean::u32 head = query_head / model.group();
  std::vector<double> q, k;
  for (kvlean::u32 d = 0; d < model.width(Model::key); ++d) {
    q.push_back(static_cast<double>(model.at(Model::query, layer, query_head, token, d)));
  }
  for (const kvlean::u32 t : seen) {
    for (kvlean::u32 d = 0; d < model.width(Model::key); ++d) {
      k.push_back(static_cast<double>(model.at(Model::key, layer, head, t, d)));
    }
  }
  ReferenceOptions options;
  options.causal = false;
  const ReferenceAttention made =
      reference_attention(q.data(), 1, k.data(), seen.size(), q.size(), options);
  ExactAttention result;
  result.lse = made.lse[0];
  result.output.assign(model.width(Model::value), 0.0);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    result.probability.push_back(made.p(0, i));
    for (kvlean::u32 d = 0; d < model.width(Model::value); ++d) {
      result.output[d] +=
          made.p(0, i) * static_cast<double>(model.at(Model::value, layer, head, seen[i], d));
    }
  }
  return result;
}

/// Appends tokens [first, first + count) to every layer and attends. Returns the outputs
/// [layer][query_head][count][value_dim]; `failed` is the first status that is not ok.
inline std::vector<float> run_step(kvlean::BudgetedCacheBase& cache, const StreamModel& model,
                                   kvlean::u32 first, kvlean::u32 count,
                                   kvlean::Workspace& workspace, kvlean::Status& failed,
                                   std::vector<float>* lse = nullptr) {
  using Model = StreamModel;
  std::vector<float> all;
  failed = kvlean::StatusCode::ok;
  for (kvlean::u32 l = 0; l < model.shape.layers; ++l) {
    const auto k = model.rows(Model::key, l, first, count);
    const auto v = model.rows(Model::value, l, first, count);
    const auto q = model.rows(Model::query, l, first, count);
    std::vector<float> output(model.shape.query_heads * count * model.shape.value_dim);
    std::vector<float> sums(model.shape.query_heads * count);
    failed = cache.append(l, model.tensor(Model::key, k, count),
                          model.tensor(Model::value, v, count), count);
    if (!failed) return all;
    failed = cache.attend(l, kvlean::queries(model.tensor(Model::query, q, count)),
                          {output.data(), sums.data(), 0, 0}, workspace);
    if (!failed) return all;
    all.insert(all.end(), output.begin(), output.end());
    if (lse != nullptr) lse->insert(lse->end(), sums.begin(), sums.end());
  }
  return all;
}

/// Bytes of a cache between steps: two are equal when nothing that matters differs.
inline std::vector<std::byte> saved(kvlean::BudgetedCacheBase& cache) {
  kvlean::Workspace workspace;
  std::vector<std::byte> bytes(cache.snapshot_bytes());
  std::size_t written = 0;
  REQUIRE(cache.save(bytes, written, workspace));
  REQUIRE(written > 0);
  bytes.resize(written);
  return bytes;
}

/// Three "workers" that take the tasks in an odd order.
inline kvlean::Executor odd_executor() {
  kvlean::Executor executor;
  executor.workers = 3;
  executor.run = [](void*, kvlean::u32 tasks,
                    void (*task)(void*, kvlean::u32, kvlean::u32) noexcept, void* arg) noexcept {
    for (kvlean::u32 i = tasks; i-- > 0;) task(arg, (i * 2 + 1) % 3, i);
  };
  return executor;
}

}  // namespace kvlean_test
