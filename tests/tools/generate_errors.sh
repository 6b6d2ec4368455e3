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

if (($# > 2)); then
  echo "usage: generate_errors.sh [KVLEAN_GENERATE [MODEL.gguf]]" >&2
  exit 2
fi
if (($# == 0)) && [[ ! -x ${KVLEAN_BIN:-}/kvlean-generate ]]; then
  echo "skip  everything: kvlean-generate was not built"
  exit 0
fi
generate=$(realpath -e "${1:-${KVLEAN_BIN:-}/kvlean-generate}") || exit 2
root=$(realpath -e "$(dirname "${BASH_SOURCE[0]}")/../..") || exit 2
model=${2:-${KVLEAN_MODEL:-}}
bundled=$root/examples/llama_cpp/model/kvlean-tiny.gguf
if [[ -z $model && -f $bundled ]]; then model=$bundled; fi
if [[ -n $model ]]; then model=$(realpath -e "$model") || exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 2
passed=0 failed=0 skipped=0

# expect NAME PATTERN COMMAND...: runs the command and checks how it ends. PATTERN is an extended
# regular expression that the one line must match.
expect() {
  local name=$1 pattern=$2 status lines why=
  shift 2
  "$@" >stdout.txt 2>stderr.txt </dev/null
  status=$?
  lines=$(wc -l <stderr.txt)
  if ((status == 0)); then
    why="exit status 0"
  elif ((status >= 126)); then
    why="exit status $status"
  elif ((lines != 1)); then
    why="$lines lines on standard error"
  elif ! grep -qE -- "$pattern" stderr.txt; then
    why="the line does not match '$pattern'"
  elif [[ -e new.json ]]; then
    why="a file was left behind"
  fi
  report "$name" "$why"
}

# works NAME PATTERN COMMAND...: the command must end well and its output match.
works() {
  local name=$1 pattern=$2 status why=
  shift 2
  "$@" >stdout.txt 2>stderr.txt </dev/null
  status=$?
  if ((status != 0)); then
    why="exit status $status"
  elif ! grep -qaE -- "$pattern" stdout.txt; then
    why="the output does not match '$pattern'"
  fi
  report "$name" "$why"
}

report() {
  if [[ -z $2 ]]; then
    echo "ok    $1: $(head -n 1 stderr.txt)"
    ((++passed))
  else
    echo "FAIL  $1: $2"
    sed 's/^/      /' stderr.txt
    ((++failed))
  fi
  rm -f new.json
}

for _ in $(seq 60); do
  echo "The rays of light, in passing by the edges and sides of bodies, are bent several times."
done >text.txt
: >empty.txt
head -c 100000 /dev/urandom >garbage.gguf
{ printf 'GGUF' && head -c 100000 /dev/urandom; } >garbage_after_magic.gguf
any=(--model garbage.gguf --prompt Light)

expect "no arguments" "model is required" "$generate"
expect "no text" "give --prompt or --file" "$generate" --model garbage.gguf
expect "unknown option" "nonsense" "$generate" "${any[@]}" --nonsense
expect "unknown policy" "unknown policy 'nonsense'" "$generate" "${any[@]}" --policy nonsense
expect "external scores" "computed elsewhere" \
  "$generate" "${any[@]}" --policy external+uniform+evict
for budget in 0 -1 1.5 nan inf some 0x10 "" 0.35x; do
  expect "budget '$budget'" "budget" "$generate" "${any[@]}" "--budget=$budget"
done
expect "negative tokens" "tokens" "$generate" "${any[@]}" --tokens=-1
expect "no tokens" "takes --stream" "$generate" "${any[@]}" --tokens 0
expect "bad positions" "positions" "$generate" "${any[@]}" --positions some
expect "bad cache type" "cache-type" "$generate" "${any[@]}" --cache-type q8_0
expect "negative temperature" "temperature" "$generate" "${any[@]}" --temperature=-1
expect "stream with a fraction" "needs a --budget in slots" \
  "$generate" "${any[@]}" --stream --budget 0.35
expect "stream that keeps everything" "keeps everything" \
  "$generate" "${any[@]}" --stream --budget 128 --policy full
expect "stream with --compress-every" "leave --compress-every out" \
  "$generate" "${any[@]}" --stream --budget 128 --compress-every 8
expect "stream with --compare" "full cache" "$generate" "${any[@]}" --stream --budget 128 --compare
expect "log mass in flash attention" "needs --flash-attention off" \
  "$generate" "${any[@]}" --log-mass add
expect "ragged heads in flash attention" "needs --flash-attention off" \
  "$generate" "${any[@]}" --sharing per_head
expect "missing model" "absent.gguf: cannot open" "$generate" --model absent.gguf --prompt Light
expect "model is a folder" "regular file" "$generate" --model . --prompt Light
expect "garbage model" "not a GGUF file" "$generate" "${any[@]}"
expect "garbage after the magic" "cannot load" \
  "$generate" --model garbage_after_magic.gguf --prompt Light
expect "report folder missing" "cannot write: No such file" \
  "$generate" "${any[@]}" --json absent/new.json

if [[ -z $model ]]; then
  echo "skip  everything that runs: no model given"
  ((++skipped))
else
  good=("$generate" --model "$model")
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

echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
