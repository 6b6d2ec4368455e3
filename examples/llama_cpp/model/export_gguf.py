#!/usr/bin/env python3
"""Writes a checkpoint of train.py as an F16 GGUF file: export_gguf.py CHECKPOINT OUTPUT

Matrices are F16, norm weights F32. The writer below knows as much of the format as this needs.
"""

import struct
import sys

import numpy as np
import torch

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
ALIGNMENT = 32


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, x):
    if kind == STRING:
        return string(x)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], x)


def array(kind, xs):
    return struct.pack("<IQ", kind, len(xs)) + b"".join(value(kind, x) for x in xs)


def write_gguf(path, metadata, tensors):
    """metadata: (key, type, value), or (key, (ARRAY, type), values). tensors: {name: array}."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, kind, x in metadata:
        out.append(string(key))
        if isinstance(kind, tuple):
            out.append(struct.pack("<I", ARRAY) + array(kind[1], x))
        else:
            out.append(struct.pack("<I", kind) + value(kind, x))
    offset, blobs = 0, []
    for name, tensor in tensors.items():
        kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}[tensor.dtype]
        out.append(string(name) + struct.pack("<I", tensor.ndim) +
                   struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) +
                   struct.pack("<IQ", kind, offset))
        data = tensor.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
        blobs.append(data)
        offset += len(data)
    head = b"".join(out)
    head += bytes(-len(head) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(head + b"".join(blobs))
    return len(head) + offset


def vocabulary():
    """Texts and types of the tokens: token b is byte b, then BOS, EOS, unknown and padding.

    The RWKV flavour of llama.cpp is the one that takes any bytes: it matches the unescaped texts of
    the tokens against the input. (Its SentencePiece flavour writes a space as U+2581 first, and its
    BPE flavour replaces what is no UTF-8.) The four control tokens must match nothing, so their
    texts are escapes that were begun and not ended: they unescape to no bytes. Their last letter is
    no hexadecimal digit, so that no program text holds them."""
    normal, unknown, control = 1, 2, 3
    texts = [f"\\x{b:02x}" for b in range(256)] + ["\\xS", "\\xT", "\\xU", "\\xP"]
    return texts, [normal] * 256 + [control, control, unknown, control]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    saved = torch.load(sys.argv[1], map_location="cpu")
    s, weights = saved["shape"], saved["model"]
    texts, types = vocabulary()
    assert len(texts) == s["vocab"]
    metadata = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "kvlean-tiny"),
        ("general.basename", STRING, "kvlean-tiny"),
        ("general.description", STRING,
         "Byte-level model for tests of KV cache compression: recall, copying, variable tracking"),
        ("general.license", STRING, "apache-2.0"),
        ("general.languages", (ARRAY, STRING), ["en"]),
        ("general.file_type", UINT32, 1),
        ("general.alignment", UINT32, ALIGNMENT),
        ("llama.block_count", UINT32, s["layers"]),
        ("llama.context_length", UINT32, s["context"]),
        ("llama.embedding_length", UINT32, s["width"]),
        ("llama.feed_forward_length", UINT32, s["hidden"]),
        ("llama.attention.head_count", UINT32, s["heads"]),
        ("llama.attention.head_count_kv", UINT32, s["kv_heads"]),
        ("llama.attention.key_length", UINT32, s["head"]),
        ("llama.attention.value_length", UINT32, s["head"]),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, s["eps"]),
        ("llama.rope.dimension_count", UINT32, s["head"]),
        ("llama.rope.freq_base", FLOAT32, s["theta"]),
        ("llama.vocab_size", UINT32, s["vocab"]),
        ("tokenizer.ggml.model", STRING, "rwkv"),
        ("tokenizer.ggml.tokens", (ARRAY, STRING), texts),
        ("tokenizer.ggml.token_type", (ARRAY, INT32), types),
        ("tokenizer.ggml.bos_token_id", UINT32, 256),
        ("tokenizer.ggml.eos_token_id", UINT32, 257),
        ("tokenizer.ggml.unknown_token_id", UINT32, 258),
        ("tokenizer.ggml.padding_token_id", UINT32, 259),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
        ("tokenizer.ggml.add_eos_token", BOOL, False),
        ("tokenizer.ggml.add_space_prefix", BOOL, False),
    ]

    names = {"embedding": "token_embd", "norm": "output_norm", "output": "output"}
    for layer in range(s["layers"]):
        for ours, theirs in (("attn_norm", "attn_norm"), ("q", "attn_q"), ("k", "attn_k"),
                             ("v", "attn_v"), ("o", "attn_output"), ("ffn_norm", "ffn_norm"),
                             ("gate", "ffn_gate"), ("up", "ffn_up"), ("down", "ffn_down")):
            names[f"blocks.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    tensors = {}
    for ours, theirs in names.items():
        tensor = weights[ours].float().numpy()
        tensors[theirs + ".weight"] = tensor.astype(np.float16) if tensor.ndim == 2 else tensor
    size = write_gguf(sys.argv[2], metadata, tensors)
    print(f"{sys.argv[2]}: {size} bytes, {sum(t.size for t in tensors.values())} parameters")


if __name__ == "__main__":
    main()
