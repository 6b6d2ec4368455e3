// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

// Intervals by resampling documents. Tokens of one document are not independent, so the document is
// what is drawn: a cluster bootstrap (Efron and Tibshirani, 1993, chapters 8 and 13).

namespace kvlean::eval {

/// What one document contributes to a mean: a sum over its tokens (or items) and their number.
struct Cluster {
  double sum = 0.0;
  double weight = 1.0;
};

struct Interval {
  double mean = 0.0;
  double low = 0.0;
  double high = 0.0;
};

struct BootstrapOptions {
  std::size_t resamples = 2000;
  std::uint64_t seed = 42;
  double confidence = 0.95;
};

/// The mean, sum of sums / sum of weights, with a percentile interval over resampled documents.
/// With one document the interval is the mean itself; without any, all is NaN. Deterministic in
/// the seed. O(resamples * documents).
[[nodiscard]] Interval bootstrap_mean(std::span<const Cluster> documents,
                                      const BootstrapOptions& options = {});

/// The difference of two settings' means, a - b, on the same documents in the same order: both are
/// resampled together. NaN if the lists differ in length.
[[nodiscard]] Interval bootstrap_difference(std::span<const Cluster> a, std::span<const Cluster> b,
                                            const BootstrapOptions& options = {});

}  // namespace kvlean::eval
