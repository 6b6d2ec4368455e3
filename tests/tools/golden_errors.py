#!/usr/bin/env python3
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
"""kvlean-golden must find what is wrong with a golden folder, and say so by its lines and status.

    usage: golden_errors.py [--all] [KVLEAN_GOLDEN [DIR]]

KVLEAN_GOLDEN defaults to kvlean-golden in $KVLEAN_BIN, DIR to tests/golden. One tensor of every
compared method and output is changed, beyond tolerance, in a copy of DIR's smallest layer; --all
changes every tensor of DIR. Then files are damaged in other ways. Exits 0 if no case failed.
"""
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile

LAYER, ORACLE = "mha.safetensors", "oracle_mha.safetensors"
FORMATS = {"F32": "f", "I32": "i", "U8": "B"}
counts = {"ok": 0, "FAIL": 0}


def report(name, why):
    counts["FAIL" if why else "ok"] += 1
    if why:
        print(f"FAIL  {name}: {why}")


class File:
    def __init__(self, path):
        with open(path, "rb") as file:
            data = file.read()
        size = struct.unpack("<Q", data[:8])[0]
        self.header = json.loads(data[8:8 + size])
        self.metadata = self.header.pop("__metadata__")
        self.data = data[8 + size:]
        self.blobs = {}
        for name, info in self.header.items():
            begin, end = info["data_offsets"]
            self.blobs[name] = data[8 + size + begin:8 + size + end]

    def save(self, path):
        header, parts, at = {"__metadata__": self.metadata}, [], 0
        for name, info in self.header.items():
            blob = self.blobs[name]
            header[name] = dict(info, data_offsets=[at, at + len(blob)])
            at += len(blob)
            parts.append(blob)
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))

    def values(self, name):
        kind = FORMATS[self.header[name]["dtype"]]
        return list(struct.unpack(f"<{math.prod(self.header[name]['shape'])}{kind}", self.blobs[name]))

    def set_values(self, name, values):
        kind = FORMATS[self.header[name]["dtype"]]
        self.blobs[name] = struct.pack(f"<{len(values)}{kind}", *values)


def run(tool, folder):
    """Status, {(file, tensor): word} and all lines of standard output."""
    done = subprocess.run([tool, folder], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    words = {}
    for line in lines[:-1]:
        fields = line.split(" ")
        if len(fields) != 5 or fields[0] not in ("PASS", "FAIL", "NOT_IMPLEMENTED"):
            report("line", f"'{line}' is not of the form 'word file tensor max_error tolerance'")
            continue
        float(fields[3]), float(fields[4])
        words[fields[1], fields[2]] = fields[0]
    match = re.match(r"total: (\d+) PASS, (\d+) FAIL, (\d+) NOT_IMPLEMENTED", lines[-1] if lines else "")
    if lines:
        said = [int(n) for n in match.groups()] if match else None
        seen = [list(words.values()).count(w) for w in ("PASS", "FAIL", "NOT_IMPLEMENTED")]
        if said != seen:
            report("counts", f"'{lines[-1]}' after {seen} lines")
    return done.returncode, words, lines + done.stderr.splitlines()


def changes(name, method, values, width):
    """Ways to change a tensor that must be found, by a word for each."""
    output = name.rsplit(".", 1)[1]
    at = random.randrange(len(values))
    result = {}
    if isinstance(values[0], int):
        flipped = 1 - values[at] if output == "keep" else values[at] + 1
        result["off by one"] = values[:at] + [flipped] + values[at + 1:]
        if output == "keep":
            row = values[:width]
            a, b = row.index(1), row.index(0)
            result["swapped"] = [1 - v if i in (a, b) else v for i, v in enumerate(values)]
        return result
    row = values[at // width * width:][:width]
    unpinned = [abs(v) for v in row]
    if method in ("snapkv", "tova"):
        unpinned = [v for v in unpinned if v < max(unpinned) - 0.5]
        last = len(values) - 1
        result["unpinned"] = values[:last] + [0.0]
        if abs(values[at]) > max(unpinned):
            at = at // width * width
    if output in ("score", "attn_colsum", "hh_score"):
        step = 6e-5 * max(unpinned)
    elif output == "uniform":
        step = 1.5
    else:
        step = 3e-4
    result["changed"] = values[:at] + [values[at] + step] + values[at + 1:]
    result["nan"] = values[:at] + [math.nan] + values[at + 1:]
    if method in ("adakv_official", "h2o_official") and output in ("keys", "values", "flat_keys", "flat_values"):
        bits = struct.unpack("<I", struct.pack("<f", values[at]))[0] ^ 1
        result["one bit"] = values[:at] + [struct.unpack("<f", struct.pack("<I", bits))[0]] + values[at + 1:]
    return result


def method_of(file, name):
    if name.startswith("ref."):
        return "ref"
    case = max((k for k in file.metadata if name.startswith(k + ".")), key=len)
    return json.loads(file.metadata[case]).get("method", case.split(".")[0])


def check_changes(tool, source, folder, names, everything):
    """Every compared tensor that is changed must FAIL."""
    files = {name: File(os.path.join(source, name)) for name in names}
    for name, file in files.items():
        file.save(os.path.join(folder, name))
    status, words, lines = run(tool, folder)
    report("untouched", "" if status == 0 else f"status {status}, {lines[-1]}")
    seen = set()
    for (where, tensor), word in sorted(words.items()):
        if word != "PASS":
            continue
        file = files[where]
        method = method_of(file, tensor)
        kind = (method, tensor.rsplit(".", 1)[1])
        if kind in seen and not everything:
            continue
        seen.add(kind)
        before = file.blobs[tensor]
        width = file.header[tensor]["shape"][-1]
        ways = changes(tensor, method, file.values(tensor), width)
        if not everything:
            ways = {way: ways[way] for way in list(ways)[:1]}
        for way, values in ways.items():
            file.set_values(tensor, values)
            file.save(os.path.join(folder, where))
            status, after, _ = run(tool, folder)
            wanted = (1, 2) if tensor.endswith("head_lens") else (1,)
            if status not in wanted or after.get((where, tensor)) != "FAIL":
                report(f"{way} {where} {tensor}", f"status {status}, {after.get((where, tensor))}")
            else:
                report(way, "")
        file.blobs[tensor] = before
        file.save(os.path.join(folder, where))
    return seen


def check_damage(tool, source, folder):
    """Files that cannot be judged: status 2, and a line that says why."""
    def damaged(name, wanted, change, pattern):
        layer, oracle = File(os.path.join(source, LAYER)), File(os.path.join(source, ORACLE))
        for case in list(oracle.metadata):  # one of each method is enough
            if case.startswith("kvmerger.") and not case.endswith("slots50"):
                del oracle.metadata[case]
                for tensor in [t for t in oracle.header if t.startswith(case + ".")]:
                    del oracle.header[tensor]
        change(layer, oracle)
        layer.save(os.path.join(folder, LAYER))
        oracle.save(os.path.join(folder, ORACLE))
        status, words, lines = run(tool, folder)
        found = any(re.search(pattern, line) for line in lines)
        why = "" if status == wanted and found else f"status {status}, '{pattern}' found: {found}"
        report(name, why)

    def delete(which, tensor):
        return lambda layer, oracle: (oracle if which else layer).header.pop(tensor)

    def rename(layer, oracle):
        layer.metadata["anew"] = layer.metadata.pop("knorm")

    def reshape(layer, oracle):
        layer.header["knorm.score"]["shape"] = layer.header["knorm.score"]["shape"][::-1]

    def params(case, **changed):
        def change(layer, oracle):
            value = json.loads(layer.metadata[case])
            for key, new in changed.items():
                if new is None:
                    del value["params"][key]
                else:
                    value["params"][key] = new
            layer.metadata[case] = json.dumps(value)
        return change

    def method(case, name):
        def change(layer, oracle):
            layer.metadata[case] = json.dumps(dict(json.loads(layer.metadata[case]), method=name))
        return change

    def rename_case(layer, oracle):
        layer.metadata["any name at all"] = layer.metadata.pop("snapkv_w32_k5")
        layer.header = {n.replace("snapkv_w32_k5.", "any name at all.") if n.startswith("snapkv_w32_k5.") else n: i
                        for n, i in layer.header.items()}
        layer.blobs["any name at all.score"] = layer.blobs["snapkv_w32_k5.score"]

    def extra(layer, oracle):
        layer.header["knorm.more"] = layer.header["knorm.score"]
        layer.blobs["knorm.more"] = layer.blobs["knorm.score"]

    def no_source(layer, oracle):
        oracle.metadata["source"] = "absent.safetensors"

    for which, tensor in ((0, "in.q"), (0, "in.k"), (0, "in.v"), (0, "in.wo"), (0, "in.inv_freq"), (0, "ref.attn_out"),
                          (0, "ref.attn_colsum"), (0, "knorm.score"), (0, "keydiff.score"), (0, "chunkkv_snapkv.keys"),
                          (0, "adakv_knorm_r50.budget"), (0, "pyramidkv_n4096_r60.budget"),
                          (1, "kvmerger.slots50.slot_of_token"), (1, "kvmerger.slots50.rms.weight"),
                          (1, "kvmerger.slots50.fixed.last_query_out_log_count"), (1, "massfold.keep50.log_mass")):
        damaged(f"without {tensor}", 2, delete(which, tensor), re.escape(tensor) + ".* missing")
    damaged("a case renamed, its tensors not", 2, rename, "knorm.score: the metadata has no case")
    damaged("a case and its tensors renamed", 0, rename_case, r"^PASS \S+ any\?name\?at\?all.score")
    damaged("another shape", 2, reshape, "knorm.score has shape")
    damaged("no source file", 2, no_source, "absent.safetensors")
    damaged("unknown method", 0, method("knorm", "tomorrow"), "^NOT_IMPLEMENTED mha.safetensors knorm.score")
    damaged("unknown output", 0, extra, "^NOT_IMPLEMENTED mha.safetensors knorm.more")
    damaged("unknown pooling", 0, params("snapkv_w32_k5", pooling="median"),
            "^NOT_IMPLEMENTED mha.safetensors snapkv_w32_k5.score")
    damaged("unknown base", 0, params("adakv_knorm_r50", base="lagkv"),
            "^NOT_IMPLEMENTED mha.safetensors adakv_knorm_r50.keep")
    damaged("window as long as the layer", 0, params("snapkv_w32_k5", window=301), "not shorter than")
    damaged("no window", 1, params("snapkv_w32_k5", window=None), "'window' is missing")
    damaged("a window in words", 1, params("snapkv_w32_k5", window="32"), "'window' is not a number")
    damaged("another window", 1, params("snapkv_w32_k5", window=31), "^FAIL mha.safetensors snapkv_w32_k5.score")
    damaged("a parameter too many", 0, params("knorm", power=2), "parameters not read: power")

    with open(os.path.join(source, LAYER), "rb") as file:
        data = file.read()
    for name, part in (("truncated", data[:-7]), ("empty", b""), ("header only", data[:100]), ("noise", b"\xff" * 4096)):
        with open(os.path.join(folder, LAYER), "wb") as file:
            file.write(part)
        status, _, _ = run(tool, folder)
        report(name, "" if status == 2 else f"status {status}")
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    for name, where in (("no file", folder), ("no folder", os.path.join(folder, "absent"))):
        status, _, _ = run(tool, where)
        report(name, "" if status == 2 else f"status {status}")


def main():
    arguments = [a for a in sys.argv[1:] if a != "--all"]
    everything = len(arguments) != len(sys.argv) - 1
    tool = arguments[0] if arguments else os.path.join(os.environ.get("KVLEAN_BIN", ""), "kvlean-golden")
    if not arguments and not os.access(tool, os.X_OK):
        print("skip  everything: kvlean-golden was not built")
        return 0
    here = os.path.dirname(os.path.abspath(__file__))
    source = arguments[1] if len(arguments) > 1 else os.path.join(here, "..", "golden")
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(n for n in os.listdir(source) if n.endswith(".safetensors"))
        layers = [n for n in names if not n.startswith("oracle_")] if everything else [LAYER]
        for layer in layers:
            pair = [n for n in (layer, "oracle_" + layer) if n in names]
            check_changes(tool, source, folder, pair, everything)
            for name in pair:
                os.remove(os.path.join(folder, name))
        if LAYER in names and ORACLE in names:
            check_damage(tool, source, folder)
    print(f"{counts['ok']} cases passed, {counts['FAIL']} failed")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
