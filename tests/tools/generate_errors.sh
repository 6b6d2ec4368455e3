#!/usr/bin/env bash
# Bad input to kvlean-generate must end with exactly one line on standard error, a non-zero exit
# status that is not a crash, and no file left behind. Some good input must end well.
#
#   usage: generate_errors.sh [KVLEAN_GENERATE [MODEL.gguf]]
#
# KVLEAN_GENERATE defaults to kvlean-generate in $KVLEAN_BIN, MODEL to $KVLEAN_MODEL or else the
# small model of this repository. Without a model the cases that need one are skipped; without
# kvlean-generate (it is built only where llama.cpp is) all are. Exits 0 if no case failed.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/cases.bash"
start_with_model kvlean-generate "$@"

for _ in $(seq 60); do
  echo "The rays of light, in passing by the edges and sides of bodies, are bent several times."
done >text.txt
: >empty.txt
head -c 100000 /dev/urandom >garbage.gguf
{ printf 'GGUF' && head -c 100000 /dev/urandom; } >garbage_after_magic.gguf
any=(--model garbage.gguf --prompt Light)

expect "no arguments" "model is required"
expect "no text" "give --prompt or --file" --model garbage.gguf
expect "unknown option" "nonsense" "${any[@]}" --nonsense
expect "unknown policy" "unknown policy 'nonsense'" "${any[@]}" --policy nonsense
expect "external scores" "computed elsewhere" "${any[@]}" --policy external+uniform+evict
for budget in 0 -1 1.5 nan inf some 0x10 "" 0.35x; do
  expect "budget '$budget'" "budget" "${any[@]}" "--budget=$budget"
done
expect "negative tokens" "tokens" "${any[@]}" --tokens=-1
expect "no tokens" "takes --stream" "${any[@]}" --tokens 0
expect "bad positions" "positions" "${any[@]}" --positions some
expect "bad cache type" "cache-type" "${any[@]}" --cache-type q8_0
expect "negative temperature" "temperature" "${any[@]}" --temperature=-1
expect "stream with a fraction" "needs a --budget in slots" "${any[@]}" --stream --budget 0.35
expect "stream that keeps everything" "keeps everything" \
  "${any[@]}" --stream --budget 128 --policy full
expect "stream with --compress-every" "leave --compress-every out" \
  "${any[@]}" --stream --budget 128 --compress-every 8
expect "stream with --compare" "full cache" "${any[@]}" --stream --budget 128 --compare
expect "log mass in flash attention" "needs --flash-attention off" "${any[@]}" --log-mass add
expect "ragged heads in flash attention" "needs --flash-attention off" \
  "${any[@]}" --sharing per_head
expect "missing model" "absent.gguf: cannot open" --model absent.gguf --prompt Light
expect "model is a folder" "regular file" --model . --prompt Light
expect "garbage model" "not a GGUF file" "${any[@]}"
expect "garbage after the magic" "cannot load" --model garbage_after_magic.gguf --prompt Light
expect "report folder missing" "cannot write: No such file" "${any[@]}" --json absent/new.json

if [[ -z $model ]]; then
  skip "everything that runs" "no model given"
else
  good=(--model "$model")
  expect "missing text" "absent.txt: cannot open" "${good[@]}" --file absent.txt
  expect "text is a folder" "cannot read" "${good[@]}" --file .
  expect "budget below what is protected" "smaller than what is protected" \
    "${good[@]}" --file text.txt --context 200 --budget 20
  expect "log mass" "log mass.*--log-mass drop" \
    "${good[@]}" --file text.txt --context 200 --policy massfold
  expect "layers of different counts" "one count for all.*--flash-attention off" \
    "${good[@]}" --file text.txt --context 200 --policy pyramidkv
  expect "more tokens than the model was made for" "was made for [0-9]+ tokens.*--stream" \
    "${good[@]}" --file text.txt --context 200 --tokens 10000000
  expect "stream wider than the model" "was made for" \
    "${good[@]}" --file text.txt --stream --budget 10000000
  if [[ -c /dev/full ]]; then
    expect "full device" "cannot write: No space left" \
      "${good[@]}" --file text.txt --context 200 --tokens 2 --json /dev/full
  fi

  short=(--file text.txt --context 240 --tokens 8)
  works "text on a 35 % cache" "84 of 240 tokens" "${good[@]}" "${short[@]}" --budget 0.35
  works "identity" "first 8 of 8 tokens are those" \
    "${good[@]}" "${short[@]}" --budget 1 --compare --positions contiguous --ignore-end
  works "log mass without flash attention" "massfold: 120 of 240" \
    "${good[@]}" "${short[@]}" --policy massfold --budget 120 --flash-attention off
  works "heads of different lengths" "adakv" \
    "${good[@]}" "${short[@]}" --policy adakv --flash-attention off --sharing per_head
  works "compressed again and again" "h2o" \
    "${good[@]}" "${short[@]}" --policy h2o --compress-every 3 --positions contiguous
  works "stream" "compressed [1-9][0-9]* times" \
    "${good[@]}" --file text.txt --stream --budget 128 --chunk 64 --tokens 100 --ignore-end
  works "random draws" "tokens/s" "${good[@]}" "${short[@]}" --temperature 1 --seed 7
fi

finish
