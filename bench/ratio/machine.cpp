// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/ratio/machine.hpp"

#include <dirent.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace kvlean::ratio {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(std::min(colon + 2, line.size()));
    }
  }
  return "unknown";
}

std::size_t last_level_bytes() {
  std::size_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                       "/size");
    std::size_t size = 0;
    char unit = 'B';
    if (!(file >> size)) continue;
    file >> unit;
    if (unit == 'K') size <<= 10;
    if (unit == 'M') size <<= 20;
    largest = std::max(largest, size);
  }
  return largest != 0 ? largest : std::size_t{32} << 20;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(static_cast<std::size_t>(cpu), &set)) cpus.push_back(cpu);
  }
  return cpus;
}

bool bind_thread(int thread, const std::vector<int>& cpus) {
  if (cpus.empty()) return false;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(static_cast<std::size_t>(cpu), &set);
  return sched_setaffinity(thread, sizeof set, &set) == 0;
}

std::vector<int> thread_ids() {
  std::vector<int> ids;
  DIR* folder = opendir("/proc/self/task");
  if (folder == nullptr) return ids;
  while (const dirent* entry = readdir(folder)) {
    const int id = std::atoi(entry->d_name);
    if (id > 0) ids.push_back(id);
  }
  closedir(folder);
  std::sort(ids.begin(), ids.end());
  return ids;
}

namespace {

// Targets are asked for by name, so that one the library gains later is found.
constexpr int most_targets = 16;

bool has_matrix_unit(simd::Target target) {
  const std::string_view label = simd::name(target);
  return label.find("amx") != std::string_view::npos || label.find("sme") != std::string_view::npos;
}

bool exists(simd::Target target) {
  return std::strcmp(simd::name(target), "unknown") != 0 && target != simd::Target::best &&
         simd::supported(target);
}

}  // namespace

simd::Target vector_target() {
  for (const simd::Target target : {simd::Target::avx512, simd::Target::avx2, simd::Target::neon}) {
    if (simd::supported(target)) return target;
  }
  return simd::Target::scalar;
}

std::optional<simd::Target> matrix_target() {
  for (int i = 0; i < most_targets; ++i) {
    const auto target = static_cast<simd::Target>(i);
    if (exists(target) && has_matrix_unit(target)) return target;
  }
  return std::nullopt;
}

OthersClock::Reading OthersClock::read() const {
  Reading reading;
  const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
  std::ifstream system("/proc/stat");
  std::string word;
  if (!(system >> word) || word != "cpu") return reading;
  // user nice system idle iowait irq softirq steal; guests are part of user.
  double value = 0.0;
  for (int field = 0; field < 8 && system >> value; ++field) {
    reading.total += value * tick;
    if (field != 3 && field != 4) reading.busy += value * tick;
  }
  rusage usage;
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    for (const timeval& time : {usage.ru_utime, usage.ru_stime}) {
      reading.own += static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    }
  }
  if (child_ != 0) {
    std::ifstream file("/proc/" + std::to_string(child_) + "/stat");
    std::string line;
    std::getline(file, line);
    const std::size_t close = line.rfind(')');  // the name may hold spaces
    if (close != std::string::npos) {
      std::istringstream rest(line.substr(close + 1));
      for (int field = 3; field <= 15 && rest >> word; ++field) {
        if (field >= 14) reading.own += std::strtod(word.c_str(), nullptr) * tick;
      }
    }
  }
  reading.valid = true;
  return reading;
}

void OthersClock::restart() { start_ = read(); }

double OthersClock::share() const {
  const Reading now = read();
  const double total = now.total - start_.total;
  if (!now.valid || !start_.valid || !(total > 0.0)) return 0.0;
  return std::max(0.0, (now.busy - start_.busy) - (now.own - start_.own)) / total;
}

double probe() {
  const auto start = std::chrono::steady_clock::now();
  u64 chain = 3;
  for (int i = 0; i < 800000; ++i) chain = chain * 6364136223846793005ull + 1;
  volatile u64 sink = chain;
  static_cast<void>(sink);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace kvlean::ratio
