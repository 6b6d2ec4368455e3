// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Paired timing. Every round runs each variant once, in shuffled order, so that what the machine
// does to one it does to all; only ratios within a round are kept.
#pragma once

#include <functional>
#include <kvlean/status.hpp>
#include <span>
#include <string>
#include <vector>

namespace kvlean::ratio {

/// One thing to time.
struct Variant {
  std::string name;
  /// Does it `repeats` times on copy `copy` of the data, below `copies`.
  std::function<Status(std::size_t copy)> run;
  /// Puts the copy back as it was; not timed. May be empty.
  std::function<void(std::size_t copy)> restore = {};
  std::size_t copies = 1;  ///< together larger than the caches, unless a warm case is wanted
  u32 repeats = 1;
  double bytes = 0.0;  ///< least traffic of one run
  double flops = 0.0;
  /// Seconds of a run that another process does; then `run` is not called.
  std::function<double()> elsewhere = {};
};

struct Limits {
  u32 rounds = 30;            ///< enough rounds
  double seconds = 10.0;      ///< or enough time
  u32 least_rounds = 5;       ///< even when time is up
  double most_others = 0.04;  ///< share of the processors' time
  /// Processor time of the calling thread instead of time: with one thread it is the same, but for
  /// what others take of the processor.
  bool thread_time = false;
  int child = 0;  ///< a process whose time is ours
};

struct Samples {
  std::vector<std::vector<double>> seconds;  ///< [variant][round], of one repeat
  std::vector<u64> allocations;              ///< [variant], in all timed runs
  u32 dropped = 0;                           ///< rounds while others computed
  bool noisy = false;         ///< too few quiet rounds in one and a half times the time: all kept
  double probe_spread = 1.0;  ///< 90th by 10th percentile of the probe
};

/// Throws std::runtime_error when a variant fails.
[[nodiscard]] Samples measure(std::span<const Variant> variants, const Limits& limits);

struct Quartiles {
  double q1 = 0.0;
  double median = 0.0;
  double q3 = 0.0;
  double least = 0.0;
};

[[nodiscard]] Quartiles quartiles(std::vector<double> values);
/// Quartiles of a / b, round by round.
[[nodiscard]] Quartiles ratio_quartiles(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace kvlean::ratio
