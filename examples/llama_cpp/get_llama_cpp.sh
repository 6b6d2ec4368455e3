#!/usr/bin/env bash
# Builds stock llama.cpp (library, CPU backend, headers) from the source that the PyPI package
# llama-cpp-python carries, and installs it in a cache folder outside the checkout.
#
#   usage: get_llama_cpp.sh [PREFIX]
#
# PREFIX defaults to ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/llama-cpp-VERSION. A finished PREFIX is
# left alone, so the script may run before every build. The last line on standard output is PREFIX;
# everything else goes to standard error. Needs python3 with pip, cmake, and a C++ compiler.
# Environment: PYTHON (python3), JOBS (number of processors).
set -euo pipefail

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
prefix=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/llama-cpp-$version}

fail() {
  printf 'get_llama_cpp.sh: %s\n' "$1" >&2
  exit 1
}

if [[ -e $prefix/lib/cmake/llama/llama-config.cmake ]]; then
  printf '%s\n' "$prefix"
  exit 0
fi
[[ ! -e $prefix ]] || fail "$prefix exists but is not a finished installation; remove it and try again"
for tool in "$python" cmake sha256sum tar; do
  command -v "$tool" >/dev/null || fail "$tool is needed and was not found"
done

mkdir -p "$(dirname "$prefix")"
# Built beside the final place and moved there at the end: an interrupted build leaves no PREFIX.
work=$(mktemp -d "$prefix.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

printf 'downloading llama-cpp-python %s (source)\n' "$version" >&2
"$python" -m pip download --quiet --no-deps --no-binary=llama-cpp-python --dest "$work/sdist" \
  "llama-cpp-python==$version" >&2 || fail "pip could not download llama-cpp-python $version"
archive=$(find "$work/sdist" -name '*.tar.gz' -print -quit)
[[ -n $archive ]] || fail "pip downloaded no source archive"
printf '%s  %s\n' "$sha256" "$archive" | sha256sum --check --quiet --status ||
  fail "the archive of llama-cpp-python $version is not the expected one (sha256 differs)"
mkdir "$work/source"
tar -xzf "$archive" -C "$work/source" --strip-components=1

# GGML_NATIVE=OFF: AVX2, FMA and F16C on x86-64, whatever more this machine has. Captures then do
# not depend on the machine that made them, and a cached build survives a move to another one.
printf 'building llama.cpp with %s jobs (some minutes)\n' "$jobs" >&2
build() {
  cmake -S "$work/source/vendor/llama.cpp" -B "$work/build" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_TOOLS_INSTALL=OFF -DLLAMA_TESTS_INSTALL=OFF -DLLAMA_OPENSSL=OFF \
    -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_CCACHE=OFF &&
    cmake --build "$work/build" --parallel "$jobs" &&
    cmake --install "$work/build" --prefix "$work/install"
}
if ! build >"$work/log" 2>&1; then
  tail -n 30 "$work/log" >&2
  fail "llama.cpp did not build"
fi
cp "$work/source/vendor/llama.cpp/LICENSE" "$work/install/LICENSE"
[[ -e $work/install/lib/cmake/llama/llama-config.cmake ]] ||
  fail "the installation of llama.cpp has no lib/cmake/llama"

# Another run may have finished first; its result is as good.
mv -T "$work/install" "$prefix" 2>/dev/null || [[ -e $prefix/lib/cmake/llama/llama-config.cmake ]] ||
  fail "cannot create $prefix"
printf '%s\n' "$prefix"
