#!/usr/bin/env bash
# Installs what is missing, builds the preset `release` and runs the tests.
#   tests/run.sh                 all of them
#   tests/run.sh -L unit         arguments go to ctest
# Without llama.cpp (KVLEAN_SKIP_LLAMA_CPP=1, or no PyPI) the tests of its example are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
# The programs for llama.cpp are tested with it. It is built once and cached outside the checkout.
if [[ -n "${KVLEAN_SKIP_LLAMA_CPP:-}" ]]; then
  echo "Skipped, as KVLEAN_SKIP_LLAMA_CPP asks: the tests that need llama.cpp"
elif ! complaint="$(examples/llama_cpp/get_llama_cpp.sh 2>&1 >/dev/null)"; then
  echo "Skipped: the tests that need llama.cpp (${complaint##*$'\n'})"
fi
kvlean_build release
CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-$(kvlean_jobs)}" ctest --preset release "$@"
