#!/usr/bin/env python3
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
"""Prints the table of docs/benchmarks.md from the records of one or more runs of kvlean-ratio.

usage: markdown_table.py RATIO.json...

A cell is the median of the runs' median ratios, with the least and the largest of them behind it
where there are several runs. Bold: a "must" that does not hold in the median run.
"""

import json
import statistics
import sys


def text(value):
    if value != 0 and abs(value) < 0.1:
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def bound(row, field):
    if row[field] is None:
        return ""
    return ("≤ " if row["better"] == "lower" else "≥ ") + f"{row[field]:g}"


def cell(records):
    ratios = [r["ratio_median"] for r in records if r["ratio_median"] is not None]
    if not ratios:
        return records[0]["reason"] if records else ""
    middle = statistics.median(ratios)
    result = text(middle)
    must = records[0]["must"]
    if must is not None:
        holds = middle <= must if records[0]["better"] == "lower" else middle >= must
        if not holds or any(r["reason"] for r in records):
            result = f"**{result}**"
    if len(ratios) > 1 and min(ratios) != max(ratios):
        result += f" ({text(min(ratios))} – {text(max(ratios))})"
    return result


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(2)
    runs = []
    for path in sys.argv[1:]:
        try:
            with open(path, encoding="utf-8") as file:
                runs.append(json.load(file))
        except (OSError, ValueError) as error:
            print(f"markdown_table.py: {path}: {error}", file=sys.stderr)
            sys.exit(2)
    names, threads = [], []
    for run in runs:
        for record in run:
            if record["name"] not in names:
                names.append(record["name"])
            if record["threads"] not in threads:
                threads.append(record["threads"])
    heads = [f"{t} thread{'s' if t > 1 else ''}" for t in threads]
    print("| row | what | " + " | ".join(heads) + " | must | aim | on | ms |")
    print("|---" * (6 + len(threads)) + "|")
    for name in names:
        of_row = [r for run in runs for r in run if r["name"] == name]
        first = of_row[0]
        cells = [cell([r for r in of_row if r["threads"] == t]) for t in threads]
        labelled = next((r for r in of_row if r["isa"]), first)
        single = [r["seconds_median"] for r in of_row if r["threads"] == threads[0] and r["rounds"]]
        ms = f"{1e3 * statistics.median(single):.3g}" if single else ""
        on = " ".join(filter(None, (labelled["isa"], labelled["dtype"])))
        print(
            f"| `{name}` | {first['claim']} | "
            + " | ".join(cells)
            + f" | {bound(first, 'must')} | {bound(first, 'aim')} | {on} | {ms} |"
        )


if __name__ == "__main__":
    main()
