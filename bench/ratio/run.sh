#!/usr/bin/env bash
# Every claim about speed: installs what is missing, builds the preset `release`, gets torch and
# kvpress into an environment of their own, and runs kvlean-ratio with them.
#   bench/ratio/run.sh                  all rows, one and two threads, records in build/bench
#   bench/ratio/run.sh --row decode_f16 arguments go to kvlean-ratio (see --help)
# Without PyPI the rows against torch are left out (KVLEAN_SKIP_TORCH=1: the same, unasked).
set -euo pipefail
start="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root="$PWD"
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
ldconfig -p 2>/dev/null | grep -q libopenblas ||
  kvlean_require_packages "libopenblas-dev header openblas/cblas.h cblas.h" ||
  echo "No OpenBLAS: its rows are left out."
kvlean_build release --target kvlean-ratio

arguments=()
given=" $* "
if [[ $given != *" --peers"* && $given != *" --list"* && $given != *" --help"* ]]; then
  python="$root/build/peers/bin/python"
  if [[ -n ${KVLEAN_SKIP_TORCH:-} ]]; then
    echo "Skipped, as KVLEAN_SKIP_TORCH asks: the rows against torch"
  elif "$python" -c "import torch, numpy" 2>/dev/null ||
    { python3 -m venv "$root/build/peers" &&
      "$python" -m pip install --quiet torch numpy; } >build/peers.log 2>&1; then
    "$python" -c "import kvpress" 2>/dev/null ||
      "$python" -m pip install --quiet kvpress >>build/peers.log 2>&1 ||
      echo "No kvpress: its forms are written out in torch (build/peers.log)."
    arguments+=(--peers --python "$python")
  else
    echo "No torch, so no rows against it: $(tail -n 1 build/peers.log)"
  fi
fi
if [[ $given != *" --json"* && $given != *" --list"* && $given != *" --help"* ]]; then
  mkdir -p build/bench
  arguments+=(--json "$root/build/bench/ratio.json")
fi
cd "$start"  # file names in the arguments are relative to where the caller stands
exec "$root/build/release/kvlean-ratio" ${arguments[@]+"${arguments[@]}"} "$@"
