// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/layer.hpp"

#include <cmath>

namespace kvlean::ratio {

AnyTensor tensor(void* data, DType dtype, u32 heads, u32 tokens, u32 width) {
  AnyTensor result;
  Rows& rows = result.description;
  rows.data = data;
  rows.dtype = dtype;
  rows.writable = true;
  rows.width = width;
  rows.heads = heads;
  rows.tokens = tokens;
  rows.token_stride = width;
  rows.head_stride = static_cast<i64>(tokens) * static_cast<i64>(width);
  return result;
}

std::string LayerShape::text() const {
  return std::to_string(heads * group_size) + "/" + std::to_string(heads) + " heads, d " +
         std::to_string(dim) + ", " + std::to_string(tokens) + " tokens";
}

namespace {

void fill_keys(const LayerShape& shape, void* keys) {
  Draws draws(11);
  float row[dim] = {};
  constexpr float old_part = 0.975f;
  const float new_part = std::sqrt(1.0f - old_part * old_part);
  for (std::size_t r = 0; r < std::size_t{shape.heads} * shape.tokens; ++r) {
    const bool fresh = shape.keys == KeyData::independent || draws.next() % 10 < 4;
    for (u32 i = 0; i < dim; ++i) {
      const float x = draws.normal();
      row[i] = fresh ? x : old_part * row[i] + new_part * x;
      set_element(keys, shape.dtype, r * dim + i, row[i]);
    }
  }
}

}  // namespace

Layer::Layer(const LayerShape& shape, std::size_t copies, bool with_values, bool restorable)
    : shape_(shape) {
  const std::size_t bytes = shape.bytes();
  keys_.emplace_back(bytes);
  fill_keys(shape, keys(0));
  if (with_values) {
    values_.emplace_back(bytes);
    Draws draws(12);
    for (std::size_t i = 0; i < shape.elements(); ++i) {
      set_element(values(0), shape.dtype, i, draws.uniform());
    }
  }
  for (std::size_t copy = 1; copy < copies; ++copy) {
    keys_.emplace_back(bytes);
    keys_[copy].copy_from(keys_[0]);
    if (!with_values) continue;
    values_.emplace_back(bytes);
    values_[copy].copy_from(values_[0]);
  }
  if (restorable) {
    pristine_keys_ = Buffer(bytes);
    pristine_keys_.copy_from(keys_[0]);
    pristine_values_ = Buffer(with_values ? bytes : 0);
    if (with_values) pristine_values_.copy_from(values_[0]);
  }
  const std::size_t rows = std::size_t{shape.heads} * group_size * shape.queries;
  queries_ = Buffer(rows * dim * size_bytes(shape.dtype));
  Draws draws(13);
  for (std::size_t i = 0; i < rows * dim; ++i) {
    set_element(queries(), shape.dtype, i, 1.5f * draws.normal());  // logits spread by 1.5
  }
}

AnyCache Layer::cache(std::size_t copy) const {
  return AnyCache(tensor(keys(copy), shape_.dtype, shape_.heads, shape_.tokens),
                  tensor(values_.empty() ? keys(copy) : values(copy), shape_.dtype, shape_.heads,
                         shape_.tokens));
}

Queries Layer::asked() const {
  return kvlean::queries(
      tensor(queries(), shape_.dtype, shape_.heads * group_size, shape_.queries));
}

void Layer::restore(std::size_t copy) {
  keys_[copy].copy_from(pristine_keys_);
  if (!values_.empty()) values_[copy].copy_from(pristine_values_);
}

namespace {

PlanShape plan_shape(u32 tokens, u32 workers) {
  PlanShape shape;
  shape.num_kv_heads = kv_heads;
  shape.num_query_heads = query_heads;
  shape.tokens = tokens;
  shape.key_dim = dim;
  shape.workers = workers;
  return shape;
}

}  // namespace

Room::Room(u32 tokens, u32 workers) : Room(plan_bytes_required(plan_shape(tokens, workers))) {}

ScoreArrays::ScoreArrays(u32 heads, u32 tokens)
    : rank_(std::size_t{heads} * tokens * sizeof(float)),
      mass_(std::size_t{heads} * tokens * sizeof(float)),
      observers_(std::size_t{heads} * tokens * sizeof(u32)),
      lengths_(heads, tokens) {
  scores_.segments = heads;
  scores_.lengths = lengths_.data();
  scores_.rank = Ragged<float>(rank(), u64{tokens});
  scores_.mass = Ragged<float>(mass(), u64{tokens});
  scores_.observers = Ragged<u32>(observers_.as<u32>(), u64{tokens});
}

void fill_mass(float* mass, u32 heads, u32 tokens, u64 seed) {
  Draws draws(seed);
  for (u32 h = 0; h < heads; ++h) {
    const float spread = 0.8f + 0.2f * static_cast<float>(h);
    for (u32 t = 0; t < tokens; ++t) {
      mass[std::size_t{h} * tokens + t] = std::exp(spread * draws.normal());
    }
  }
}

PlanOptions options_with(const Executor& executor) {
  PlanOptions options;
  options.executor = executor;
  return options;
}

std::string isa_name(simd::Target target) {
  return simd::name(target == simd::Target::best ? simd::best() : target);
}

simd::Target scoring_target(DType dtype) {
  if (dtype == DType::bf16) {
    if (const auto matrix = matrix_target()) return *matrix;
  }
  return vector_target();
}

}  // namespace kvlean::ratio
