#!/usr/bin/env bash
# Builds, tests and times the CUDA backend.
#   tests/cuda/run.sh                builds for the GPU that is present, runs tests, compute-sanitizer
#                                    (where installed) on reduced sizes, then benches
#   tests/cuda/run.sh --build-only   compiles for sm_80, sm_90 and the newest architecture that nvcc
#                                    knows; runs nothing
#   tests/cuda/run.sh --headers      the same for compile_all.cu alone, which uses every header and
#                                    call; skipped where there is no nvcc
#   tests/cuda/run.sh --bin DIR      runs programs built before
#   --build-to DIR  builds for --arch (or the GPU present) into DIR; runs nothing
#   --arch LIST     e.g. sm_90 or sm_80,sm_90
#   --only WORDS    programs whose names contain one of these words (comma-separated)
#   --no-sanitizer  --no-bench  --no-test
#   --quick         reduced sizes in the tests themselves
# Logs go to $OUT (default: build/cuda/logs). NVCC, CUDA_HOME and NVCC_FLAGS are honoured. Exit code
# 0 when everything passed, 1 when something failed, 2 for a bad call or a missing tool.
set -u -o pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

die() { echo "run.sh: $*" >&2; exit 2; }
jobs=$(nproc 2> /dev/null || echo 1)
build_only=0 headers=0 bin="" build_to="" arch="" only="" sanitizer=1 bench=1 test=1 quick=""
while [ $# -gt 0 ]; do
  case $1 in
    --build-only) build_only=1 ;;
    --headers) headers=1 ;;
    --bin) [ $# -ge 2 ] || die "--bin needs a folder"; bin=$2; shift ;;
    --build-to) [ $# -ge 2 ] || die "--build-to needs a folder"; build_to=$2; shift ;;
    --arch) [ $# -ge 2 ] || die "--arch needs a list"; arch=$2; shift ;;
    --only) [ $# -ge 2 ] || die "--only needs words"; only=$2; shift ;;
    --no-sanitizer) sanitizer=0 ;;
    --no-bench) bench=0 ;;
    --no-test) test=0 ;;
    --quick) quick=--quick ;;
    -h|--help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
[ -z "$bin" ] || [ -d "$bin" ] || die "$bin is not a folder"

chosen() {  # NAME: does --only allow it?
  [ -z "$only" ] && return 0
  local word
  for word in ${only//,/ }; do case $1 in *"$word"*) return 0 ;; esac; done
  return 1
}

nvcc=${NVCC:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
find_nvcc() { [ -x "$nvcc" ] || die "no nvcc: set NVCC or CUDA_HOME"; }
newest_arch() { "$nvcc" --list-gpu-code | sed -n 's/^sm_\([0-9]*\)$/\1/p' | sort -n | tail -1; }
sources() { ls "$here"/test_*.cu "$here"/bench_*.cu; }
# nvcc reads some pragmas and warns of some templates of the CPU headers that g++ and clang accept.
quiet=(-diag-suppress 128,550,554,1675 -Xcompiler -Wall,-Wextra "-I$root/include" "-I$root")
flags=(-std=c++20 -O3 -lineinfo "${quiet[@]}")
extra_flags() {  # SOURCE: what a source asks for in a line "// nvcc: FLAGS"
  sed -n 's|^// nvcc: ||p' "$1"
}
nccl_flags() {  # where NCCL is installed: what builds the parts of a source that use it
  local d l
  for d in "${NCCL_HOME:-}" "${CUDA_HOME:-/usr/local/cuda}" /usr; do
    [ -n "$d" ] && [ -f "$d/include/nccl.h" ] || continue
    for l in "$d/lib" "$d/lib64" "$d/lib/$(uname -m)-linux-gnu"; do
      [ -e "$l/libnccl.so" ] || continue
      echo "-DKVLEAN_TEST_NCCL -I$d/include -L$l -lnccl -Xlinker -rpath=$l"; return
    done
  done
}
gencode() {  # LIST
  local a
  for a in ${1//,/ }; do a=${a#sm_}; printf -- '-gencode=arch=compute_%s,code=sm_%s ' "$a" "$a"; done
}
compile() {  # SOURCE ARCHES OUTPUT [object]
  local mode=()
  [ "${4:-}" = object ] && mode=(-c)
  local more=""
  if grep -q KVLEAN_TEST_NCCL "$1"; then more=$(nccl_flags); fi
  # shellcheck disable=SC2046,SC2086
  "$nvcc" "${flags[@]}" $(gencode "$2") "${mode[@]}" "$1" -o "$3" $(extra_flags "$1") $more ${NVCC_FLAGS:-}
}

if [ "$headers" = 1 ]; then
  if ! [ -x "$nvcc" ]; then
    echo "Skipped: the CUDA backend (no nvcc)"
    exit 0
  fi
  # Two passes through the front end: what is for 9.0 and newer, and the rest.
  newest=$(newest_arch)
  out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
  for header in "$root"/include/kvlean/cuda/*.cuh; do
    case $header in *nccl*) [ -n "$(nccl_flags)" ] || continue ;; esac
    echo "#include <kvlean/cuda/$(basename "$header")>"
  done > "$out/headers.h"
  # shellcheck disable=SC2046
  "$nvcc" -std=c++20 -Ofc max "${quiet[@]}" -Xcompiler -Werror -c $(nccl_flags) \
    -include "$out/headers.h" \
    -gencode=arch=compute_80,code=sm_80 "-gencode=arch=compute_90,code=[sm_90,sm_$newest]" \
    --threads 2 "$here/compile_all.cu" -o "$out/compile_all.o" || exit 1
  echo "compiled for sm_80, sm_90 and sm_$newest"
  exit 0
fi

failed=()
if [ "$build_only" = 1 ]; then
  find_nvcc
  newest=$(newest_arch)
  out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
  for source in $(sources); do
    name=$(basename "$source" .cu); chosen "$name" || continue
    for a in sm_80 sm_90 "sm_$newest"; do
      if compile "$source" "$a" "$out/$name.o" object; then echo "built $name for $a"
      else failed+=("$name for $a"); fi
    done
  done
  [ ${#failed[@]} -eq 0 ] || { printf 'FAILED to build %s\n' "${failed[@]}"; exit 1; }
  exit 0
fi

present_arch() {
  command -v nvidia-smi > /dev/null || die "no nvidia-smi: name the GPU with --arch"
  # sm_90a: Hopper with its warpgroup products, which plain sm_90 code may not use.
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ' |
    sed 's/^/sm_/; s/^sm_90$/sm_90a/'
}
if [ -z "$bin" ]; then
  find_nvcc
  [ -n "$arch" ] || arch=$(present_arch)
  bin=${build_to:-$root/build/cuda/bin}
  mkdir -p "$bin"
  build() {  # SOURCE: says what came of it; no program is left of a build that failed
    local name started=$SECONDS
    name=$(basename "$1" .cu)
    if compile "$1" "$arch" "$bin/$name"; then echo "built $name ($((SECONDS - started)) s)"
    else rm -f "$bin/$name"; echo "not built: $name"; fi
  }
  for source in $(sources); do
    name=$(basename "$source" .cu); chosen "$name" || continue
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    build "$source" &
  done
  wait
  for source in $(sources); do
    name=$(basename "$source" .cu); chosen "$name" || continue
    [ -x "$bin/$name" ] || failed+=("build of $name")
  done
fi
if [ -n "$build_to" ]; then
  [ ${#failed[@]} -eq 0 ] || { printf 'FAILED %s\n' "${failed[@]}"; exit 1; }
  exit 0
fi

logs=${OUT:-$root/build/cuda/logs}
mkdir -p "$logs"
passed=0 skipped=0
report() {  # LABEL LOG CODE SECONDS
  case $3 in
    0) passed=$((passed + 1)); echo "ok      $1 ($4 s)" ;;
    77) skipped=$((skipped + 1)); echo "skipped $1: $(tail -1 "$logs/$2")" ;;
    *) failed+=("$1"); echo "FAILED  $1 (exit $3):"; tail -25 "$logs/$2" ;;
  esac
}
run() {  # LABEL LOG COMMAND...
  local label=$1 log=$2 started=$SECONDS code; shift 2
  "$@" > "$logs/$log" 2>&1; code=$?
  report "$label" "$log" "$code" $((SECONDS - started))
}
programs() {  # PREFIX
  local file
  for file in "$bin/$1"_*; do
    [ -x "$file" ] && [ ! -d "$file" ] && chosen "$(basename "$file")" && echo "$file"
  done
}
if [ "$test" = 1 ]; then
  for file in $(programs test); do
    name=$(basename "$file"); run "$name" "$name.log" "$file" $quick
    tail -1 "$logs/$name.log" | sed 's/^/        /'
  done
fi
if [ "$bench" = 1 ]; then
  for file in $(programs bench); do
    name=$(basename "$file"); run "$name" "$name.log" "$file"
    cat "$logs/$name.log"
  done
  # The same work in torch, where it is installed for this GPU.
  if chosen peers && python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
      2> /dev/null; then
    run "torch's forms" peers.log python3 "$root/bench/peers/gpu_peers.py"
    cat "$logs/peers.log"
  fi
fi
if [ "$sanitizer" = 1 ]; then
  checker=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ -x "$checker" ]; then
    # Side by side: they mostly wait. racecheck is the slowest, so it comes first.
    at_once=$((jobs < 8 ? jobs : 8))
    check() {  # TOOL FILE: leaves "exit code, seconds" beside the log
      local name started=$SECONDS code; name=$(basename "$2")
      "$checker" --tool "$1" --error-exitcode 9 --print-limit 20 "$2" --quick \
        > "$logs/$1.$name.log" 2>&1; code=$?
      echo "$code $((SECONDS - started))" > "$logs/$1.$name.code"
    }
    tools="racecheck memcheck initcheck synccheck"
    for tool in $tools; do
      for file in $(programs test); do
        while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
        check "$tool" "$file" &
      done
    done
    wait
    for tool in $tools; do
      for file in $(programs test); do
        name=$(basename "$file")
        read -r code seconds < "$logs/$tool.$name.code"; rm -f "$logs/$tool.$name.code"
        report "$tool $name" "$tool.$name.log" "$code" "$seconds"
      done
    done
  else
    echo "compute-sanitizer is not installed: left out"
  fi
fi
echo "passed $passed, skipped $skipped, failed ${#failed[@]}; logs in $logs"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED %s\n' "${failed[@]}"; exit 1; }
