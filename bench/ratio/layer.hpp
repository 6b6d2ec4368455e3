// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// One layer of Llama-3.1-8B's shape, in as many copies as no cache holds, and what stages need.
#pragma once

#include <kvlean/kvlean.hpp>
#include <string>
#include <vector>

#include "bench/ratio/buffer.hpp"
#include "bench/ratio/rows.hpp"

namespace kvlean::ratio {

inline constexpr u32 kv_heads = 8;
inline constexpr u32 group_size = 4;
inline constexpr u32 query_heads = kv_heads * group_size;
inline constexpr u32 dim = 128;
inline constexpr u32 window = 32;

/// A tensor whose type is known when the program runs: [head][token][dim], or any Rows.
struct AnyTensor {
  Rows description;
  [[nodiscard]] Rows rows() const noexcept { return description; }
};
[[nodiscard]] AnyTensor tensor(void* data, DType dtype, u32 heads, u32 tokens, u32 width = dim);

using AnyCache = KVCache<AnyTensor>;

/// How keys of neighbouring tokens are alike.
enum class KeyData {
  independent,  ///< not at all
  runs,         ///< alike (cosine near 0.95) in runs; four tokens of ten begin one
};

struct LayerShape {
  u32 tokens = 0;
  DType dtype = DType::f16;
  u32 heads = kv_heads;
  u32 queries = window;  ///< of each query head
  KeyData keys = KeyData::independent;

  [[nodiscard]] std::size_t elements() const { return std::size_t{heads} * tokens * dim; }
  [[nodiscard]] std::size_t bytes() const { return elements() * size_bytes(dtype); }
  [[nodiscard]] std::string text() const;
};

/// Keys, values and queries. All copies hold the same numbers.
class Layer {
 public:
  Layer(const LayerShape& shape, std::size_t copies, bool with_values, bool restorable = false);

  [[nodiscard]] const LayerShape& shape() const { return shape_; }
  [[nodiscard]] std::size_t copies() const { return keys_.size(); }
  [[nodiscard]] void* keys(std::size_t copy) const { return keys_[copy].as<void>(); }
  [[nodiscard]] void* values(std::size_t copy) const { return values_[copy].as<void>(); }
  [[nodiscard]] void* queries() const { return queries_.as<void>(); }
  [[nodiscard]] const void* first_keys() const { return pristine_keys_.as<void>(); }
  [[nodiscard]] const void* first_values() const { return pristine_values_.as<void>(); }
  /// A layer without values uses its keys as values.
  [[nodiscard]] AnyCache cache(std::size_t copy) const;
  [[nodiscard]] Queries asked() const;
  void restore(std::size_t copy);

 private:
  LayerShape shape_;
  std::vector<Buffer> keys_;
  std::vector<Buffer> values_;
  Buffer queries_;
  Buffer pristine_keys_;  ///< restorable layers only
  Buffer pristine_values_;
};

/// Memory for scratch and plans, the caller's.
class Room {
 public:
  explicit Room(std::size_t bytes) : memory_(bytes), workspace_({memory_.as<>(), bytes}) {}
  /// Enough for any policy on such a layer.
  Room(u32 tokens, u32 workers);
  [[nodiscard]] Workspace& workspace() { return workspace_; }

 private:
  Buffer memory_;
  Workspace workspace_;
};

/// The arrays that a scorer fills.
class ScoreArrays {
 public:
  ScoreArrays(u32 heads, u32 tokens);
  [[nodiscard]] Scores& scores() { return scores_; }
  [[nodiscard]] float* rank() const { return rank_.as<float>(); }
  [[nodiscard]] float* mass() const { return mass_.as<float>(); }
  [[nodiscard]] std::size_t bytes() const { return rank_.bytes(); }

 private:
  Buffer rank_;
  Buffer mass_;
  Buffer observers_;
  std::vector<u32> lengths_;
  Scores scores_;
};

/// Log-normal attention mass, [heads][tokens], heads of different spread.
void fill_mass(float* mass, u32 heads, u32 tokens, u64 seed);

[[nodiscard]] PlanOptions options_with(const Executor& executor);

/// "avx512", or "amx" where scoring and attending use it.
[[nodiscard]] std::string isa_name(simd::Target target);
/// What scoring of 16-bit caches runs on: the matrix unit where there is one.
[[nodiscard]] simd::Target scoring_target(DType dtype);

}  // namespace kvlean::ratio
