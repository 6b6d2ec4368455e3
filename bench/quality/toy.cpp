// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/quality/toy.hpp"

#include <cmath>
#include <numbers>

#include "kvlean/core/dtype.hpp"
#include "kvlean/core/random.hpp"

namespace kvlean::bench {
namespace {

constexpr double rope_theta = 10000.0;
constexpr std::size_t num_sinks = 4;

/// Seeded draws that depend on their place only.
class Noise {
 public:
  Noise(u64 seed, std::size_t layer, std::size_t head) noexcept
      : seed_(seed), layer_(static_cast<u32>(layer)), head_(static_cast<u32>(head)) {}

  [[nodiscard]] double uniform(u32 kind, std::size_t i) const noexcept {
    return static_cast<double>(draw(seed_, layer_, head_, static_cast<i32>(i), kind));
  }
  [[nodiscard]] double normal(u32 kind, std::size_t i) const noexcept {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(2 * kind, i)));
    return radius * std::cos(2.0 * std::numbers::pi * uniform(2 * kind + 1, i));
  }

 private:
  u64 seed_;
  u32 layer_;
  u32 head_;
};

enum Kind : u32 { topic = 1, own, value, sink_axis, hitter_axis, is_hitter, mix, query };

/// Rotates a row to its position, pairs (i, i + dim / 2).
void rotate(std::vector<double>& row, std::size_t position) {
  const std::size_t half = row.size() / 2;
  for (std::size_t i = 0; i < half; ++i) {
    const double frequency =
        std::pow(rope_theta, -static_cast<double>(i) / static_cast<double>(half));
    const double angle = static_cast<double>(position) * frequency;
    const double a = row[i];
    const double b = row[i + half];
    row[i] = a * std::cos(angle) - b * std::sin(angle);
    row[i + half] = a * std::sin(angle) + b * std::cos(angle);
  }
}

io::Tensor make_tensor(std::size_t heads, std::size_t tokens, std::size_t dim) {
  return {io::DType::f16, {heads, tokens, dim}, std::vector<std::byte>(heads * tokens * dim * 2)};
}

void store(io::Tensor& tensor, std::size_t head, std::size_t token,
           const std::vector<double>& row) {
  std::byte* to = tensor.bytes.data() + (head * tensor.shape[1] + token) * row.size() * 2;
  for (std::size_t i = 0; i < row.size(); ++i) {
    store_element(to + 2 * i, DType::f16, static_cast<float>(row[i]));
  }
}

/// Directions that turn so slowly under rotation that they mean the same at every distance: the
/// upper quarter of the pairs.
std::vector<double> steady_axis(const Noise& noise, Kind kind, std::size_t dim) {
  std::vector<double> axis(dim, 0.0);
  const std::size_t half = dim / 2;
  double norm = 0.0;
  for (std::size_t i = 3 * half / 4; i < half; ++i) {
    for (const std::size_t place : {i, i + half}) {
      axis[place] = noise.normal(kind, place);
      norm += axis[place] * axis[place];
    }
  }
  for (double& x : axis) x /= std::sqrt(norm);
  return axis;
}

void fill_head(const ToyShape& shape, u64 seed, std::size_t l, std::size_t h,
               io::CaptureLayer& layer) {
  const std::size_t tokens = shape.context + shape.future;
  const std::size_t dim = shape.dim;
  const Noise noise(seed, l, h);
  const std::vector<double> sink = steady_axis(noise, sink_axis, dim);
  const std::vector<double> hitter = steady_axis(noise, hitter_axis, dim);
  // What this head cares for, in units of logits.
  const double cares_for_sinks = 3.0 + 5.0 * noise.uniform(mix, 0);
  const double cares_for_hitters = 1.0 + 6.0 * noise.uniform(mix, 1);
  const double cares_for_neighbours = 1.0 + 5.0 * noise.uniform(mix, 2);
  const double cares_for_topic = 1.0 + 4.0 * noise.uniform(mix, 3);
  const double persistence = 0.90 + 0.09 * noise.uniform(mix, 4);
  const double root = std::sqrt(std::sqrt(static_cast<double>(dim)));  // logit = q.k / sqrt(dim)
  const double per_dim = std::sqrt(static_cast<double>(dim));

  std::vector<double> drift(dim, 0.0);
  std::vector<double> meaning(dim, 0.0);
  const std::size_t group = shape.query_heads / shape.kv_heads;
  for (std::size_t t = 0; t < tokens; ++t) {
    const double keep = t == 0 ? 0.0 : persistence;
    const double fresh = std::sqrt(1.0 - keep * keep);
    const bool heavy = t >= num_sinks && noise.uniform(2 * is_hitter, t) < 0.04;
    std::vector<double> k(dim);
    std::vector<double> v(dim);
    for (std::size_t i = 0; i < dim; ++i) {
      const std::size_t at = t * dim + i;
      drift[i] = keep * drift[i] + fresh * noise.normal(topic, at);
      meaning[i] = keep * meaning[i] + fresh * noise.normal(value, at);
      // A constant part in the fast pairs makes rotated keys fall off with distance.
      const bool fast = i % (dim / 2) < dim / 4;
      const double near =
          fast ? std::sqrt(cares_for_neighbours * 2.0 / static_cast<double>(dim)) : 0.0;
      k[i] = root * (near + 0.8 * drift[i] / std::sqrt(per_dim) +
                     0.4 * noise.normal(own, at) / std::sqrt(per_dim));
      if (t < num_sinks) k[i] = root * std::sqrt(cares_for_sinks) * sink[i];
      if (heavy) k[i] += root * std::sqrt(cares_for_hitters) * hitter[i];
      const double detail = noise.normal(own, (tokens + t) * dim + i);
      v[i] = t < num_sinks ? 0.05 * detail : 0.8 * meaning[i] + 0.6 * detail;
    }
    rotate(k, t);
    store(layer.k, h, t, k);
    store(layer.v, h, t, v);
    for (std::size_t g = 0; g < group; ++g) {
      const Noise own_noise(seed, l, shape.kv_heads + h * group + g);
      const double accent = 0.7 + 0.6 * own_noise.uniform(mix, 0);
      std::vector<double> q(dim);
      for (std::size_t i = 0; i < dim; ++i) {
        const bool fast = i % (dim / 2) < dim / 4;
        const double near =
            fast ? std::sqrt(cares_for_neighbours * 2.0 / static_cast<double>(dim)) : 0.0;
        q[i] = root * (near + cares_for_topic * 0.35 * drift[i] / std::sqrt(per_dim) +
                       0.5 * own_noise.normal(query, t * dim + i) / std::sqrt(per_dim) +
                       std::sqrt(cares_for_sinks) * sink[i] +
                       accent * std::sqrt(cares_for_hitters) * hitter[i]);
      }
      rotate(q, t);
      store(layer.q, h * group + g, t, q);
    }
  }
}

}  // namespace

io::Capture make_toy_capture(const ToyShape& shape, u64 seed) {
  io::Capture capture;
  capture.model = "toy tensors, seed " + std::to_string(seed);
  capture.licence = "none: made by the benchmark";
  capture.text = "none: drifting topics, sinks, heavy hitters, rotary position embedding";
  capture.rope_theta = rope_theta;
  capture.rope_pairing = io::RopePairing::neox;
  capture.context_tokens = shape.context;
  capture.num_layers = shape.layers;
  const std::size_t tokens = shape.context + shape.future;
  for (std::size_t l = 0; l < shape.layers; ++l) {
    io::CaptureLayer layer;
    layer.index = l;
    layer.q = make_tensor(shape.query_heads, tokens, shape.dim);
    layer.k = make_tensor(shape.kv_heads, tokens, shape.dim);
    layer.v = make_tensor(shape.kv_heads, tokens, shape.dim);
    for (std::size_t h = 0; h < shape.kv_heads; ++h) fill_head(shape, seed, l, h, layer);
    capture.layers.push_back(std::move(layer));
  }
  return capture;
}

}  // namespace kvlean::bench
