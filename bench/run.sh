#!/usr/bin/env bash
# Installs what is missing, builds the preset `release` and runs the quality sweep.
#   bench/run.sh                            the bundled captures, results under build/bench
#   bench/run.sh --policy snapkv --toy      arguments go to kvlean-bench (see --help)
set -euo pipefail
start="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
kvlean_build release --target kvlean-bench

if (($#)); then
  cd "$start"  # file names in the arguments are relative to where the caller stands
  exec "$root/build/release/kvlean-bench" "$@"
fi

shopt -s nullglob
captures=(bench/data/*.safetensors)
if ((${#captures[@]} == 0)); then
  echo "There is no capture in bench/data; give one with --input CAPTURE, or try --toy." >&2
  exit 1
fi
mkdir -p build/bench
build/release/kvlean-bench --input "${captures[@]}" --json build/bench/results.json \
  --csv build/bench/results.csv --html build/bench/report.html
echo "Report: $root/build/bench/report.html"
