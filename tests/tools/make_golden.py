#!/usr/bin/env python3
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
"""Makes a golden folder of other shapes and parameters than the bundled one, for kvlean-golden.

    usage: make_golden.py DIR [SEED]

Formulas are those of tests/golden/README.md, written here in double precision with numpy and nothing
of the library, so that the tool and the library meet numbers that neither was tuned to.
"""
import json
import os
import struct
import sys

import numpy as np


def save(path, tensors, metadata):
    header, blobs, at = {"__metadata__": metadata}, [], 0
    types = {"f": ("F32", np.float32), "i": ("I32", np.int32), "b": ("U8", np.uint8)}
    for name in sorted(tensors, key=lambda n: (tensors[n].dtype.kind == "b", n)):
        kind, dtype = types[tensors[name].dtype.kind]
        blob = np.ascontiguousarray(tensors[name], dtype=dtype).tobytes()
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape),
                        "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


class Layer:
    def __init__(self, rng, q_heads, kv_heads, tokens, dim, value_dim):
        def similar(heads, width):
            x = rng.standard_normal((heads, tokens, width))
            stay = rng.choice([0.0, 0.6, 0.95], size=(heads, tokens))
            for t in range(1, tokens):
                s = stay[:, t, None]
                x[:, t] = s * x[:, t - 1] + np.sqrt(1 - s * s) * x[:, t]
            return x
        self.hq, self.h, self.n, self.d = q_heads, kv_heads, tokens, dim
        self.g = q_heads // kv_heads
        self.q = (1.5 * similar(q_heads, dim)).astype(np.float32)
        self.k = (1.5 * similar(kv_heads, dim)).astype(np.float32)
        self.v = rng.standard_normal((kv_heads, tokens, value_dim)).astype(np.float32)
        k = np.repeat(self.k.astype(float), self.g, 0)
        logits = self.q.astype(float) @ k.transpose(0, 2, 1) / np.sqrt(dim)
        logits = np.where(np.tril(np.ones((tokens, tokens), bool)), logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        self.p = p / p.sum(-1, keepdims=True)  # [query head][query][key]
        self.colsum = self.p.sum(1).reshape(kv_heads, self.g, tokens)

    def group(self, per_query_head, how="mean"):
        x = per_query_head.reshape(self.h, self.g, *per_query_head.shape[1:])
        return {"mean": x.mean(1), "max": x.max(1), "sum": x.sum(1)}[how]


def pool(x, kernel, how):
    half, n = kernel // 2, x.shape[-1]
    fill = 0.0 if how == "avg" else -np.inf
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], constant_values=fill)
    stack = np.stack([padded[..., i:i + n] for i in range(kernel)])
    return stack.sum(0) / kernel if how == "avg" else stack.max(0)


def snapkv(layer, p):
    w = p["window"]
    x = layer.p[:, -w:, :-w].mean(1)
    x = layer.group(pool(x, p["kernel"], p["pooling"]))
    return np.concatenate([x, np.full((layer.h, w), x.max() + 1)], 1)


def observed_attention(layer, p):
    return layer.group(layer.p.sum(1) / (layer.n - np.arange(layer.n)))


def tova(layer, p):
    x = layer.p[:, -1].mean(0)
    x[-1] = x[:-1].max() + 1
    return np.tile(x, (layer.h, 1))


def knorm(layer, p):
    return -np.linalg.norm(layer.k.astype(float), axis=-1)


def keydiff(layer, p):
    unit = layer.k.astype(float) / np.linalg.norm(layer.k.astype(float), axis=-1, keepdims=True)
    mean = unit.mean(1, keepdims=True)
    return -(unit * mean).sum(-1) / np.linalg.norm(mean, axis=-1)


def streaming_llm(layer, p):
    x = np.ones((layer.h, layer.n))
    pruned = layer.n - int(layer.n * (1 - p["ratio"]))
    x[:, p["sinks"]:p["sinks"] + pruned] = 0
    return x


def adakv(layer, p):
    score = (snapkv if p["base"] == "snapkv" else knorm)(layer, p).copy()
    kept = int(layer.n * (1 - p["ratio"]))
    for row in score:
        row[np.argsort(-row, kind="stable")[:int(kept * p["safeguard"])]] = np.finfo(np.float32).max
    keep = np.zeros(score.size, np.uint8)
    keep[np.argsort(-score.ravel(), kind="stable")[:kept * layer.h]] = 1
    keep = keep.reshape(score.shape).astype(bool)
    return {"keep": keep, "budget": keep.sum(1)}


def adakv_official(layer, p):
    w = p["window"]
    x = pool(layer.group(layer.p[:, -w:, :-w].mean(1), p["group"]), p["kernel"], p["pooling"])
    b, n = p["base_capacity"] - w, layer.n - w
    if b > n:
        rows = [np.arange(layer.n)] * layer.h
    else:
        won = np.bincount(np.argsort(-x.ravel(), kind="stable")[:b * layer.h] // n, minlength=layer.h)
        mix = won.astype(np.float32) * np.float32(1 - p["floor_alpha"]) + np.float32(int(b * p["floor_alpha"]))
        rows = [np.concatenate([np.argsort(-x[h], kind="stable")[:int(np.round(mix[h]))],
                                np.arange(n, layer.n)]) for h in range(layer.h)]
    return {"score": x, "head_lens": np.array([len(r) for r in rows]),
            "flat_keys": np.concatenate([layer.k[h][r] for h, r in enumerate(rows)]),
            "flat_values": np.concatenate([layer.v[h][r] for h, r in enumerate(rows)])}


def pyramidkv(layer, p):
    n, w, layers = p["tokens"], p["window"], p["num_layers"]
    kept = n * (1 - p["ratio"])
    mn = kept / p["beta"]
    mx = 2 * kept - mn
    if mx >= n - w:
        mx = n - w
        mn = 2 * kept - mx
    if not n >= mx >= mn >= w:
        return {"budget": np.array([round(kept)] * layers)}
    return {"budget": np.array([round(mx - i * (mx - mn) / (layers - 1)) for i in range(layers)])}


def h2o_official(layer, p):
    score = layer.p[::layer.g].sum(1)
    kept = []
    for row in score:
        if layer.n <= p["heavy"] + p["recent"]:
            kept.append(np.arange(layer.n))
            continue
        old = layer.n - p["recent"]
        heavy = np.sort(np.argsort(-row[:old], kind="stable")[:p["heavy"]])
        kept.append(np.concatenate([heavy, np.arange(old, layer.n)]))
    return {"keys": np.stack([layer.k[h][t] for h, t in enumerate(kept)]),
            "values": np.stack([layer.v[h][t] for h, t in enumerate(kept)]),
            "hh_score": np.stack([score[h][t] for h, t in enumerate(kept)])}


def cam_official(layer, p, uniform):
    row = layer.p[::layer.g, -1]
    i = layer.n - p["recent"] + 1
    later = row[:, i + 1:]
    prob = np.clip(row[:, i] / later.mean(1), 0, 1) if later.size else np.zeros(layer.h)
    values = layer.v.astype(float)
    for h in np.flatnonzero(uniform < prob):
        values[h, i + 1:i + 1 + p["receivers"]] += values[h, i] / p["receivers"]
    return {"prob": prob, "uniform": uniform, "values": values.astype(np.float32)}


def kvmerger(layer, p):
    out, n = {}, layer.n
    score = layer.colsum.mean(1)
    key, value = layer.k.astype(float), layer.v.astype(float)
    heads = []
    for h in range(layer.h):
        alone = np.arange(n) >= n - p["recent"]
        free = np.flatnonzero(~alone)
        alone[free[np.argsort(-score[h][free], kind="stable")[:p["heavy"]]]] = True
        norm = np.linalg.norm(key[h], axis=-1)
        cosine = (key[h][1:] * key[h][:-1]).sum(-1) / (norm[1:] * norm[:-1])
        can = np.flatnonzero(~alone[1:] & ~alone[:-1])
        link = np.zeros(n - 1, bool)
        if "epsilon" in p:
            link[can] = cosine[can] > p["epsilon"]
        else:
            link[can[np.argsort(-cosine[can], kind="stable")[:n - p["slots"]]]] = True
        heads.append(np.concatenate([[0], np.cumsum(~link)]))
    out["slot_of_token"] = np.stack(heads)
    for mode in ("fixed", "mean_distance", "rms"):
        weight = np.zeros((layer.h, n))
        keys, values, pivots, counts = [], [], [], []
        for h in range(layer.h):
            for slot in range(heads[h][-1] + 1):
                t = np.flatnonzero(heads[h] == slot)
                pivot = t[np.argmax(score[h][t])]
                distance = np.linalg.norm(key[h][t] - key[h][pivot], axis=-1)
                sigma = {"fixed": 5.0, "mean_distance": distance.mean() / np.sqrt(2),
                         "rms": np.sqrt((distance ** 2).mean())}[mode]
                g = np.exp(-distance ** 2 / (2 * sigma ** 2)) if sigma > 0 else np.ones(len(t))
                w = g / g.sum()
                weight[h][t] = w
                keys.append(w @ key[h][t])
                values.append(w @ value[h][t])
                pivots.append(pivot)
                counts.append(len(t))
        lens = np.array([h[-1] + 1 for h in heads])
        for name, use in (("last_query_out", 0.0), ("last_query_out_log_count", 1.0)):
            result, starts = [], np.concatenate([[0], np.cumsum(lens)])
            for qh in range(layer.hq):
                a, b = starts[qh // layer.g], starts[qh // layer.g + 1]
                logit = np.array(keys[a:b]) @ layer.q[qh, -1].astype(float) / np.sqrt(layer.d)
                logit += use * np.log(counts[a:b])
                s = np.exp(logit - logit.max())
                result.append(s @ np.array(values[a:b]) / s.sum())
            out[f"{mode}.{name}"] = np.array(result)
        out.update({f"{mode}.weight": weight, f"{mode}.pivot": np.array(pivots),
                    f"{mode}.count": np.array(counts), f"{mode}.head_lens": lens})
        if p["heavy"] % 2 == 0:
            out.update({f"{mode}.flat_keys": np.array(keys), f"{mode}.flat_values": np.array(values)})
    return out


def massfold(layer, p):
    score = layer.colsum.mean(1)
    kept, mass, values = [], [], []
    for h in range(layer.h):
        keep = np.sort(np.argsort(-score[h], kind="stable")[:p["keep"]])
        unit = layer.k[h].astype(float)
        unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
        total, value = np.ones(len(keep)), layer.v[h][keep].astype(float)
        for e in np.setdiff1d(np.arange(layer.n), keep):
            to = np.argmax(unit[keep] @ unit[e])
            w = score[h][e] / score[h][keep[to]]
            total[to] += w
            value[to] += w * layer.v[h][e]
        kept.append(keep)
        mass.append(np.log(total))
        values.append(value / total[:, None])
    return {"kept": np.array(kept), "log_mass": np.array(mass), "values": np.array(values)}


def cases_of(rng, n, w):
    def ratio():
        return round(float(rng.uniform(0.1, 0.9)), 2)
    few = max(2, n // 8)
    window = min(w, n // 3)
    snap = {"window": window, "kernel": int(rng.choice([1, 3, 9])), "pooling": str(rng.choice(["avg", "max"]))}
    yield "plain norm", "knorm", {}
    yield "s.n.a.p", "snapkv", snap
    yield "s.n.a.p2", "snapkv", {"window": 1, "kernel": 5, "pooling": "avg"}
    yield "stream", "streaming_llm", {"ratio": ratio(), "sinks": int(rng.integers(0, 7))}
    yield "t", "tova", {}
    yield "obs", "observed_attention", {}
    for i in range(4):
        yield f"ada{i}", "adakv", {"base": "knorm", "ratio": ratio(), "safeguard": [0.0, 0.29, 0.5, 1.0][i]}
        yield f"adas{i}", "adakv", dict(snap, base="snapkv", ratio=ratio(), safeguard=[0.2, 0.07, 0.7, 0.35][i])
    for i, capacity in enumerate([window + few, window + n // 3, n, n + 5, window]):
        yield f"off.{i}", "adakv_official", dict(
            snap, kernel=[3, 7][i % 2], pooling="max", group=["mean", "max"][i % 2],
            base_capacity=capacity, floor_alpha=[0.2, 0.5, 0.3, 0.29, 0.1][i])
    for i in range(6):
        yield f"pyr{i}", "pyramidkv", {"tokens": int(rng.integers(64, 9000)), "ratio": ratio(), "window": [8, 64][i % 2],
                                       "beta": [20, 7][i % 2], "num_layers": int(rng.integers(2, 60))}
    first = {"query_head": "first of each group"}
    for i, (heavy, recent) in enumerate([(few, few), (1, n // 2), (n, 3), (0, 5)]):
        yield f"h{i}", "h2o_official", dict(first, heavy=heavy, recent=recent)
    for i, recent in enumerate([3, n // 2, n // 4, n]):
        yield f"cam{i}", "cam_official", dict(first, recent=recent, receivers=[32, 5][i % 2],
                                              uniform=["input", "input, all zero"][i // 2])
    yield "differs", "keydiff", {}
    yield "later", "lagkv", {}
    yield "news", "published_tomorrow", {"alpha": 1}


def main():
    folder, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {"wide": (10, 5, 150, 48, 48), "one_head": (7, 1, 97, 80, 80), "line": (32, 2, 33, 1, 1),
              "tall_values": (3, 3, 61, 24, 40), "square": (8, 8, 260, 128, 128), "tiny": (2, 1, 9, 4, 4)}
    for name, (hq, h, n, d, dv) in shapes.items():
        layer = Layer(rng, hq, h, n, d, dv)
        tensors = {"in.q": layer.q, "in.k": layer.k, "in.v": layer.v, "ref.attn_colsum": layer.colsum,
                   "ref.attn_out": layer.p @ np.repeat(layer.v.astype(float), layer.g, 0)}
        metadata = {"q_heads": str(hq), "kv_heads": str(h), "head_dim": str(d), "tokens": str(n)}
        for case, method, params in cases_of(rng, n, 16):
            if method == "cam_official":
                draw = rng.uniform(size=h) if params["uniform"] == "input" else np.zeros(h)
                out = cam_official(layer, params, draw.astype(np.float32))
            elif method in ("lagkv", "published_tomorrow"):
                out = {"score": np.zeros((h, n))}
            else:
                out = globals()[method](layer, params)
            out = out if isinstance(out, dict) else {"score": out}
            tensors.update({f"{case}.{key}": value for key, value in out.items()})
            metadata[case] = json.dumps({"method": method, "source": "formulas", "params": params})
        save(os.path.join(folder, name + ".safetensors"), tensors, metadata)

        tensors, metadata = {}, {"source": name + ".safetensors", "made_with": "numpy"}
        for i, p in enumerate([{"recent": n // 6, "heavy": n // 9 // 2 * 2, "epsilon": 0.75},
                               {"recent": n // 12, "heavy": 1, "epsilon": -0.2},
                               {"recent": n // 10, "heavy": n // 20 // 2 * 2, "slots": n // 2},
                               {"recent": 0, "heavy": 0, "slots": max(2, n // 5)}]):
            tensors.update({f"kvmerger.set{i}.{k}": v for k, v in kvmerger(layer, p).items()})
            metadata[f"kvmerger.set{i}"] = json.dumps(p)
        for keep in (max(1, n // 5), n // 2, n - 1):
            tensors.update({f"massfold.k{keep}.{k}": v for k, v in massfold(layer, {"keep": keep}).items()})
            metadata[f"massfold.k{keep}"] = json.dumps({"keep": keep, "note": "mean over the group"})
        save(os.path.join(folder, "oracle_" + name + ".safetensors"), tensors, metadata)


if __name__ == "__main__":
    main()
