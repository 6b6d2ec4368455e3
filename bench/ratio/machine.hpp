// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// What the program must know of the machine: processors, caches, and who else computes.
#pragma once

#include <cstddef>
#include <kvlean/simd/target.hpp>
#include <optional>
#include <string>
#include <vector>

namespace kvlean::ratio {

/// Model name of the processor, or "unknown".
[[nodiscard]] std::string cpu_name();
/// Bytes of the largest cache; 32 MiB where the system doesn't tell.
[[nodiscard]] std::size_t last_level_bytes();
/// Processors that this process may use, ascending. Empty: the system doesn't tell.
[[nodiscard]] std::vector<int> allowed_cpus();
/// Binds a thread (0: the calling one) to some processors; false where that is not possible.
bool bind_thread(int thread, const std::vector<int>& cpus);
/// The thread ids of this process.
[[nodiscard]] std::vector<int> thread_ids();

/// The widest target without a matrix unit; scalar if there is none.
[[nodiscard]] simd::Target vector_target();
/// The target with a matrix unit, where the library and this processor have one.
[[nodiscard]] std::optional<simd::Target> matrix_target();

/// Processor time that others used: reads the system's counters twice.
class OthersClock {
 public:
  /// `child` is a process that works for this program, 0: none.
  explicit OthersClock(int child) : child_(child) { restart(); }
  void restart();
  /// Share of all processors' time since restart() that neither this process nor the child used;
  /// 0 where the system doesn't tell.
  [[nodiscard]] double share() const;

 private:
  struct Reading {
    double busy = 0.0;   ///< seconds, all processors
    double total = 0.0;  ///< the same, idle time included
    double own = 0.0;
    bool valid = false;
  };
  [[nodiscard]] Reading read() const;

  int child_;
  Reading start_;
};

/// A fixed piece of arithmetic of about a millisecond; its seconds tell how steady the clock is.
[[nodiscard]] double probe();

}  // namespace kvlean::ratio
