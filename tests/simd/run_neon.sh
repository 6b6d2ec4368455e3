#!/usr/bin/env bash
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
# Cross-compiles the tests of the kernels, and those of attention, for 64-bit ARM and runs them in an
# emulator. Needs Debian's g++-aarch64-linux-gnu, qemu-user-static and catch2. Exits 77 where one of
# them is missing, other than 0 when a test fails.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CXX_AARCH64:-aarch64-linux-gnu-g++}
qemu=${QEMU_AARCH64:-qemu-aarch64-static}
for tool in "$cxx" "$qemu"; do
  if ! command -v "$tool" > /dev/null; then
    echo "skip  everything: no $tool"
    exit 77
  fi
done
# Only Catch2 of the host's headers: the others are not for this architecture.
catch2=""
for folder in ${CATCH2_INCLUDE:-} /usr/include /usr/local/include; do
  if [[ -e $folder/catch2/catch.hpp ]]; then
    catch2=$folder/catch2
    break
  fi
done
if [[ -z $catch2 ]]; then
  echo "skip  everything: no catch2/catch.hpp"
  exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$catch2" "$work/catch2"
objects=()
# The references in the tests are not to be fused; the kernels say themselves what is.
for source in tests/simd/*.cpp tests/unit/test_attention.cpp tests/unit/test_observe.cpp; do
  object=$work/$(basename "$source" .cpp).o
  "$cxx" -std=c++20 -O2 -ffp-contract=off -Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Werror -Iinclude -I. \
    -isystem "$work" -c "$source" -o "$object"
  objects+=("$object")
done
echo '#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>' > "$work/main.cpp"
"$cxx" -std=c++20 -O0 -isystem "$work" -c "$work/main.cpp" -o "$work/main.o"
"$cxx" -static "${objects[@]}" "$work/main.o" -o "$work/tests"
"$qemu" "$work/tests" "$@"
