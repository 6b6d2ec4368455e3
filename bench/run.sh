#!/usr/bin/env bash
# Installs what is missing, builds the preset `release` and runs the quality sweep.
#   bench/run.sh                        the bundled captures, results under build/bench
#   bench/run.sh --policy snapkv --toy  arguments go to kvlean-bench (see --help)
set -euo pipefail
start="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
kvlean_build release --target kvlean-bench

shopt -s nullglob
captures=(bench/data/*.safetensors)
if ((${#captures[@]} == 0)) && (($# == 0)); then
  echo "There is no capture in bench/data; give one with --input CAPTURE, or try --toy." >&2
  exit 1
fi
given=" $* "
defaults=()
if [[ $given != *" --input"* && $given != *" --toy"* ]]; then
  defaults+=(--input "${captures[@]/#/$root/}")
fi
if [[ $given != *" --list"* && $given != *" --help"* && $given != *" -h "* ]]; then
  mkdir -p build/bench
  for output in json=results.json csv=results.csv html=report.html svg=plot.svg; do
    [[ $given == *" --${output%%=*}"* ]] || defaults+=("--${output%%=*}" "$root/build/bench/${output#*=}")
  done
fi
cd "$start"  # file names in the arguments are relative to where the caller stands
"$root/build/release/kvlean-bench" "${defaults[@]}" "$@"
if [[ " ${defaults[*]} " == *" --html "* ]]; then
  echo "Report: $root/build/bench/report.html"
fi
