# Sourced by the scripts that build: makes sure that the Debian packages the build needs are there.
# shellcheck shell=bash disable=SC2034

# Every package the release preset needs, and how its presence shows: a command or a header.
kvlean_packages=(
  "g++ command g++"
  "cmake command cmake"
  "ninja-build command ninja"
  "catch2 header catch2/catch.hpp catch2/catch_all.hpp"
  "libeigen3-dev header eigen3/Eigen/Core Eigen/Core"
  "nlohmann-json3-dev header nlohmann/json.hpp"
  "libcli11-dev header CLI/CLI.hpp"
  "libbenchmark-dev header benchmark/benchmark.h"
)
kvlean_clang_package="clang command clang++"

kvlean_has() {  # kvlean_has command|header NAME...: true if one of the names is there
  local kind="$1" name prefix
  shift
  for name in "$@"; do
    if [[ "$kind" == command ]]; then
      command -v "$name" >/dev/null && return 0
    else
      for prefix in /usr/include /usr/local/include; do
        [[ -e "$prefix/$name" ]] && return 0
      done
    fi
  done
  return 1
}

# kvlean_require_packages ENTRY...: installs what is missing, or says what to install and fails.
kvlean_require_packages() {
  local entry package missing=() fields sudo=()
  for entry in "$@"; do
    read -r -a fields <<<"$entry"
    package="${fields[0]}"
    kvlean_has "${fields[@]:1}" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  if ((EUID != 0)); then
    sudo=(sudo -n)
  fi
  if ! command -v apt-get >/dev/null || { ((EUID != 0)) && ! sudo -n true 2>/dev/null; }; then
    echo "Missing, please install (Debian's package names): ${missing[*]}" >&2
    echo "  apt-get install ${missing[*]}" >&2
    return 1
  fi
  echo "Installing: ${missing[*]}"
  local apt=(${sudo[@]+"${sudo[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get -q)
  "${apt[@]}" update
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

# The number of jobs a build or a test run may use at once.
kvlean_jobs() { nproc 2>/dev/null || echo 2; }

# kvlean_build PRESET [build argument...]: configures and builds; run it in the repository root.
kvlean_build() {
  local preset="$1"
  shift
  cmake --preset "$preset" &&
    cmake --build --preset "$preset" "$@"
}
