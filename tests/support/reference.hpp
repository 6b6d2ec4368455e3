// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

// Attention written down once more, in double and with nothing clever, and without the library:
// what its results are compared with.

namespace kvlean_test {

/// How a reference head attends. Positions may be empty: then key t is at position t and query i is
/// at position (keys - queries + i), the newest ones.
struct ReferenceOptions {
  double scale = 0.0;    ///< 0: 1 / sqrt(width)
  double softcap = 0.0;  ///< 0: none
  long window = 0;       ///< a query sees positions > its own - window; 0: all
  bool causal = true;
  bool has_sink = false;
  double sink = 0.0;
  std::vector<double> log_mass = {};      ///< [keys] or empty
  std::vector<long> key_position = {};    ///< [keys] or empty
  std::vector<long> query_position = {};  ///< [queries] or empty
};

/// Softmax rows and their log-sum-exp.
struct ReferenceAttention {
  std::size_t keys = 0;
  std::vector<double> probability;  ///< [query][key], zero where masked
  std::vector<double> lse;          ///< [query], sink included; -inf if nothing is seen
  double p(std::size_t query, std::size_t key) const { return probability[query * keys + key]; }
};

/// Attention probabilities of one head: `q` [queries][width], `k` [keys][width].
inline ReferenceAttention reference_attention(const double* q, std::size_t queries, const double* k,
                                              std::size_t keys, std::size_t width,
                                              const ReferenceOptions& options = {}) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  const double scale =
      options.scale != 0.0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(width));
  ReferenceAttention result;
  result.keys = keys;
  result.probability.assign(queries * keys, 0.0);
  result.lse.assign(queries, -inf);
  for (std::size_t i = 0; i < queries; ++i) {
    const long own =
        options.query_position.empty()
            ? static_cast<long>(keys) - static_cast<long>(queries) + static_cast<long>(i)
            : options.query_position[i];
    std::vector<double> logit(keys, -inf);
    double largest = options.has_sink ? options.sink : -inf;
    for (std::size_t t = 0; t < keys; ++t) {
      const long at = options.key_position.empty() ? static_cast<long>(t) : options.key_position[t];
      if (options.causal && at > own) continue;
      if (options.window > 0 && at <= own - options.window) continue;
      double x = 0.0;
      for (std::size_t d = 0; d < width; ++d) x += q[i * width + d] * k[t * width + d];
      x *= scale;
      if (options.softcap > 0.0) x = options.softcap * std::tanh(x / options.softcap);
      if (!options.log_mass.empty()) x += options.log_mass[t];
      logit[t] = x;
      largest = std::max(largest, x);
    }
    if (largest == -inf) continue;
    double sum = options.has_sink ? std::exp(options.sink - largest) : 0.0;
    for (std::size_t t = 0; t < keys; ++t) sum += std::exp(logit[t] - largest);
    for (std::size_t t = 0; t < keys; ++t) {
      result.probability[i * keys + t] = std::exp(logit[t] - largest) / sum;
    }
    result.lse[i] = largest + std::log(sum);
  }
  return result;
}

}  // namespace kvlean_test
