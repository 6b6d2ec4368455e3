#!/usr/bin/env bash
# Installs what is missing, builds the preset `release` and runs the tests.
#   tests/run.sh                 all of them
#   tests/run.sh -L unit         arguments go to ctest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
kvlean_build release
CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-$(kvlean_jobs)}" ctest --preset release "$@"
