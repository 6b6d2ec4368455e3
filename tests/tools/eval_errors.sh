#!/usr/bin/env bash
# Bad input to kvlean-eval must end with exactly one line on standard error, a non-zero exit status
# that is not a crash, and no file left behind.
#
#   usage: eval_errors.sh [KVLEAN_EVAL [MODEL.gguf]]
#
# KVLEAN_EVAL defaults to kvlean-eval in $KVLEAN_BIN, MODEL to $KVLEAN_MODEL, else to the tiny model
# beside the program's sources. Without a model the cases that need one are skipped; without
# kvlean-eval (it is built only where llama.cpp is) all are. Exits 0 if no case failed.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/cases.bash"
start_with_model kvlean-eval "$@"

for i in $(seq 400); do
  echo "In experiment $i the rays of light, passing by the edges of bodies, were bent several times."
done >text.txt
echo "Too short." >short.txt
: >empty.txt
head -c 100000 /dev/urandom >garbage.gguf
{ printf 'GGUF' && head -c 100000 /dev/urandom; } >garbage_after_magic.gguf
printf '{"policy": \n{"policy": 1}\n' >bad.jsonl
: >empty.jsonl
mkdir folder
any=garbage.gguf

expect "no arguments" "--model is required" --text text.txt
expect "unknown option" "nonsense" --model $any --nonsense
expect "unknown policy" "unknown policy 'nothing'" --model $any --text text.txt --policy nothing
expect "policy of two parts" "unknown policy 'snapkv\+evict'" \
  --model $any --text text.txt --policy snapkv+evict
expect "unknown baseline" "unknown policy 'nothing'" --model $any --text text.txt --baseline nothing
expect "budget of zero" "budget '0' is not a number in \(0, 1\]" \
  --model $any --text text.txt --budget 0
expect "budget not a number" "budget 'half'" --model $any --text text.txt --budget 0.5,half
expect "budget above one" "budget '2'" --model $any --text text.txt --budget 2
expect "unknown task" "unknown task 'nothing'" --model $any --text text.txt --task nothing
expect "unknown mode" "mode" --model $any --text text.txt --mode sometimes
expect "unknown split" "split" --model $any --text text.txt --split third
expect "unknown cache type" "cache-type" --model $any --text text.txt --cache-type q8_0
expect "unknown weights" "weights" --model $any --text text.txt --weights f16
expect "no documents" "documents" --model $any --text text.txt --documents 0
expect "no threads" "threads" --model $any --text text.txt --threads 0
expect "length not a number" "length" --model $any --text text.txt --length long
expect "two presets" "exclude each other" --model $any --quick --smoke
expect "missing text" "absent.txt: cannot open" --model $any --text absent.txt
expect "text is a folder" "cannot read" --model $any --text folder
expect "the same text twice" "two texts of this name" --model $any --text text.txt text.txt
expect "text and folder of texts" "exclude each other" --model $any --text text.txt --texts folder
expect "folder without a manifest" "manifest" --model $any --texts folder
expect "missing model" "absent.gguf: cannot open" --model absent.gguf --text text.txt
expect "model is a folder" "regular file" --model folder --text text.txt
expect "garbage model" "not a GGUF file" --model garbage.gguf --text text.txt
expect "garbage after the magic" "garbage_after_magic.gguf: .*cannot load" \
  --model garbage_after_magic.gguf --text text.txt
expect "output folder missing" "cannot write: No such file" \
  --model $any --text text.txt --json absent/new.json
expect "output is a folder" "is a directory" --model $any --text text.txt --html folder
expect "missing records" "absent.jsonl: cannot open" --from-records absent.jsonl --json out/new.json
expect "no records" "no records" --from-records empty.jsonl --json out/new.json
expect "broken records" "bad.jsonl" --from-records bad.jsonl --json out/new.json

if [[ -z $model ]]; then
  for name in "short text" "empty text" "length beyond the model" "task that does not fit" \
    "shard" "no question" "nothing above the protected tokens" "broken records to go on with"; do
    skip "$name" "no model"
  done
else
  good=(--model "$model" --text text.txt --length 256 --documents 1
    --answer-tokens 8 --policy snapkv)
  expect "short text" "no text is long enough" --model "$model" --text short.txt --length 256
  expect "empty text" "no text is long enough" --model "$model" --text empty.txt --length 256
  expect "length beyond the model" "no text is long enough|longer than" \
    "${good[@]}" --length 10000000
  expect "task that does not fit" "does not fit" "${good[@]}" --task passkey --length 24 --samples 1
  expect "shard of a wrong form" "'1' is not I/N" "${good[@]}" --shard 1
  expect "shard zero" "'0/2' is not I/N" "${good[@]}" --shard 0/2
  expect "shard past the last" "'3/2' is not I/N" "${good[@]}" --shard 3/2
  expect "no question" "no item has a question" "${good[@]}" --mode aware --json out/new.json
  expect "nothing above the protected tokens" "nothing could be run" \
    "${good[@]}" --budget 0.01 --json out/new.json --quiet
  expect "broken records to go on with" "bad.jsonl" "${good[@]}" --records bad.jsonl
fi

finish
