#!/usr/bin/env bash
# Bad input to kvlean-capture must end with exactly one line on standard error, a non-zero exit
# status that is not a crash, and no file left behind.
#
#   usage: capture_errors.sh [KVLEAN_CAPTURE [MODEL.gguf]]
#
# KVLEAN_CAPTURE defaults to kvlean-capture in $KVLEAN_BIN, MODEL to $KVLEAN_MODEL. Without a model
# the cases that need one are skipped; without kvlean-capture (it is built only where llama.cpp is)
# all are. Exits 0 if no case failed.
set -uo pipefail

if (($# > 2)); then
  echo "usage: capture_errors.sh [KVLEAN_CAPTURE [MODEL.gguf]]" >&2
  exit 2
fi
if (($# == 0)) && [[ ! -x ${KVLEAN_BIN:-}/kvlean-capture ]]; then
  echo "skip  everything: kvlean-capture was not built"
  exit 0
fi
capture=$(realpath -e "${1:-${KVLEAN_BIN:-}/kvlean-capture}") || exit 2
model=${2:-${KVLEAN_MODEL:-}}
if [[ -n $model ]]; then model=$(realpath -e "$model") || exit 2; fi
folder=$(mktemp -d)
mounted=
finish() {
  [[ -z $mounted ]] || umount "$mounted"
  rm -rf "$folder"
}
trap finish EXIT
cd "$folder" || exit 2
passed=0 failed=0 skipped=0

skip() {
  echo "skip  $1: $2"
  ((++skipped))
}

# expect NAME PATTERN COMMAND...: runs the command and checks how it ends. PATTERN is an extended
# regular expression that the one line must match.
expect() {
  local name=$1 pattern=$2 status lines why=
  shift 2
  mkdir -p out
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
  elif [[ -n $(find out full -name '*partial*' -o -name 'new.safetensors' 2>/dev/null) ]]; then
    why="a file was left behind"
  fi
  if [[ -z $why ]]; then
    echo "ok    $name: $(cat stderr.txt)"
    ((++passed))
  else
    echo "FAIL  $name: $why"
    sed 's/^/      /' stderr.txt
    ((++failed))
  fi
  rm -rf out
}

# Writes may stop at 64 KiB; the signal is ignored so that the write itself fails.
with_size_limit() {
  (
    trap '' XFSZ
    ulimit -f 64
    "$@"
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

expect "no arguments" "model is required" "$capture"
expect "no output given" "output is required" "$capture" --model $any --text text.txt
expect "unknown option" "nonsense" \
  "$capture" --model $any --text text.txt --output $out --nonsense
expect "context of zero" "context" \
  "$capture" --model $any --text text.txt --output $out --context 0
expect "future not a number" "future" \
  "$capture" --model $any --text text.txt --output $out --future some
expect "negative skip" "skip-tokens" \
  "$capture" --model $any --text text.txt --output $out --skip-tokens -5
expect "unknown dtype" "dtype" "$capture" --model $any --text text.txt --output $out --dtype f8
expect "missing text" "absent.txt: cannot open" \
  "$capture" --model $any --text absent.txt --output $out
expect "text is a folder" "cannot read" "$capture" --model $any --text . --output $out
expect "missing model" "absent.gguf: cannot open" \
  "$capture" --model absent.gguf --text text.txt --output $out
expect "model is a folder" "regular file" "$capture" --model . --text text.txt --output $out
expect "empty model" "not a GGUF file" \
  "$capture" --model empty.gguf --text text.txt --output $out
expect "garbage model" "not a GGUF file" \
  "$capture" --model garbage.gguf --text text.txt --output $out
expect "garbage after the magic" "garbage_after_magic.gguf: .*cannot load" \
  "$capture" --model garbage_after_magic.gguf --text text.txt --output $out
expect "output folder missing" "cannot write: No such file" \
  "$capture" --model $any --text text.txt --output absent/new.safetensors
expect "output is a folder" "is a directory" \
  "$capture" --model $any --text text.txt --output out
expect "output below a file" "cannot write: Not a directory" \
  "$capture" --model $any --text text.txt --output text.txt/new.safetensors
if ((EUID == 0)); then
  skip "output folder read-only" "root may write everywhere"
else
  mkdir locked && chmod a-w locked
  expect "output folder read-only" "cannot write: Permission denied" \
    "$capture" --model $any --text text.txt --output locked/new.safetensors
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
    "$capture" --model half.gguf --text text.txt --output $out
  expect "truncated header" "header.gguf: .*cannot load" \
    "$capture" --model header.gguf --text text.txt --output $out
  expect "damaged header" "damaged.gguf: .*cannot load" \
    "$capture" --model damaged.gguf --text text.txt --output $out
  head -c $((size - 1)) "$model" >half.gguf
  expect "last byte missing" "half.gguf: .*(corrupted or incomplete|bounds)" \
    "$capture" --model half.gguf --text text.txt --output $out
  rm -f half.gguf header.gguf damaged.gguf
  short=(--context 64 --future 16)
  good=("$capture" --model "$model" --text text.txt "${short[@]}")
  expect "short text" "too short: it has [0-9]+ tokens and [0-9]+ are needed" \
    "$capture" --model "$model" --text short.txt --output $out
  expect "empty text" "too short" "$capture" --model "$model" --text empty.txt --output $out
  expect "skip past the end" "too short" "${good[@]}" --output $out --skip-tokens 1000000
  expect "text longer than the model" "at most [0-9]+" \
    "$capture" --model "$model" --text text.txt --output $out --context 1000000
  expect "bad layer list" "'x' is not a layer number" "${good[@]}" --output $out --layers 2,x
  expect "empty layer" "'' is not a layer number" "${good[@]}" --output $out --layers 2,,3
  expect "layer too large" "there is no layer 9999" "${good[@]}" --output $out --layers 9999
  expect "negative layer" "'-1' is not a layer number" "${good[@]}" --output $out --layers=-1
  if [[ -c /dev/full ]]; then
    expect "full device" "cannot write: No space left" "${good[@]}" --output /dev/full
    [[ -c /dev/full ]] || { echo "FAIL  full device: /dev/full was replaced" && ((++failed)); }
  else
    skip "full device" "there is no /dev/full"
  fi
  echo earlier >kept.safetensors
  expect "file size limit" "cannot write: File too large" \
    with_size_limit "${good[@]}" --output kept.safetensors
  if [[ $(cat kept.safetensors) != earlier || -n $(find . -name '*partial*') ]]; then
    echo "FAIL  file size limit: the earlier file was touched, or a partial file was left behind"
    ((++failed))
  fi
  mkdir full
  if mount -t tmpfs -o size=64k none full 2>/dev/null; then
    mounted=$folder/full
    expect "full disk" "cannot write: No space left" "${good[@]}" --output full/new.safetensors
  else
    skip "full disk" "a small file system cannot be mounted here"
  fi
fi

echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
