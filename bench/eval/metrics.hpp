// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

// What is measured on one token, one document or one task. Everything in double precision, in nats.

namespace kvlean::eval {

/// log(sum of exp) of a row of logits. O(n).
[[nodiscard]] double log_sum_exp(std::span<const float> logits);

/// The largest logit's index; the first of equal ones. 0 for an empty row.
[[nodiscard]] std::size_t argmax(std::span<const float> logits);

/// Negative log-likelihood of one token, in nats.
[[nodiscard]] double token_nll(std::span<const float> logits, std::size_t token);

/// KL(full || other) between the distributions of two rows of logits over the same vocabulary, in
/// nats. Not negative: rounding below 0 is cut off. O(n).
[[nodiscard]] double kl_divergence(std::span<const float> full, std::span<const float> other);

/// How many of the `k` most likely tokens two rows have in common, 0 to k. Equal logits go by the
/// smaller index. O(n log k).
[[nodiscard]] std::size_t top_overlap(std::span<const float> full, std::span<const float> other,
                                      std::size_t k = 5);

/// Everything that one position of a continuation gives.
struct TokenComparison {
  double kl = 0.0;
  double nll_full = 0.0;
  double nll = 0.0;
  bool top1_agrees = false;
  std::size_t top5_overlap = 0;
  bool correct_full = false;  ///< the full cache's most likely token is the true one
  bool correct = false;       ///< the other's is
};

/// Compares the rows that predict `token`. Rows must have the same size, above `token`.
[[nodiscard]] TokenComparison compare_logits(std::span<const float> full,
                                             std::span<const float> other, std::size_t token);

/// |other - full| / |full| (Euclidean); 0 if both are zero, infinity if only `full` is.
[[nodiscard]] double relative_error(std::span<const float> full, std::span<const float> other);

/// Mean and quantiles of a sample. Quantiles interpolate between order statistics (the usual
/// definition, "type 7"). All NaN for an empty sample.
struct Distribution {
  std::size_t count = 0;
  double mean = 0.0;
  double median = 0.0;
  double p95 = 0.0;
  double p99 = 0.0;
};
[[nodiscard]] Distribution summarise(std::span<const double> values);

/// The q-quantile of values sorted ascending, 0 <= q <= 1. NaN for an empty sample.
[[nodiscard]] double quantile_sorted(std::span<const double> sorted, double q);

/// The share of the distant context's value that a compressed cache keeps:
/// (nll_recent - nll) / (nll_recent - nll_full), mean NLL a token. `nll_recent` is that of a cache
/// of the same size that holds only sinks and the most recent tokens. 1: all of it; 0: no better
/// than that window; below 0: worse. Empty if the document does not qualify.
[[nodiscard]] std::optional<double> context_benefit_retention(double nll_recent, double nll,
                                                              double nll_full,
                                                              double least_benefit = 0.05);

/// A document qualifies for retention if distant context is worth at least this much, nats a token.
inline constexpr double least_context_benefit = 0.05;

/// P(X >= successes) for X binomial with `trials` and chance `probability`.
[[nodiscard]] double binomial_tail(std::size_t successes, std::size_t trials, double probability);

/// The gate: a generation task counts for a model only if the full cache scores at least this.
inline constexpr double gate_generation_score = 0.8;
/// ... and a forced choice only if it beats guessing with a p-value below this.
inline constexpr double gate_choice_p = 0.001;

[[nodiscard]] bool passes_generation_gate(double mean_score_full);
[[nodiscard]] bool passes_choice_gate(std::size_t correct_full, std::size_t items,
                                      double chance_level);

}  // namespace kvlean::eval
