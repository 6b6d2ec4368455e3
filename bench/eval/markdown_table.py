#!/usr/bin/env python3
"""Prints tables of docs/results.md from a summary that kvlean-eval --json wrote.

usage: markdown_table.py SUMMARY.json text BUDGET [POLICY ...]
       markdown_table.py SUMMARY.json against BASELINE BUDGET [POLICY ...]
       markdown_table.py SUMMARY.json score TASK LENGTH MODE

text: KL to the full cache and what goes with it, the best first. against: paired differences of KL
to a policy that kvlean-eval was given as --baseline. score: a task's score, a column a budget.
"""
import json
import sys


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["records"]


def chosen(rows, budget, policies):
    rows = [row for row in rows if row["task"] == "text" and abs(row["budget"] - budget) < 1e-9]
    if policies:
        rows = [row for row in rows if row["policy"] in policies]
    return sorted(rows, key=lambda row: row["kl_mean"])


def text_table(rows):
    print("| policy | KL, mean | 95 % interval | median | p99 | same top token | benefit kept | "
          "attention error, open / closed loop |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        kept = "–" if row["retention"] is None else f"{row['retention']:.2f}"
        print(f"| `{row['policy']}` | {row['kl_mean']:.3f} | {row['kl_mean_low']:.3f} – "
              f"{row['kl_mean_high']:.3f} | {row['kl_median']:.4f} | {row['kl_p99']:.2f} | "
              f"{100 * row['top1']:.1f} % | {kept} | {row['attention_error_open']:.3f} / "
              f"{row['attention_error_closed']:.3f} |")


def against_table(rows, baseline):
    print(f"| policy | KL minus that of `{baseline}` | 95 % interval, paired |")
    print("|---|---|---|")
    for row in rows:
        if row["policy"] == baseline:
            continue
        key = f"kl_vs_{baseline}"
        print(f"| `{row['policy']}` | {row[key]:+.3f} | {row[key + '_low']:+.3f} – "
              f"{row[key + '_high']:+.3f} |")


def score_table(rows, task, length, mode):
    rows = [row for row in rows
            if row["task"] == task and row["length"] == length and row["mode"] == mode]
    budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
    score = {(row["policy"], row["budget"]): row["score"] for row in rows}
    policies = sorted({row["policy"] for row in rows if row["budget"] < 1},
                      key=lambda policy: [-score[policy, budget] for budget in budgets])
    print("| policy | " + " | ".join(f"{100 * budget:g} %" for budget in budgets) + " |")
    print("|---" * (len(budgets) + 1) + "|")
    for policy in policies:
        cells = (f"{100 * score[policy, budget]:.0f}" for budget in budgets)
        print(f"| `{policy}` | " + " | ".join(cells) + " |")


def main(arguments):
    try:
        path, kind, *rest = arguments
        rows = rows_of(path)
        if kind == "text":
            text_table(chosen(rows, float(rest[0]), rest[1:]))
        elif kind == "against":
            against_table(chosen(rows, float(rest[1]), rest[2:]), rest[0])
        elif kind == "score":
            score_table(rows, rest[0], int(rest[1]), rest[2])
        else:
            raise ValueError(f"unknown table '{kind}'")
    except (ValueError, IndexError, KeyError, OSError) as error:
        sys.exit(f"markdown_table.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
