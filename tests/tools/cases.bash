# Sourced by tests of a tool that takes no model: start, expect, check and finish.

# start PROGRAM ARGUMENT...: $program is the argument, if there is one, else PROGRAM in $KVLEAN_BIN;
# goes on in an empty folder that is removed in the end.
start() {
  local name=$1
  shift
  if (($# > 1)); then
    echo "usage: $(basename "$0") [${name^^}]" >&2
    exit 2
  fi
  if (($# == 0)) && [[ ! -x ${KVLEAN_BIN:-}/$name ]]; then
    echo "skip  everything: $name was not built"
    exit 0
  fi
  program=$(realpath -e "${1:-${KVLEAN_BIN:-}/$name}") || exit 2
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cd "$folder" || exit 2
  passed=0 failed=0
}

pass() {
  echo "ok    $1"
  ((++passed))
}
fail() {
  echo "FAIL  $1: $2"
  ((++failed))
}

# expect NAME PATTERN ARGUMENT...: the run must fail with one line that matches PATTERN.
expect() {
  local name=$1 pattern=$2 status lines
  shift 2
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
  else
    pass "$name: $(cat stderr.txt)"
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
  echo "$passed passed, $failed failed"
  ((failed == 0))
}
