#!/usr/bin/env python3
# Copyright 2026 The KVLean Authors
# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU what the torch implementations do, for tests/cuda/run.sh to print beside our rows.

One Llama-3.1-8B layer (32 query and 8 KV heads of 128) in bf16, 35 % kept. The forms are those of
peers.py and of kvpress' presses, written from their formulas: scores, top-k, gather. Medians of
CUDA events over inputs that rotate beyond the L2 cache, the calls of a form on one stream."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers  # noqa: E402  (says what is missing, and stops)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

HEADS, GROUP, DIM, WINDOW, KEEP = 8, 4, 128, 32, 0.35


def median_ms(form, inputs, rounds=20):
    for i in range(3):
        form(*inputs[i % len(inputs)])
    times = []
    for i in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        form(*inputs[i % len(inputs)])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def keep_best(scores, keys, values):
    """The rows with the best scores, gathered as kvpress' ScorerPress gathers them."""
    kept = scores.topk(int(scores.shape[-1] * KEEP), dim=-1).indices[..., None].expand(-1, -1, DIM)
    return keys.gather(1, kept).contiguous(), values.gather(1, kept).contiguous()


def key_norm(keys, values):
    return keep_best(-keys.norm(dim=-1), keys, values)


def key_diff(keys, values):
    anchor = F.normalize(keys, p=2, dim=-1).mean(dim=1, keepdim=True)
    return keep_best(-F.cosine_similarity(keys, anchor, dim=-1), keys, values)


def snapkv(keys, values, queries):
    scores = peers.snapkv_scores(keys, queries, WINDOW, 5)
    return keep_best(scores, keys, values)


def adakv(keys, values, queries):
    """Ada-SnapKV, flattened heads: scores, budgets and a copy of each head's rows."""
    index, lengths = peers.adakv_choice(peers.snapkv_scores(keys, queries, WINDOW, 5), KEEP, 0.2)
    return [(keys[h, index[h, :n]], values[h, index[h, :n]]) for h, n in enumerate(lengths)]


def row(name, ms):
    print(f"{name:<60} {ms:9.4f}", flush=True)


def main():
    if not torch.cuda.is_available():
        peers.die("torch sees no GPU")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    def rows(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    print(f"{'work, as torch does it':<60} {'ms':>9}")
    for tokens in (4096, 32768, 131072):
        layers = [(rows(HEADS, tokens, DIM), rows(HEADS, tokens, DIM)) for _ in range(3)]
        seen = rows(HEADS * GROUP, WINDOW, DIM)
        queried = [(k, v, seen) for k, v in layers]
        scored = [(k, seen, WINDOW, 5) for k, _ in layers]
        row(f"SnapKV scoring, w = 32, {tokens} tokens", median_ms(peers.snapkv_scores, scored))
        row(f"SnapKV whole, {tokens} tokens", median_ms(snapkv, queried))
        row(f"Ada-KV whole, {tokens} tokens", median_ms(adakv, queried))
        row(f"key norm compress, {tokens} tokens", median_ms(key_norm, layers))
        row(f"KeyDiff compress, {tokens} tokens", median_ms(key_diff, layers))
        scores = [(torch.rand(HEADS, tokens, device="cuda"),) for _ in range(3)]
        row(f"top-k of 8 x {tokens} scores",
            median_ms(lambda s: s.topk(int(tokens * KEEP), dim=-1), scores))
        kept = int(tokens * KEEP)
        stored = [(rows(1, HEADS * GROUP, 1, DIM), rows(1, HEADS, kept, DIM),
                   rows(1, HEADS, kept, DIM)) for _ in range(3)]
        row(f"decode: SDPA on equal lengths, 35 % of {tokens}",
            median_ms(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                      stored))
        del layers, queried, scored, scores, stored
    for tokens in (4096, 32768):
        prefill = [(rows(1, HEADS * GROUP, tokens, DIM), rows(1, HEADS, tokens, DIM),
                    rows(1, HEADS, tokens, DIM))]
        row(f"SDPA forward over a prefill of {tokens}",
            median_ms(lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True), prefill, rounds=7))
    prefill = [(rows(HEADS, 4096, DIM), rows(HEADS * GROUP, 4096, DIM))]
    row("H2O sums through the N x N matrix, prefill of 4096",
        median_ms(peers.h2o_sums, prefill, rounds=7))


if __name__ == "__main__":
    main()
