#!/usr/bin/env bash
# The example in README.md must be the one that is compiled and run: examples/first_compression.cpp
# between its two markers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
example=$(sed -n '/^\/\/ README begin$/,/^\/\/ README end$/p' examples/first_compression.cpp | sed '1d;$d')
[[ -n $example ]] || { echo "FAIL  no marked lines in examples/first_compression.cpp"; exit 1; }
if [[ $(<README.md) != *"$example"* ]]; then
  echo "FAIL  README.md does not hold the marked lines of examples/first_compression.cpp"
  exit 1
fi
echo "ok    README.md shows the compiled example"
