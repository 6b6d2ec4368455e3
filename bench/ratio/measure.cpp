// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/measure.hpp"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "bench/ratio/allocations.hpp"
#include "bench/ratio/buffer.hpp"
#include "bench/ratio/machine.hpp"

namespace kvlean::ratio {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_of_thread() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The system counts processor time in ticks of 10 ms, so a share is asked for over many of them.
constexpr double window_seconds = 0.3;

double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const std::size_t below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

class Runner {
 public:
  Runner(std::span<const Variant> variants, bool thread_time)
      : variants_(variants),
        thread_time_(thread_time),
        turn_(variants.size(), 0),
        allocations(variants.size(), 0) {}

  double run(std::size_t index) {
    const Variant& variant = variants_[index];
    if (variant.elsewhere) {
      const double seconds = variant.elsewhere();
      // Threads of the other process may spin a little before they sleep.
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      return seconds;
    }
    const std::size_t copy = turn_[index]++ % variant.copies;
    const u64 before = allocations_so_far();
    const auto start = Clock::now();
    const double thread_start = thread_time_ ? seconds_of_thread() : 0.0;
    const Status status = variant.run(copy);
    const double seconds = thread_time_ ? seconds_of_thread() - thread_start : seconds_since(start);
    allocations[index] += allocations_so_far() - before;
    if (variant.restore) variant.restore(copy);
    if (!status) throw std::runtime_error(variant.name + ": " + status.message());
    return seconds / variant.repeats;
  }

 private:
  std::span<const Variant> variants_;
  bool thread_time_;
  std::vector<std::size_t> turn_;

 public:
  std::vector<u64> allocations;
};

}  // namespace

Samples measure(std::span<const Variant> variants, const Limits& limits) {
  const std::size_t count = variants.size();
  Runner runner(variants, limits.thread_time);
  for (std::size_t v = 0; v < count; ++v) {
    for (int warm = 0; warm < (variants[v].elsewhere ? 1 : 2); ++warm) {
      static_cast<void>(runner.run(v));
    }
  }
  std::fill(runner.allocations.begin(), runner.allocations.end(), u64{0});

  std::vector<std::vector<double>> rounds;  // [round][variant]
  std::vector<bool> quiet;                  // [round]
  std::vector<double> probes;
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  Draws draws(7);
  std::size_t good = 0;
  const auto start = Clock::now();
  OthersClock others(limits.child);
  auto window = Clock::now();
  std::size_t judged = 0;
  while (true) {
    for (std::size_t i = count; i > 1; --i) std::swap(order[i - 1], order[draws.next() % i]);
    rounds.emplace_back(count);
    for (const std::size_t v : order) rounds.back()[v] = runner.run(v);
    probes.push_back(probe());
    const double elapsed = seconds_since(start);
    // Without a verdict at the end of a short measurement, the last window is judged as it is.
    const bool last = rounds.size() >= limits.rounds || elapsed >= limits.seconds;
    if (seconds_since(window) >= window_seconds || (last && judged < rounds.size())) {
      const bool calm = others.share() <= limits.most_others;
      quiet.resize(rounds.size(), calm);
      if (calm) good += rounds.size() - judged;
      judged = rounds.size();
      others.restart();
      window = Clock::now();
    }
    const bool enough = good >= limits.rounds || elapsed >= limits.seconds;
    if (enough && good >= limits.least_rounds) break;
    if (elapsed >= 1.5 * limits.seconds && rounds.size() >= limits.least_rounds) break;
  }
  quiet.resize(rounds.size(), false);

  Samples samples;
  samples.noisy = good < limits.least_rounds;
  samples.seconds.resize(count);
  for (std::size_t r = 0; r < rounds.size(); ++r) {
    if (!samples.noisy && !quiet[r]) {
      ++samples.dropped;
      continue;
    }
    for (std::size_t v = 0; v < count; ++v) samples.seconds[v].push_back(rounds[r][v]);
  }
  samples.allocations = runner.allocations;
  std::sort(probes.begin(), probes.end());
  samples.probe_spread = percentile(probes, 0.9) / percentile(probes, 0.1);
  return samples;
}

Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  if (values.empty()) return {};
  return {percentile(values, 0.25), percentile(values, 0.5), percentile(values, 0.75), values[0]};
}

Quartiles ratio_quartiles(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios(a.size());
  std::transform(a.begin(), a.end(), b.begin(), ratios.begin(), std::divides<>());
  return quartiles(ratios);
}

}  // namespace kvlean::ratio
