// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvlean::eval {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// The indices of the `k` largest, the smaller index first among equals.
std::vector<std::size_t> top_indices(std::span<const float> logits, std::size_t k) {
  k = std::min(k, logits.size());
  std::vector<std::size_t> best;
  if (k == 0) return best;
  const auto better = [&](std::size_t a, std::size_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  // `best` is a heap with its worst member in front.
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (best.size() < k) {
      best.push_back(i);
      std::push_heap(best.begin(), best.end(), better);
    } else if (better(i, best.front())) {
      std::pop_heap(best.begin(), best.end(), better);
      best.back() = i;
      std::push_heap(best.begin(), best.end(), better);
    }
  }
  return best;
}

}  // namespace

double log_sum_exp(std::span<const float> logits) {
  if (logits.empty()) return -infinity;
  const double largest = *std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(largest)) return largest;
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

std::size_t argmax(std::span<const float> logits) {
  return static_cast<std::size_t>(
      std::distance(logits.begin(), std::max_element(logits.begin(), logits.end())));
}

double token_nll(std::span<const float> logits, std::size_t token) {
  return log_sum_exp(logits) - static_cast<double>(logits[token]);
}

double kl_divergence(std::span<const float> full, std::span<const float> other) {
  if (full.empty()) return 0.0;
  const double largest = *std::max_element(full.begin(), full.end());
  double sum = 0.0;
  double difference = 0.0;  // sum of exp(full) (full - other)
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double weight = std::exp(static_cast<double>(full[i]) - largest);
    if (weight == 0.0) continue;
    sum += weight;
    difference += weight * (static_cast<double>(full[i]) - static_cast<double>(other[i]));
  }
  const double kl = difference / sum - (largest + std::log(sum)) + log_sum_exp(other);
  return kl < 0.0 ? 0.0 : kl;
}

std::size_t top_overlap(std::span<const float> full, std::span<const float> other, std::size_t k) {
  std::vector<std::size_t> a = top_indices(full, k);
  std::vector<std::size_t> b = top_indices(other, k);
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  std::vector<std::size_t> common;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(common));
  return common.size();
}

TokenComparison compare_logits(std::span<const float> full, std::span<const float> other,
                               std::size_t token) {
  TokenComparison result;
  result.kl = kl_divergence(full, other);
  result.nll_full = token_nll(full, token);
  result.nll = token_nll(other, token);
  const std::size_t best_full = argmax(full);
  const std::size_t best = argmax(other);
  result.top1_agrees = best_full == best;
  result.top5_overlap = top_overlap(full, other, 5);
  result.correct_full = best_full == token;
  result.correct = best == token;
  return result;
}

double relative_error(std::span<const float> full, std::span<const float> other) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double f = static_cast<double>(full[i]);
    const double d = static_cast<double>(other[i]) - f;
    error += d * d;
    norm += f * f;
  }
  if (norm == 0.0) return error == 0.0 ? 0.0 : infinity;
  return std::sqrt(error / norm);
}

double quantile_sorted(std::span<const double> sorted, double q) {
  if (sorted.empty()) return not_a_number;
  const double place = q * static_cast<double>(sorted.size() - 1);
  const std::size_t below = static_cast<std::size_t>(place);
  if (below + 1 >= sorted.size()) return sorted.back();
  const double part = place - static_cast<double>(below);
  if (part == 0.0) return sorted[below];
  return sorted[below] + part * (sorted[below + 1] - sorted[below]);
}

Distribution summarise(std::span<const double> values) {
  Distribution result;
  result.count = values.size();
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  double sum = 0.0;
  for (const double value : sorted) sum += value;
  result.mean = values.empty() ? not_a_number : sum / static_cast<double>(values.size());
  result.median = quantile_sorted(sorted, 0.5);
  result.p95 = quantile_sorted(sorted, 0.95);
  result.p99 = quantile_sorted(sorted, 0.99);
  return result;
}

std::optional<double> context_benefit_retention(double nll_recent, double nll, double nll_full,
                                                double least_benefit) {
  const double benefit = nll_recent - nll_full;
  if (!(benefit >= least_benefit) || !(benefit > 0.0) || !std::isfinite(nll)) return std::nullopt;
  return (nll_recent - nll) / benefit;
}

double binomial_tail(std::size_t successes, std::size_t trials, double probability) {
  if (successes == 0) return 1.0;
  if (successes > trials || probability <= 0.0) return 0.0;
  if (probability >= 1.0) return 1.0;
  const double n = static_cast<double>(trials);
  const double log_p = std::log(probability);
  const double log_q = std::log1p(-probability);
  double sum = 0.0;
  for (std::size_t k = trials + 1; k-- > successes;) {  // the smallest terms first
    const double x = static_cast<double>(k);
    sum += std::exp(std::lgamma(n + 1.0) - std::lgamma(x + 1.0) - std::lgamma(n - x + 1.0) +
                    x * log_p + (n - x) * log_q);
  }
  return std::min(sum, 1.0);
}

bool passes_generation_gate(double mean_score_full) {
  return mean_score_full >= gate_generation_score;
}

bool passes_choice_gate(std::size_t correct_full, std::size_t items, double chance_level) {
  return binomial_tail(correct_full, items, chance_level) < gate_choice_p;
}

}  // namespace kvlean::eval
