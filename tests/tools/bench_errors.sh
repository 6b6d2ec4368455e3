#!/usr/bin/env bash
# kvlean-bench: bad input must end with exactly one line on standard error and a non-zero exit status
# that is not a crash; a small toy run must give the records that scripts rely on, whatever the
# number of threads.
#
#   usage: bench_errors.sh [KVLEAN-BENCH]
#
# KVLEAN-BENCH defaults to kvlean-bench in $KVLEAN_BIN. Exits 0 if no case failed.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cases.bash"
start kvlean-bench "$@"

head -c 5000 /dev/urandom >garbage.safetensors
: >empty.safetensors
small=(--toy --layers 0 --policy "full,snapkv" --budget 0.5 --quiet)

expect "nothing to run on" "give --input CAPTURE or --toy" --budget 0.5
expect "unknown option" "nonsense" --toy --nonsense
expect "missing capture" "absent.safetensors: cannot open" --input absent.safetensors
expect "garbage capture" "garbage.safetensors: not a safetensors file" --input garbage.safetensors
expect "empty capture" "empty.safetensors: not a safetensors file" --input empty.safetensors
expect "capture is a folder" "not a regular file" --input .
expect "bad capture beside the toy" "absent.safetensors" "${small[@]}" --input absent.safetensors
expect "unknown policy" "unknown policy 'nonsense'" --toy --policy snapkv,nonsense
expect "unknown reducer" "unknown policy" --toy --policy snapkv+uniform+nonsense
expect "two parts" "unknown policy" --toy --policy snapkv+uniform
for budget in 0 -0.5 1.5 nan inf abc 0.5x; do
  expect "budget '$budget'" "budget '.*' is not a number in \(0, 1\]" --toy "--budget=$budget"
done
expect "empty budget" "budget" --toy --budget=
expect "no such layer" "there is no layer 99" --toy --layers 99
expect "layer not a number" "'x' is not a layer number" --toy --layers x
expect "negative threads" "threads" --toy --threads=-1
expect "seed not a number" "seed" --toy --seed x
for output in json csv html svg plan-json; do
  expect "unwritable --$output" "absent/out: cannot write" "${small[@]}" "--$output" absent/out
done
expect "output is a folder" "is a directory" "${small[@]}" --json .
if [[ -c /dev/full ]]; then
  expect "full device" "cannot write: No space left" "${small[@]}" --json /dev/full
fi

check "help" "$program" --help
check "list" "$program" --list
check "toy run" "$program" --toy --policy full,snapkv,random,cam,massfold --budget 0.5,0.35 \
  --layers 0,1 --threads 1 --quiet --json one.json --csv one.csv --html one.html --svg one.svg \
  --plan-json plan.json
check "two threads" "$program" --toy --policy full,snapkv,random,cam,massfold --budget 0.5,0.35 \
  --layers 0,1 --threads 2 --quiet --json two.json
check "equal bytes" "$program" --toy --policy snapkv,massfold --budget 0.35 --layers 0 --quiet \
  --equal-bytes --json equal.json
# Below the protected count: a line a record, dashes in the table, and no failure.
check "budget below the protected" "$program" --toy --policy full,snapkv --budget 0.02 --layers 0 \
  --json skipped.json

if command -v python3 >/dev/null; then
  check "records" python3 - <<'PYTHON'
import json, math

fields = ["policy", "budget", "kept_fraction", "compression_ratio", "attention_error",
          "attention_error_p95", "lost_mass", "seconds_plan", "seconds_apply", "input"]
one = json.load(open("one.json"))
two = json.load(open("two.json"))
assert [(r["policy"], r["budget"]) for r in one] == [
    (p, b) for b in (0.5, 0.35) for p in ("full", "snapkv", "random", "cam", "massfold")]
for record in one:
    assert all(field in record for field in fields), record
    assert all(not isinstance(value, (dict, list)) for value in record.values()), record
    assert record["input"] == "toy"
    numbers = [record[field] for field in fields[1:-1]]
    assert all(math.isfinite(number) and number >= 0 for number in numbers), record
    full = record["policy"] == "full"
    assert (record["attention_error"] < 1e-5) == full, record
    assert (record["compression_ratio"] == 1 and record["kept_fraction"] == 1) == full, record
    slots = math.floor(record["budget"] * 1024 + 1e-9)
    if not full:
        assert abs(record["kept_fraction"] * 1024 - slots) < 1e-6, record
        slot = 2 * 2 * 64 + 4 + (4 if record["policy"] == "massfold" else 0)
        before = 2 * 3 * 1024 * 2 * 2 * 64
        after = 2 * 3 * (slots * slot + 8)
        assert abs(record["compression_ratio"] - before / after) < 1e-9, record
without_time = [[{k: v for k, v in r.items() if not k.startswith("seconds")} for r in run]
                for run in (one, two)]
assert without_time[0] == without_time[1], "results depend on the number of threads"
snapkv, massfold = json.load(open("equal.json"))
assert massfold["bytes_after"] <= snapkv["bytes_after"] < massfold["bytes_after"] * 1.02
full, skipped = json.load(open("skipped.json"))
assert full["attention_error"] < 1e-5
assert skipped["attention_error"] is None and "protected" in skipped["skipped"]
plan = json.load(open("plan.json"))
assert plan["policy"] == "full" and len(plan["plans"]) == 2
assert len(open("one.csv").read().splitlines()) == len(one) + 1
html = open("one.html").read()
assert "<svg" in html and "prefers-color-scheme" in html
assert not any(word in html for word in ("src=", "@import", "url(", "<script", "<link"))
import xml.etree.ElementTree
xml.etree.ElementTree.parse("one.svg")
PYTHON
else
  echo "skip  records: there is no python3"
fi

finish
