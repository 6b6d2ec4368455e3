// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/statistics.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "bench/eval/metrics.hpp"
#include "bench/eval/random.hpp"

namespace kvlean::eval {
namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// The interval of statistic(draw), where draw(i) is the i-th of a resample's documents.
template <class Statistic>
Interval bootstrap(std::size_t documents, const BootstrapOptions& options,
                   const Statistic& statistic) {
  Interval result{not_a_number, not_a_number, not_a_number};
  if (documents == 0) return result;
  std::vector<std::size_t> chosen(documents);
  for (std::size_t i = 0; i < documents; ++i) chosen[i] = i;
  result.mean = statistic(chosen);
  result.low = result.mean;
  result.high = result.mean;
  if (documents == 1) return result;
  Draws draws(options.seed, "bootstrap");
  std::vector<double> values;
  values.reserve(options.resamples);
  for (std::size_t r = 0; r < options.resamples; ++r) {
    for (std::size_t& index : chosen) index = draws.below(documents);
    const double value = statistic(chosen);
    if (value == value) values.push_back(value);
  }
  if (values.empty()) return result;
  std::sort(values.begin(), values.end());
  const double tail = 0.5 * (1.0 - options.confidence);
  result.low = quantile_sorted(values, tail);
  result.high = quantile_sorted(values, 1.0 - tail);
  return result;
}

double mean_of(std::span<const Cluster> documents, std::span<const std::size_t> chosen) {
  double sum = 0.0;
  double weight = 0.0;
  for (const std::size_t index : chosen) {
    sum += documents[index].sum;
    weight += documents[index].weight;
  }
  return weight > 0.0 ? sum / weight : not_a_number;
}

}  // namespace

Interval bootstrap_mean(std::span<const Cluster> documents, const BootstrapOptions& options) {
  return bootstrap(documents.size(), options,
                   [&](std::span<const std::size_t> chosen) { return mean_of(documents, chosen); });
}

Interval bootstrap_difference(std::span<const Cluster> a, std::span<const Cluster> b,
                              const BootstrapOptions& options) {
  if (a.size() != b.size()) return {not_a_number, not_a_number, not_a_number};
  return bootstrap(a.size(), options, [&](std::span<const std::size_t> chosen) {
    return mean_of(a, chosen) - mean_of(b, chosen);
  });
}

}  // namespace kvlean::eval
