// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
// Records of target rows: a line on the screen each, and JSON.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bench/ratio/rows.hpp"

namespace kvlean::ratio {

struct Record {
  const TargetRow* row = nullptr;
  u32 threads = 1;
  double must = none;  ///< as judged: the quick form's is loosened
  std::optional<bool> holds;
  std::string reason;  ///< why `holds` is empty, or why a check failed
  Quartiles ratio;
  Label label;
  u32 rounds = 0;
  u32 dropped = 0;
  bool noisy = false;
  double probe_spread = 1.0;
  Quartiles kernel;     ///< seconds
  Quartiles reference;  ///< seconds
  double bytes = 0.0;
  double flops = 0.0;
  double error = none;
  double error_bound = none;
  u64 allocations = 0;
  std::size_t scratch_bytes = 0;
  u64 digest = 0;
};

struct MachineText {
  std::string cpu;
  std::string blas;
  std::string torch;
  bool quick = false;
};

/// Heading and one line a record.
void print_heading();
void print_record(const Record& record);
/// Writes an array of flat objects. Throws std::runtime_error with one line.
void write_json(const std::string& path, const std::vector<Record>& records,
                const MachineText& machine);
/// The plan for a whole model from the measured seconds a byte; prints nothing without them.
void print_whole_model(const std::vector<Record>& records);

}  // namespace kvlean::ratio
