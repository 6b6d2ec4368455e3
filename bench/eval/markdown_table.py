#!/usr/bin/env python3
"""Prints tables of docs/results.md, from a summary that kvlean-eval --json wrote or from records.

usage: markdown_table.py SUMMARY.json text BUDGET [POLICY ...]
       markdown_table.py SUMMARY.json kl BUDGETS [POLICY ...]
       markdown_table.py SUMMARY.json against BASELINE BUDGETS [POLICY ...]
       markdown_table.py SUMMARY.json score TASK LENGTH MODE [POLICY ...]
       markdown_table.py RECORDS.jsonl depths TASK BUDGET MODE [POLICY ...]
       markdown_table.py RECORDS.jsonl protection BUDGETS [POLICY ...]

text: KL to the full cache and what goes with it, the best first. kl: its mean alone, a column a
budget, the best at the smallest budget first. against: paired differences of KL to a policy that
kvlean-eval was given as --baseline, a column a budget. score: a task's score, a column a budget.
depths: right answers at each depth, the shallowest first, a column a length. protection: KL by
protected tokens, with paired differences to 4 sinks and 32 recent tokens (95 %, 2000 resamples of
documents).

BUDGETS is one or more budgets with commas between them. With -l LENGTH before the table's name
only texts of this length count (1024), with -p SINKS/RECENT only runs with this protection (4/32).
"""
import collections
import json
import random
import sys

RESAMPLES = 2000


def summary_of(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["records"]


def records_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def protection_of(row):
    words = dict(word.split("=") for word in row["settings"].split() if "=" in word)
    return int(words["sinks"]), int(words["recent"])


def texts_of(rows, length, policies):
    return [row for row in rows if row["task"] == "text" and row["length"] == length
            and (not policies or row["policy"] in policies)]


def at(rows, budget):
    return [row for row in rows if abs(row["budget"] - budget) < 1e-9]


def budgets_of(text):
    return [float(word) for word in text.split(",")]


def header(*columns):
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")


def interval(row, key):
    low, high = row[key + "_low"], row[key + "_high"]
    return f"{row[key]:+.3f} ({low:+.3f} – {high:+.3f})"


def text_table(rows):
    header("policy", "KL, mean", "95 % interval", "median", "p99", "same top token",
           "benefit kept", "attention error, open / closed loop")
    for row in sorted(rows, key=lambda row: row["kl_mean"]):
        kept = "–" if row["retention"] is None else f"{row['retention']:.2f}"
        errors = " / ".join("–" if row[key] is None else f"{row[key]:.3f}"
                            for key in ("attention_error_open", "attention_error_closed"))
        print(f"| `{row['policy']}` | {row['kl_mean']:.3f} | {row['kl_mean_low']:.3f} – "
              f"{row['kl_mean_high']:.3f} | {row['kl_median']:.4f} | {row['kl_p99']:.2f} | "
              f"{100 * row['top1']:.1f} % | {kept} | {errors} |")


def kl_table(rows, budgets):
    header("policy", *(f"{100 * budget:g} %" for budget in budgets))
    cells = collections.defaultdict(dict)
    for budget in sorted(budgets):
        for row in sorted(at(rows, budget), key=lambda row: row["kl_mean"]):
            cells[row["policy"]][budget] = (f"{row['kl_mean']:.3f} ({row['kl_mean_low']:.3f} – "
                                            f"{row['kl_mean_high']:.3f})")
    for policy, found in cells.items():
        print(f"| `{policy}` | " + " | ".join(found.get(b, "–") for b in budgets) + " |")


def against_table(rows, baseline, budgets):
    header("policy", *(f"{100 * budget:g} %" for budget in budgets))
    cells = collections.defaultdict(dict)
    for budget in budgets:
        for row in sorted(at(rows, budget), key=lambda row: row["kl_mean"]):
            if row["policy"] != baseline and row.get(f"kl_vs_{baseline}") is not None:
                cells[row["policy"]][budget] = interval(row, f"kl_vs_{baseline}")
    for policy, found in cells.items():
        print(f"| `{policy}` | " + " | ".join(found.get(b, "–") for b in budgets) + " |")


def score_table(rows, task, length, mode, policies):
    rows = [row for row in rows
            if row["task"] == task and row["length"] == length and row["mode"] == mode
            and row["budget"] < 1 and (not policies or row["policy"] in policies)]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    score = {(row["policy"], row["budget"]): row["score"] for row in rows}
    header("policy", *(f"{100 * budget:g} %" for budget in budgets))
    for policy in sorted({row["policy"] for row in rows},
                         key=lambda policy: [-score[policy, budget] for budget in budgets]):
        cells = (f"{100 * score[policy, budget]:.0f}" for budget in budgets)
        print(f"| `{policy}` | " + " | ".join(cells) + " |")


def depths_table(records, task, budget, mode, policies):
    records = [row for row in at(records, budget) if row["task"] == task and row["mode"] == mode
               and (not policies or row["policy"] in policies)]
    cells = collections.defaultdict(list)
    for row in records:
        cells[row["policy"], row["length"], row["depth"]].append(row["score"])
        cells[row["policy"]].append(row["score"])
    lengths = sorted({row["length"] for row in records})
    depths = sorted({row["depth"] for row in records})
    items = max((len(cells[key]) for key in cells if isinstance(key, tuple)), default=0)
    header("policy", *(f"{length} tokens" for length in lengths), "all")

    def right(*key):
        found = cells.get(key, [])
        if not found:
            return "–"
        return f"{sum(found):g}" + ("" if len(found) == items else f"/{len(found)}")

    for policy in sorted({row["policy"] for row in records},
                         key=lambda name: (-sum(cells[name]) / len(cells[name]), name)):
        by_length = (" ".join(right(policy, length, depth) for depth in depths)
                     for length in lengths)
        print(f"| `{policy}` | " + " | ".join(by_length) +
              f" | {sum(cells[policy]):g} of {len(cells[policy])} |")


def paired_interval(differences):
    """A mean and its percentile interval over resampled documents."""
    draws = random.Random(42)
    count = len(differences)
    means = sorted(sum(draws.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    tail = int(0.025 * RESAMPLES)
    return sum(differences) / count, means[tail], means[-1 - tail]


def protection_table(records, budgets):
    header("policy", "sinks / recent", *(f"{100 * budget:g} %" for budget in budgets))
    means = collections.defaultdict(dict)  # by policy, protection, budget: documents' mean KL
    for row in records:
        if row["kl"]:
            key = row["policy"], protection_of(row), row["budget"]
            means[key][row["item"]] = sum(row["kl"]) / len(row["kl"])
    for policy in sorted({key[0] for key in means}):
        for protection in sorted({key[1] for key in means if key[0] == policy}):
            cells = []
            for budget in budgets:
                own = means.get((policy, protection, budget))
                usual = means.get((policy, (4, 32), budget))
                if not own:
                    cells.append("–")
                    continue
                cell = f"{sum(own.values()) / len(own):.4f}"
                shared = sorted(set(own) & set(usual or {}))
                if protection != (4, 32) and shared:
                    mean, low, high = paired_interval([own[i] - usual[i] for i in shared])
                    cell += f" ({mean:+.4f}, {low:+.4f} – {high:+.4f})"
                cells.append(cell)
            print(f"| `{policy}` | {protection[0]} / {protection[1]} | " + " | ".join(cells) + " |")


def options_of(words):
    """Takes -l LENGTH and -p SINKS/RECENT off the front."""
    length, protection = 1024, (4, 32)
    while words and words[0] in ("-l", "-p"):
        if words[0] == "-l":
            length = int(words[1])
        else:
            sinks, recent = words[1].split("/")
            protection = int(sinks), int(recent)
        words = words[2:]
    return length, protection, words


def main(arguments):
    try:
        if len(arguments) < 3:
            raise ValueError("give a file, a table's name and what it needs (top of this file)")
        path, *rest = arguments
        length, protection, (kind, *rest) = options_of(rest)
        if kind in ("text", "kl", "against"):
            policies = rest[2:] if kind == "against" else rest[1:]
            rows = [row for row in texts_of(summary_of(path), length, policies)
                    if protection_of(row) == protection]
            if kind == "text":
                text_table(at(rows, float(rest[0])))
            elif kind == "kl":
                kl_table(rows, budgets_of(rest[0]))
            else:
                against_table(rows, rest[0], budgets_of(rest[1]))
        elif kind == "score":
            score_table(summary_of(path), rest[0], int(rest[1]), rest[2], rest[3:])
        elif kind == "depths":
            depths_table(records_of(path), rest[0], float(rest[1]), rest[2], rest[3:])
        elif kind == "protection":
            protection_table(texts_of(records_of(path), length, rest[1:]), budgets_of(rest[0]))
        else:
            raise ValueError(f"unknown table '{kind}'")
    except (ValueError, IndexError, KeyError, OSError) as error:
        sys.exit(f"markdown_table.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
