#!/usr/bin/env bash
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
# Looks at the machine code that the headers become. Compiled without flags, no AVX instruction may
# sit outside the kernels of a target that is only called after the CPU was asked. And a unit
# compiled for a newer CPU must give all of simd/ names of its own, or the linker could keep its copy
# for everyone.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CXX:-g++}

skip() {
  echo "skip  everything: $1"
  exit 0
}
[[ $(uname -m) == x86_64 ]] || skip "not an x86-64 machine"
command -v objdump > /dev/null || skip "no objdump"
command -v "$cxx" > /dev/null || skip "no $cxx"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/unit.cpp" << 'UNIT'
#include <kvlean/attention/attend.hpp>
#include <kvlean/kvlean.hpp>
kvlean::Status run(const kvlean::Queries& queries, const kvlean::CacheView& cache,
                   kvlean::Workspace& workspace, kvlean::Ragged<float> mass,
                   const kvlean::AttentionOutput& output) {
  KVLEAN_RETURN_IF_ERROR(kvlean::accumulate_attention(
      cache, queries, {}, kvlean::GroupReduction::sum, workspace, {}, mass));
  return kvlean::detail::attend_view(queries, cache, {}, output, {});
}
UNIT

# Functions, demangled, with an instruction on ymm, zmm or k registers or a three-operand (VEX) form.
functions_with_avx() {
  objdump -d -C --no-show-raw-insn "$1" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $0; sub(/^[0-9a-f]+ </, "", name); sub(/>:$/, "", name) }
    /^ +[0-9a-f]+:\t(v[a-z0-9]+|k(mov|or|and|test|shift)[a-z]+) / && !/\tver[rw] / { print name }
  ' | sort -u
}

failed=0
for level in -O0 -O2 -O3; do
  "$cxx" -std=c++20 "$level" -Iinclude -c "$work/unit.cpp" -o "$work/plain.o"
  all=$(functions_with_avx "$work/plain.o")
  outside=$(grep -v 'simd::baseline::avx\(2\|512\)::' <<< "$all" | grep -v '^ *$' || true)
  # At -O0 the compiler's own intrinsics are functions of their own, local to the unit.
  if [[ $level == -O0 ]]; then outside=$(grep -v '^_mm' <<< "$outside" || true); fi
  if [[ -z $all ]]; then
    echo "FAIL  $level: no AVX at all, so this test sees nothing"
    failed=1
  elif [[ -n $outside ]]; then
    echo "FAIL  $level: AVX instructions outside the kernels:"
    echo "$outside"
    failed=1
  else
    echo "ok    $level: AVX only in $(wc -l <<< "$all") kernels of avx2 and avx512"
  fi
done

for march in haswell skylake-avx512; do
  "$cxx" -std=c++20 -O2 -march=$march -Iinclude -c "$work/unit.cpp" -o "$work/newer.o"
  shared=$(comm -12 <(nm -C --defined-only "$work/plain.o" | grep -o 'kvlean::v0_1::simd::.*' | sort -u) \
    <(nm -C --defined-only "$work/newer.o" | grep -o 'kvlean::v0_1::simd::.*' | sort -u))
  if [[ -n $shared ]]; then
    echo "FAIL  -march=$march: the same names as without flags:"
    echo "$shared"
    failed=1
  else
    echo "ok    -march=$march: simd/ has names of its own"
  fi
done
exit $failed
