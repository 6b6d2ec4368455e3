# Sourced by tests of tools: start or start_with_model, then expect, works, check and skip, then
# finish.

# start PROGRAM ARGUMENT...: $program is the argument, if there is one, else PROGRAM in $KVLEAN_BIN;
# goes on in an empty folder that is removed in the end.
start() {
  local name=$1 most=${most_arguments:-1}
  shift
  if (($# > most)); then
    sed -n 's/^#   usage: /usage: /p' "$0" >&2
    exit 2
  fi
  if (($# == 0)) && [[ ! -x ${KVLEAN_BIN:-}/$name ]]; then
    echo "skip  everything: $name was not built"
    exit 0
  fi
  program=$(realpath -e "${1:-${KVLEAN_BIN:-}/$name}") || exit 2
  folder=$(mktemp -d)
  mounted=
  trap 'if [[ -n $mounted ]]; then umount "$mounted"; fi; rm -rf "$folder"' EXIT
  cd "$folder" || exit 2
  passed=0 failed=0 skipped=0
}

# start_with_model PROGRAM [ARGUMENT [MODEL]]: $model is the second argument, else $KVLEAN_MODEL, else
# the small model of this repository; empty if there is none.
start_with_model() {
  local name=$1 bundled
  shift
  bundled=$(dirname "$(realpath -e "${BASH_SOURCE[0]}")")/../../examples/llama_cpp/model/kvlean-tiny.gguf
  model=${2:-${KVLEAN_MODEL:-}}
  if [[ -z $model && -e $bundled ]]; then model=$bundled; fi
  if [[ -n $model ]]; then model=$(realpath -e "$model") || exit 2; fi
  most_arguments=2
  start "$name" "$@"
}

pass() {
  echo "ok    $1"
  ((++passed))
}
fail() {
  echo "FAIL  $1: $2"
  ((++failed))
}
skip() {
  echo "skip  $1: $2"
  ((++skipped))
}

# A tool that failed must not have written under out/ or a file of one of these names.
left_behind() {
  find . -name new.json -o -name new.safetensors -o -name '*partial*' -o -path './out/*'
}

# expect NAME PATTERN ARGUMENT...: the run must fail with one line that matches PATTERN.
expect() {
  local name=$1 pattern=$2 status lines
  shift 2
  mkdir -p out
  "$program" "$@" >stdout.txt 2>stderr.txt </dev/null
  status=$?
  lines=$(wc -l <stderr.txt)
  if ((status == 0)); then
    fail "$name" "exit status 0"
  elif ((status >= 126)); then
    fail "$name" "exit status $status"
  elif ((lines != 1)); then
    fail "$name" "$lines lines on standard error"
  elif ! grep -qE -- "$pattern" stderr.txt; then
    fail "$name" "'$(cat stderr.txt)' does not match '$pattern'"
  elif [[ -n $(left_behind) ]]; then
    fail "$name" "a file was left behind: $(left_behind | head -n 1)"
  else
    pass "$name: $(cat stderr.txt)"
  fi
  rm -rf out
}

# works NAME PATTERN ARGUMENT...: the run must end well and its output match PATTERN.
works() {
  local name=$1 pattern=$2 status
  shift 2
  "$program" "$@" >stdout.txt 2>stderr.txt </dev/null
  status=$?
  if ((status != 0)); then
    fail "$name" "exit status $status: $(cat stderr.txt)"
  elif ! grep -qaE -- "$pattern" stdout.txt; then
    fail "$name" "the output does not match '$pattern'"
  else
    pass "$name"
  fi
}

# check NAME COMMAND...: the command must succeed.
check() {
  local name=$1
  shift
  if "$@" >output.txt 2>&1; then pass "$name"; else fail "$name" "$(head -c 400 output.txt)"; fi
}

# Says how many there were; the status is the script's.
finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  ((failed == 0))
}
