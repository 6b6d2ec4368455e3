// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/oracle.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace kvlean::ratio {

namespace {

std::vector<double> row_of(const Rows& rows, u32 head, u32 token) {
  float row[dim];
  load_row(rows, head, token, row);
  return {row, row + dim};
}

double dot(const double* a, const double* b) {
  double sum[4] = {};
  for (u32 i = 0; i < dim; i += 4) {
    for (u32 j = 0; j < 4; ++j) sum[j] += a[i + j] * b[i + j];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

std::vector<double> attention_mass(const Layer& layer, u32 head) {
  const LayerShape& shape = layer.shape();
  const u32 n = shape.tokens;
  const CacheView cache = layer.cache(0).view();
  const Queries asked = layer.asked();
  std::vector<double> keys;
  keys.reserve(std::size_t{n} * dim);
  for (u32 t = 0; t < n; ++t) {
    const std::vector<double> row = row_of(cache.keys, head, t);
    keys.insert(keys.end(), row.begin(), row.end());
  }
  std::vector<double> mass(n, 0.0);
  std::vector<double> logits(n);
  for (u32 g = 0; g < group_size; ++g) {
    for (u32 i = 0; i < shape.queries; ++i) {
      const std::vector<double> q = row_of(asked.rows, head * group_size + g, i);
      const u32 seen = n - shape.queries + i + 1;
      double largest = -1e300;
      for (u32 t = 0; t < seen; ++t) {
        logits[t] = dot(q.data(), keys.data() + std::size_t{t} * dim) / std::sqrt(double{dim});
        largest = std::max(largest, logits[t]);
      }
      double sum = 0.0;
      for (u32 t = 0; t < seen; ++t) sum += logits[t] = std::exp(logits[t] - largest);
      for (u32 t = 0; t < seen; ++t) mass[t] += logits[t] / sum / group_size;
    }
  }
  return mass;
}

std::vector<double> attention_output(const CacheView& cache, u32 segment,
                                     std::span<const float> query, const float* bias) {
  const u32 n = cache.length(segment);
  const std::vector<double> q(query.begin(), query.end());
  std::vector<double> logits(n);
  for (u32 t = 0; t < n; ++t) {
    const std::vector<double> key = row_of(cache.keys, segment, t);
    logits[t] = dot(q.data(), key.data()) / std::sqrt(double{dim});
    if (bias != nullptr) logits[t] += static_cast<double>(bias[t]);
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (double& x : logits) sum += x = std::exp(x - largest);
  std::vector<double> output(dim, 0.0);
  for (u32 t = 0; t < n; ++t) {
    const std::vector<double> value = row_of(cache.values, segment, t);
    for (u32 i = 0; i < dim; ++i) output[i] += logits[t] / sum * value[i];
  }
  return output;
}

double relative_error(std::span<const float> got, std::span<const double> want) {
  const double mean =
      std::accumulate(want.begin(), want.end(), 0.0) / static_cast<double>(want.size());
  double worst = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - want[i]);
    worst = std::max(worst, error / std::max(want[i], 0.01 * mean));
    if (!std::isfinite(got[i])) return HUGE_VAL;
  }
  return worst;
}

double scaled_error(std::span<const float> got, std::span<const double> want) {
  double worst = 0.0;
  double largest = 1e-30;
  for (std::size_t i = 0; i < want.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - want[i]));
    largest = std::max(largest, std::abs(want[i]));
    if (!std::isfinite(got[i])) return HUGE_VAL;
  }
  return worst / largest;
}

namespace {

// Turns neighbouring halves (i, i + dim / 2) by `shift` positions.
void turn(std::vector<double>& row, const RopeSpec& rope, double shift) {
  for (u32 i = 0; i < dim / 2; ++i) {
    const double angle = shift * std::pow(rope.theta, -2.0 * i / dim);
    const double x = row[i];
    const double y = row[i + dim / 2];
    row[i] = x * std::cos(angle) - y * std::sin(angle);
    row[i + dim / 2] = x * std::sin(angle) + y * std::cos(angle);
  }
}

}  // namespace

double plan_error(const CompressionPlan& plan, const CacheView& before, const CacheView& after,
                  const RopeSpec* rope) {
  double worst = 0.0;
  for (u32 s = 0; s < plan.segments; ++s) {
    if (after.length(s) != plan.length[s]) return HUGE_VAL;
    for (u32 j = 0; j < plan.length[s]; ++j) {
      const u64 slot = plan.first[s] + j;
      for (const bool is_key : {true, false}) {
        const Rows& from = is_key ? before.keys : before.values;
        const bool blends = !is_key || (plan.needs & needs_moved_keys) != 0;
        std::vector<double> want = row_of(from, s, plan.anchor[slot]);
        if (blends) {
          const float self = is_key ? plan.key_self_weight(slot) : plan.value_self_weight(slot);
          for (double& x : want) x *= static_cast<double>(self);
        }
        for (u64 term = plan.has_terms() && blends ? plan.term_begin[slot] : 0;
             plan.has_terms() && blends && term < plan.term_end[slot]; ++term) {
          const float weight = is_key ? plan.term_weight[term] : plan.value_term_weight(term);
          const std::vector<double> row = row_of(from, s, plan.term_token[term]);
          for (u32 i = 0; i < dim; ++i) want[i] += static_cast<double>(weight) * row[i];
        }
        if (is_key && rope != nullptr && plan.position != nullptr) {
          turn(want, *rope,
               static_cast<double>(plan.position[slot]) -
                   static_cast<double>(before.position(s, plan.anchor[slot])));
        }
        float got[dim];
        load_row(is_key ? after.keys : after.values, s, j, got);
        worst = std::max(worst, scaled_error(got, want));
      }
    }
  }
  return worst;
}

}  // namespace kvlean::ratio
