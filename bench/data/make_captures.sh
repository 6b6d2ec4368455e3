#!/usr/bin/env bash
# Makes the bundled captures again: gets llama.cpp, the model and the text, builds kvlean-capture
# and runs it. Provenance is in README.md beside this file.
#
#   usage: make_captures.sh [FOLDER]
#
# FOLDER defaults to the folder of this script, so the bundled files are replaced. If KVLEAN_CAPTURE
# names a kvlean-capture, nothing is built. Needs Debian's apt-get, PyPI through pip, and what the
# build needs (tools/packages.sh).
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")}")
[[ -z ${KVLEAN_CAPTURE:-} ]] || KVLEAN_CAPTURE=$(realpath -e "$KVLEAN_CAPTURE")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

text_package=golang-1.19-src
text_path=usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt
text_sha256=d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd
first_line=8570  # "_Quest._ 31. Have not the small Particles of Bodies certain Powers, ..."

model=$(examples/llama_cpp/get_model.sh | tail -n 1)

if [[ -z ${KVLEAN_CAPTURE:-} ]]; then
  source tools/packages.sh
  kvlean_require_packages "${kvlean_packages[@]}"
  prefix=$(examples/llama_cpp/get_llama_cpp.sh | tail -n 1)
  cmake --preset release -DKVLEAN_BUILD_LLAMA_CPP=ON -DKVLEAN_LLAMA_CPP_DIR="$prefix"
  cmake --build --preset release --target kvlean-capture
  KVLEAN_CAPTURE=build/release/kvlean-capture
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -e /$text_path ]]; then
  cp "/$text_path" "$work/opticks.txt"
else
  (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$text_package") ||
    { apt-get update -qq && (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$text_package"); }
  dpkg-deb --fsys-tarfile "$work/$text_package"_*.deb | tar -xO "./$text_path" >"$work/opticks.txt"
fi
printf '%s  %s\n' "$text_sha256" "$work/opticks.txt" | sha256sum --check --quiet --status || {
  echo "make_captures.sh: the text in $text_package is not the expected one (sha256 differs)" >&2
  exit 1
}
tail -n "+$first_line" "$work/opticks.txt" >"$work/query-31.txt"

mkdir -p "$folder"
"$KVLEAN_CAPTURE" --model "$model" --text "$work/query-31.txt" \
  --output "$folder/smollm2-135m-opticks.safetensors" \
  --context 1024 --future 128 --layers 1,10,19,28 --dtype f16 --verify \
  --model-name "SmolLM2-135M-Instruct, Q4_1 GGUF" --licence "Apache-2.0" \
  --text-name "Isaac Newton, Opticks (4th edition, 1730), Query 31; public domain"
(cd "$folder" && sha256sum smollm2-135m-opticks.safetensors)
