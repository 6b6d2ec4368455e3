#!/usr/bin/env bash
# Bad input to kvlean-capture must end with exactly one line on standard error, a non-zero exit
# status that is not a crash, and no file left behind.
#
#   usage: capture_errors.sh [KVLEAN_CAPTURE [MODEL.gguf]]
#
# KVLEAN_CAPTURE defaults to kvlean-capture in $KVLEAN_BIN, MODEL to $KVLEAN_MODEL, else to the small
# model of this repository. Without a model the cases that need one are skipped; without
# kvlean-capture (it is built only where llama.cpp is) all are. Exits 0 if no case failed.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/cases.bash"
start_with_model kvlean-capture "$@"

unlimited=$program
# Writes may stop at 64 KiB; the signal is ignored so that the write itself fails.
limited() {
  (
    trap '' XFSZ
    ulimit -f 64
    "$unlimited" "$@"
  )
}

for _ in $(seq 400); do
  echo "The rays of light, in passing by the edges and sides of bodies, are bent several times."
done >text.txt
echo "Too short." >short.txt
: >empty.txt
head -c 100000 /dev/urandom >garbage.gguf
{ printf 'GGUF' && head -c 100000 /dev/urandom; } >garbage_after_magic.gguf
: >empty.gguf
out=out/new.safetensors
any=garbage.gguf

expect "no arguments" "model is required"
expect "no output given" "output is required" --model $any --text text.txt
expect "unknown option" "nonsense" --model $any --text text.txt --output $out --nonsense
expect "context of zero" "context" --model $any --text text.txt --output $out --context 0
expect "future not a number" "future" --model $any --text text.txt --output $out --future some
expect "negative skip" "skip-tokens" --model $any --text text.txt --output $out --skip-tokens -5
expect "unknown dtype" "dtype" --model $any --text text.txt --output $out --dtype f8
expect "missing text" "absent.txt: cannot open" --model $any --text absent.txt --output $out
expect "text is a folder" "cannot read" --model $any --text . --output $out
expect "missing model" "absent.gguf: cannot open" --model absent.gguf --text text.txt --output $out
expect "model is a folder" "regular file" --model . --text text.txt --output $out
expect "empty model" "not a GGUF file" --model empty.gguf --text text.txt --output $out
expect "garbage model" "not a GGUF file" --model garbage.gguf --text text.txt --output $out
expect "garbage after the magic" "garbage_after_magic.gguf: .*cannot load" \
  --model garbage_after_magic.gguf --text text.txt --output $out
expect "output folder missing" "cannot write: No such file" \
  --model $any --text text.txt --output absent/new.safetensors
expect "output is a folder" "is a directory" --model $any --text text.txt --output out
expect "output below a file" "cannot write: Not a directory" \
  --model $any --text text.txt --output text.txt/new.safetensors
if ((EUID == 0)); then
  skip "output folder read-only" "root may write everywhere"
else
  mkdir locked && chmod a-w locked
  expect "output folder read-only" "cannot write: Permission denied" \
    --model $any --text text.txt --output locked/new.safetensors
fi

if [[ -z $model ]]; then
  for name in "truncated weights" "truncated header" "damaged header" "last byte missing" \
    "short text" "empty text" "skip past the end" "text longer than the model" \
    "bad layer list" "empty layer" "layer too large" "negative layer" \
    "full device" "file size limit" "full disk"; do
    skip "$name" "no model given"
  done
else
  size=$(stat -c %s "$model")
  head -c $((size / 2)) "$model" >half.gguf
  head -c 2000 "$model" >header.gguf
  { head -c 24 "$model" && head -c 5000 /dev/zero && tail -c +5025 "$model"; } >damaged.gguf
  expect "truncated weights" "half.gguf: .*(corrupted or incomplete|bounds)" \
    --model half.gguf --text text.txt --output $out
  expect "truncated header" "header.gguf: .*cannot load" \
    --model header.gguf --text text.txt --output $out
  expect "damaged header" "damaged.gguf: .*cannot load" \
    --model damaged.gguf --text text.txt --output $out
  head -c $((size - 1)) "$model" >half.gguf
  expect "last byte missing" "half.gguf: .*(corrupted or incomplete|bounds)" \
    --model half.gguf --text text.txt --output $out
  rm -f half.gguf header.gguf damaged.gguf
  short=(--context 64 --future 16)
  good=(--model "$model" --text text.txt "${short[@]}")
  expect "short text" "too short: it has [0-9]+ tokens and [0-9]+ are needed" \
    --model "$model" --text short.txt --output $out
  expect "empty text" "too short" --model "$model" --text empty.txt --output $out
  expect "skip past the end" "too short" "${good[@]}" --output $out --skip-tokens 1000000
  expect "text longer than the model" "at most [0-9]+" \
    --model "$model" --text text.txt --output $out --context 1000000
  expect "bad layer list" "'x' is not a layer number" "${good[@]}" --output $out --layers 2,x
  expect "empty layer" "'' is not a layer number" "${good[@]}" --output $out --layers 2,,3
  expect "layer too large" "there is no layer 9999" "${good[@]}" --output $out --layers 9999
  expect "negative layer" "'-1' is not a layer number" "${good[@]}" --output $out --layers=-1
  if [[ -c /dev/full ]]; then
    expect "full device" "cannot write: No space left" "${good[@]}" --output /dev/full
    [[ -c /dev/full ]] || fail "full device" "/dev/full was replaced"
  else
    skip "full device" "there is no /dev/full"
  fi
  echo earlier >kept.safetensors
  program=limited
  expect "file size limit" "cannot write: File too large" "${good[@]}" --output kept.safetensors
  program=$unlimited
  [[ $(cat kept.safetensors) == earlier ]] || fail "file size limit" "the earlier file was touched"
  mkdir full
  if mount -t tmpfs -o size=64k none full 2>/dev/null; then
    mounted=$folder/full
    expect "full disk" "cannot write: No space left" "${good[@]}" --output full/new.safetensors
  else
    skip "full disk" "a small file system cannot be mounted here"
  fi
fi

finish
