// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/report.hpp"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace kvlean::ratio {

namespace {

std::string number(double value, const char* format) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

// Small ratios need more places: a share of a percent is a claim too.
std::string ratio_text(double value) {
  return number(value, value != 0.0 && std::abs(value) < 0.1 ? "%.4f" : "%.3f");
}

std::string bound_text(const TargetRow& row, double bound) {
  if (!std::isfinite(bound)) return "-";
  return (row.better == Better::lower ? "<= " : ">= ") + number(bound, "%g");
}

nlohmann::json or_null(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

std::string hexadecimal(u64 value) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void print_heading() {
  std::printf("%-22s %2s %9s %19s %9s %9s %6s %10s %10s %7s %7s  %s\n", "row", "T", "ratio",
              "quartiles", "must", "aim", "holds", "ms", "ref. ms", "GB/s", "rounds",
              "isa, type, layout");
}

void print_record(const Record& record) {
  const TargetRow& row = *record.row;
  const char* holds = !record.holds ? "null" : *record.holds ? "yes" : "NO";
  const std::string spread = ratio_text(record.ratio.q1) + " - " + ratio_text(record.ratio.q3);
  const bool measured = record.rounds != 0;
  std::string rest = record.label.isa;
  if (!record.label.dtype.empty()) rest += ", " + record.label.dtype + ", " + record.label.layout;
  if (record.noisy) rest += ", others computed";
  if (!record.reason.empty()) rest += (rest.empty() ? "" : ": ") + record.reason;
  std::printf("%-22s %2u %9s %19s %9s %9s %6s %10s %10s %7s %7u  %s\n", row.name, record.threads,
              ratio_text(record.ratio.median).c_str(), measured ? spread.c_str() : "-",
              bound_text(row, record.must).c_str(), bound_text(row, row.aim).c_str(), holds,
              measured ? number(1e3 * record.kernel.median, "%.4g").c_str() : "-",
              measured ? number(1e3 * record.reference.median, "%.4g").c_str() : "-",
              measured ? number(1e-9 * record.bytes / record.kernel.median, "%.1f").c_str() : "-",
              record.rounds, rest.c_str());
  std::fflush(stdout);
}

void write_json(const std::string& path, const std::vector<Record>& records,
                const MachineText& machine) {
  nlohmann::json all = nlohmann::json::array();
  for (const Record& record : records) {
    const TargetRow& row = *record.row;
    nlohmann::json entry;
    entry["name"] = row.name;
    entry["claim"] = row.claim;
    entry["kernel"] = row.kernel;
    entry["reference"] = row.reference;
    entry["better"] = row.better == Better::lower ? "lower" : "higher";
    entry["threads"] = record.threads;
    const bool exact = (row.needs & is_exact) != 0;
    const bool measured = record.rounds != 0 || (exact && record.holds);
    entry["ratio_median"] = measured ? or_null(record.ratio.median) : nullptr;
    entry["ratio_q1"] = measured ? or_null(record.ratio.q1) : nullptr;
    entry["ratio_q3"] = measured ? or_null(record.ratio.q3) : nullptr;
    entry["must"] = or_null(record.must);
    entry["aim"] = or_null(row.aim);
    entry["holds"] = record.holds ? nlohmann::json(*record.holds) : nlohmann::json(nullptr);
    entry["reason"] = record.reason;
    entry["isa"] = record.label.isa;
    entry["dtype"] = record.label.dtype;
    entry["shape"] = record.label.shape;
    entry["layout"] = record.label.layout;
    entry["rounds"] = record.rounds;
    entry["rounds_dropped"] = record.dropped;
    entry["others_computed"] = record.noisy;
    entry["probe_spread"] = record.probe_spread;
    entry["trusted"] = !record.noisy && record.probe_spread < 1.25;
    for (const bool is_kernel : {true, false}) {
      const Quartiles& times = is_kernel ? record.kernel : record.reference;
      const std::string prefix = is_kernel ? "seconds" : "reference_seconds";
      entry[prefix + "_min"] = times.least;
      entry[prefix + "_p25"] = times.q1;
      entry[prefix + "_median"] = times.median;
    }
    const bool timed = record.rounds != 0;
    entry["bytes"] = record.bytes;
    entry["gb_per_s"] = timed ? or_null(1e-9 * record.bytes / record.kernel.median) : nullptr;
    entry["flops"] = record.flops;
    entry["gflop_per_s"] = timed ? or_null(1e-9 * record.flops / record.kernel.median) : nullptr;
    entry["error"] = or_null(record.error);
    entry["error_bound"] = or_null(record.error_bound);
    entry["allocations"] = record.allocations;
    entry["scratch_bytes"] = record.scratch_bytes;
    entry["digest"] = hexadecimal(record.digest);
    entry["quick"] = machine.quick;
    entry["cpu"] = machine.cpu;
    entry["openblas"] = machine.blas;
    entry["torch"] = machine.torch;
    all.push_back(std::move(entry));
  }
  std::ofstream file(path);
  file << all.dump(1) << "\n";
  file.close();
  if (!file) throw std::runtime_error(path + ": cannot write");
}

void print_whole_model(const std::vector<Record>& records) {
  constexpr double layers = 32.0;
  constexpr double batch = 8.0;
  constexpr double layer_bytes = 131072.0 * 8 * 128 * 2 * 2;
  for (const Record& record : records) {
    if (std::string(record.row->name) != "growth_128k" || record.rounds == 0) continue;
    const double seconds_a_byte = record.kernel.median / record.bytes;
    const double bytes = layers * batch * layer_bytes;
    std::printf(
        "\n32 layers x 128k tokens x batch 8, %u thread%s: %.1f GiB of K and V, %.3f ns a KiB "
        "measured at 128k:\n  %.1f s to score, select, compact and turn all of it once, %.2f s a "
        "sequence; %.1f GiB stay.\n",
        record.threads, record.threads == 1 ? "" : "s", bytes / 1073741824.0,
        1e9 * 1024.0 * seconds_a_byte, bytes * seconds_a_byte, bytes * seconds_a_byte / batch,
        0.25 * bytes / 1073741824.0);
  }
}

}  // namespace kvlean::ratio
