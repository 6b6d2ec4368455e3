// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "tests/odr/units.hpp"
#include "tests/odr/work.hpp"

namespace {

bool can_run_second_unit() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("avx2") != 0;
#else
  return true;
#endif
}

}  // namespace

int main() {
  const std::uint64_t expected = use_the_library();
  if (expected == 0 || first_unit() != expected) {
    std::puts("the first unit computes something else");
    return 1;
  }
  if (can_run_second_unit() && second_unit() != expected) {
    std::puts("the second unit computes something else");
    return 1;
  }
  // An inline constant is one object of the whole program.
  if (first_unit_constant() != &kvlean::max_row_width ||
      second_unit_constant() != &kvlean::max_row_width) {
    std::puts("an inline constant exists twice");
    return 1;
  }
  return 0;
}
