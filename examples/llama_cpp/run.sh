#!/usr/bin/env bash
# Builds what is missing (llama.cpp once, then kvlean-generate) and generates text on a compressed
# cache.
#
#   examples/llama_cpp/run.sh                    the bundled model answers from 35 % of its cache
#   examples/llama_cpp/run.sh --model M.gguf --file TEXT.txt --tokens 200
#                                                arguments go to kvlean-generate (see --help)
#
# Without --model the bundled model is used; without --file and --prompt, passkey.txt beside this
# script and a question about it. File names are relative to where you stand.
set -euo pipefail
start="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root="$PWD"
source tools/packages.sh

kvlean_require_packages "${kvlean_packages[@]}"
examples/llama_cpp/get_llama_cpp.sh >/dev/null
kvlean_build release --target kvlean-generate

given=" $* "
defaults=()
if [[ $given != *" --help "* && $given != *" -h "* ]]; then
  if [[ $given != *" --model"* ]]; then
    defaults+=(--model "$root/examples/llama_cpp/model/kvlean-tiny.gguf")
  fi
  if [[ $given != *" --file"* && $given != *" --prompt"* ]]; then
    defaults+=(--file "$root/examples/llama_cpp/passkey.txt"
      --prompt "What is the pass key? The pass key is ")
    [[ $given == *" --tokens"* ]] || defaults+=(--tokens 6)
    [[ $given == *" --policy"* ]] || defaults+=(--policy h2o)
    [[ $given == *" --compare "* || $given == *" --stream "* ]] || defaults+=(--compare)
  fi
fi
cd "$start"
exec "$root/build/release/kvlean-generate" ${defaults[@]+"${defaults[@]}"} "$@"
