#!/usr/bin/env bash
# kvlean-ratio: bad input must end with exactly one line on standard error and a non-zero exit status
# that is not a crash; a few quick rows must give the records that scripts rely on.
#
#   usage: ratio_errors.sh [KVLEAN-RATIO]
#
# KVLEAN-RATIO defaults to kvlean-ratio in $KVLEAN_BIN. Exits 0 if no case failed.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cases.bash"
start kvlean-ratio "$@"

quick=(--quick --threads 1 --row memory_after,allocations_hot,append,snapkv_bf16_torch)

expect "unknown option" "nonsense" --nonsense
expect "unknown row" "there is no row 'nonsense'" --row nonsense
expect "one unknown row of two" "there is no row 'nonsense'" --row append,nonsense
for threads in 0 -1 x 1x 1.5 99999999999 ""; do
  expect "threads '$threads'" "threads" "--threads=$threads"
done
for seconds in -1 x nan inf; do
  expect "seconds '$seconds'" "seconds" "${quick[@]}" "--seconds=$seconds"
done
expect "unwritable --json" "absent/out: cannot write" "${quick[@]}" --json absent/out
expect "--json is a folder" "cannot write" "${quick[@]}" --json .
if [[ -c /dev/full ]]; then
  expect "full device" "cannot write" "${quick[@]}" --json /dev/full
fi
expect "no such peer script" "absent.py: not a file" "${quick[@]}" --peers --peer-script absent.py
expect "no such interpreter" "peers: " "${quick[@]}" --peers --python ./absent-python
printf '#!/bin/sh\nexit 1\n' >dies && chmod +x dies
expect "an interpreter that dies" "peers: the Python process ended" "${quick[@]}" --peers \
  --python ./dies

check "help" "$program" --help
check "list" "$program" --list
check "quick rows" "$program" "${quick[@]}" --seconds 0.05 --check --json quick.json

if command -v python3 >/dev/null; then
  check "records" python3 - <<'PYTHON'
import json, math

records = json.load(open("quick.json"))
fields = ["name", "reference", "threads", "ratio_median", "ratio_q1", "ratio_q3", "must", "aim",
          "holds", "better", "isa", "dtype", "shape", "rounds", "bytes", "allocations", "digest"]
assert [r["name"] for r in records] == ["snapkv_bf16_torch", "append", "memory_after",
                                        "allocations_hot"]
for record in records:
    assert all(field in record for field in fields), record
    assert all(not isinstance(value, (dict, list)) for value in record.values()), record
    assert record["better"] in ("lower", "higher") and record["threads"] == 1, record
torch, append, memory, allocations = records
assert torch["holds"] is None and torch["ratio_median"] is None and "--peers" in torch["reason"]
assert memory["holds"] is True and 1 <= memory["ratio_median"] <= memory["must"] == 1.01
assert allocations["holds"] is True and allocations["ratio_median"] == 0
if append["rounds"]:
    assert append["holds"] is True and append["must"] == 0.02
    assert 0 < append["ratio_q1"] <= append["ratio_median"] <= append["ratio_q3"]
    assert append["allocations"] == 0 and math.isfinite(append["seconds_median"])
PYTHON
else
  echo "skip  records: there is no python3"
fi

finish
