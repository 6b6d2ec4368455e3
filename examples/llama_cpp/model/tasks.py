"""Texts and tasks of the model: recall, copying, variable tracking and plain text.

train.py draws its batches here, and the same generators evaluate: `sequence` makes one training
sequence, `question` one evaluation prompt with its answer. README.md describes the formats.

Everything is bytes. Everything random comes from a `random.Random`, so a seed fixes the output.
"""

import random
import re
from pathlib import Path

import numpy as np

BOS = 256  # the token before every sequence; token b is byte b below that

# What a byte of a training sequence is. train.py gives each class its weight in the loss.
TEXT, STATEMENT, QUERY, ANSWER, COPY, TRACK = range(6)

LOWER = b"abcdefghijklmnopqrstuvwxyz"
UPPER = LOWER.upper()
DIGITS = b"0123456789"
PRINTABLE = bytes(range(33, 127))

ADJECTIVES = """amber ancient bitter bold brave bright broken calm clever cold crimson curious dark
deep distant dry early eager empty faint fierce frozen gentle golden grand green happy heavy hidden
hollow honest humble iron jolly keen lazy light little lively lonely loud lucky merry mighty misty
narrow nimble noble patient plain proud purple quick quiet rapid rough royal rusty scarlet secret
sharp shy silent silver simple sleepy slow small smooth solemn steady stormy strange strong sudden
sunny swift tall tender tiny vast velvet warm wild wise yellow young""".encode().split()
NOUNS = """anchor apple arrow badger basket beacon bear bell bird boat bottle bridge brook button
candle canyon carpet castle cedar circle cloud comet copper crow desert dragon drum eagle engine
falcon feather fern field flame forest fox garden glacier hammer harbor hawk hill horse island
jacket kettle ladder lake lamp lantern leaf lion maple marble meadow mirror moon mountain needle
oak ocean otter owl paper pebble pencil pepper pillow planet pocket pond rabbit raven ribbon river
road rocket rose sail shadow shell ship spider spoon spring star stone table temple thunder tiger
tower tree tunnel valley violin wagon walnut whale willow window winter wolf""".encode().split()
VERBS = """crossed carried found followed guarded heard held helped hid kept knew left liked lost
met moved painted passed reached saw sold sought taught took touched turned visited watched""" \
    .encode().split()
NOISE = (b"The grass is green. The sky is blue. The sun is yellow. Here we go. "
         b"There and back again. ")

# Name: statement, question up to the value, what follows the value. %k is the key, %v the value.
RECALL = {
    "code": (b"the code of %k is %v.", b"what is the code of %k? ", b"."),
    "passkey": (b"The pass key is %v. Remember it. %v is the pass key.",
                b"What is the pass key? The pass key is ", b"."),
    "needle": (b"One of the special magic numbers for %k is: %v.",
               b"What is the special magic number for %k mentioned in the provided text? The "
               b"special magic number for %k mentioned in the provided text is ", b"."),
    "line": (b"line %k: REGISTER_CONTENT is <%v>",
             b"Tell me what is the <REGISTER_CONTENT> in line %k? The <REGISTER_CONTENT> in line "
             b"%k is <", b">"),
    "json": (b'"%k": "%v",', b'"%k": "', b'",'),
    "plain": (b"%k: %v", b"%k: ", b"\n"),
    "assign": (b"%k = %v;", b"%k = ", b";"),
}
RECALL_WEIGHTS = {"code": 8, "passkey": 2, "needle": 3, "line": 1.5, "json": 2, "plain": 2,
                  "assign": 1.5}
KEY_KINDS = {"letters": 4, "words": 4, "upper": 1, "vocabulary": 2, "number": 1, "hex": 1}
VALUE_KINDS = {"digits": 6, "letters": 2, "upper": 1, "words": 1, "hex": 1}


class Texts:
    """The plain texts of a folder of .txt files, and slices of them."""

    def __init__(self, folder):
        self.texts = []
        for path in sorted(Path(folder).glob("*.txt")):
            text = path.read_bytes()
            self.texts.append(text)
            if path.name == "kjv.txt":  # a second time, without "Ge1:1 " before each verse
                self.texts.append(re.sub(rb"(?m)^\w+:\d+ ", b"", text))
        if not self.texts:
            raise SystemExit(f"{folder}: no .txt files; run get_texts.sh first")
        self.sizes = [len(text) for text in self.texts]
        words = re.findall(rb"\b[a-z]{3,9}\b", b" ".join(text[:400000] for text in self.texts))
        self.vocabulary = sorted(set(words))

    def slice(self, rng, length):
        """`length` bytes of one text, from the beginning of a word on."""
        text = rng.choices(self.texts, self.sizes)[0]
        start = rng.randrange(max(1, len(text) - length - 64))
        start += min(text[start:start + 64].find(b" ") + 1, max(0, len(text) - length - start))
        return text[start:start + length]


def letters(rng, alphabet, length):
    return bytes(rng.choices(alphabet, k=length))


def pick(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def make_key(rng, kind, texts):
    if kind == "letters":
        return letters(rng, LOWER, rng.randint(5, 8))
    if kind == "words":
        key = rng.choice(ADJECTIVES) + b"-" + rng.choice(NOUNS)
        return key if rng.random() < 0.8 else rng.choice(ADJECTIVES) + b"-" + key
    if kind == "upper":
        return letters(rng, UPPER, rng.randint(4, 8))
    if kind == "vocabulary":
        return b"-".join(rng.choices(texts.vocabulary, k=rng.randint(1, 3)))
    if kind == "number":
        return letters(rng, DIGITS, rng.randint(4, 6))
    return letters(rng, b"0123456789abcdef", rng.choice((8, 12, 16)))


def make_value(rng, kind):
    if kind == "digits":
        return letters(rng, DIGITS, rng.randint(5, 7))
    if kind == "letters":
        return letters(rng, LOWER, rng.randint(5, 8))
    if kind == "upper":
        return letters(rng, UPPER, rng.randint(4, 8))
    if kind == "words":
        return rng.choice(ADJECTIVES) + b"-" + rng.choice(NOUNS)
    return letters(rng, b"0123456789abcdef", rng.choice((8, 12, 16)))


def make_keys(rng, kind, count, texts):
    """`count` different keys of one kind."""
    keys = {}
    while len(keys) < count:
        keys[make_key(rng, kind, texts)] = None
    return list(keys)


def fill(template, key, value=b""):
    return template.replace(b"%k", key).replace(b"%v", value)


def random_words(rng, texts, length):
    words = texts.vocabulary if rng.random() < 0.5 else ADJECTIVES + NOUNS + VERBS
    return b" ".join(rng.choices(words, k=length // 4 + 2))[:length]


def sentences(rng, length):
    """'the brave otter watched the silver lamp.' and so on."""
    out, size = [], 0
    while size < length:
        line = b"the %s %s %s the %s %s. " % (rng.choice(ADJECTIVES), rng.choice(NOUNS),
                                             rng.choice(VERBS), rng.choice(ADJECTIVES),
                                             rng.choice(NOUNS))
        out.append(line)
        size += len(line)
    return b"".join(out)[:length]


def filler(rng, kind, length, texts):
    """`length` bytes that hold no task."""
    if kind == "text":
        return texts.slice(rng, length)
    if kind == "sentences":
        return sentences(rng, length)
    if kind == "noise":
        return (NOISE * (length // len(NOISE) + 1))[:length]
    return random_words(rng, texts, length)


def passage(rng, kind, length, texts):
    """One line to copy."""
    if kind == "text":
        out = texts.slice(rng, length)
    elif kind == "words":
        out = random_words(rng, texts, length)
    elif kind == "few words":
        out = b" ".join(rng.choices(rng.choices(texts.vocabulary, k=rng.randint(4, 20)),
                                    k=length // 4 + 2))[:length]
    elif kind == "sentences":
        out = sentences(rng, length)
    elif kind == "letters":
        out = letters(rng, LOWER + b"    ", length)
    elif kind == "hex":
        out = letters(rng, b"0123456789abcdef", length)
    else:
        out = letters(rng, PRINTABLE, length)
    out = re.sub(rb"\s", b" ", out).strip()
    return out + letters(rng, LOWER, length - len(out))


PASSAGES = {"text": 6, "words": 3, "few words": 2, "sentences": 2, "letters": 2, "hex": 1,
            "printable": 1}


# An event is (time, parts): what stands at one place of a sequence. Times lie in 0..1 for the body
# and from 1 on for the end. A part is (bytes, class).

def asked_at(rng, after, at_end):
    return 1 + rng.random() if at_end else rng.uniform(after, 1)


def recall_events(rng, texts, budget, at_end, used):
    name = pick(rng, RECALL_WEIGHTS)
    if name == "passkey" and name in used:  # a sequence has one pass key at most
        name = "code"
    used.add(name)
    statement, query, suffix = RECALL[name]
    key_kind, value_kind = pick(rng, KEY_KINDS), pick(rng, VALUE_KINDS)
    if name == "passkey":
        count = 1
    else:
        cost = len(statement) + 1.4 * len(query) + 30
        count = min(rng.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)), int(budget / cost) + 1)
    events = []
    for key in make_keys(rng, key_kind, count, texts):
        value, time = make_value(rng, value_kind), rng.random()
        events.append((time, [(fill(statement, key, value), STATEMENT)]))
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2)) if count > 1 else rng.choice((1, 1, 2))):
            events.append((asked_at(rng, time, at_end),
                           [(fill(query, key), QUERY), (value + suffix, ANSWER)]))
    return events


def copy_events(rng, texts, budget, at_end, _):
    length = rng.randint(min(64, budget // 3), min(512, max(64, budget // 2)))
    text, time = passage(rng, pick(rng, PASSAGES), length, texts), rng.random()
    return [(time, [(b"passage: " + text, STATEMENT)]),
            (asked_at(rng, time, at_end),
             [(b"repeat: " + text[:16], QUERY), (text[16:] + b"\n", COPY)])]


def make_chains(rng, chains, hops):
    """`chains` chains of `hops` + 1 names each, with their values; nothing occurs twice."""
    names = make_unique(rng, UPPER, sum(hops) + chains)
    values = make_unique(rng, DIGITS, chains)
    out = []
    for value, count in zip(values, hops):
        out.append((value, names[:count + 1]))
        del names[:count + 1]
    return out


def make_unique(rng, alphabet, count):
    out = {}
    while len(out) < count:
        out[letters(rng, alphabet, 5)] = None
    return list(out)


def chain_statements(value, names):
    return [b"VAR %s = %s." % (name, value if i == 0 else names[i - 1])
            for i, name in enumerate(names)]


def track_events(rng, texts, budget, at_end, _):
    room = max(2, budget // 32)
    chains = rng.choice((1, 1, 2, 2, 3, 4, 6))
    hops = []
    while len(hops) < chains and (not hops or sum(hops) + len(hops) + 2 < room):
        hops.append(min(rng.choice((0, 1, 1, 2, 2, 3, 4, 5)), room - 1))
    events = []
    for value, names in make_chains(rng, len(hops), hops):
        times = sorted(rng.random() for _ in names)
        for time, line in zip(times, chain_statements(value, names)):
            events.append((time, [(line, STATEMENT)]))
        if rng.random() < 0.8:
            events.append((asked_at(rng, times[-1], at_end),
                           [(b"which variables hold %s? " % value, QUERY),
                            (b" ".join(names) + b".", TRACK)]))
    return events


def assemble(rng, events, length, fill_text, gap):
    """Events in order of time between pieces of filler, `length` bytes if the events fit.

    The filler of the body is cut at random places; events of time >= 1 stand together at the end.
    `gap` separates. Returns parts."""
    events = sorted(events, key=lambda event: event[0])
    used = sum(len(data) + len(gap) for _, parts in events for data, _ in parts[:1])
    used += sum(len(data) for _, parts in events for data, _ in parts[1:])
    body = sum(1 for time, _ in events if time < 1)
    room = max(0, length - used - len(gap) * (body + 1))
    text = fill_text(room)
    cuts = [int(time * room) for time, _ in events[:body]]
    out, start = [], 0
    for cut, (_, parts) in zip(cuts + [room] * (len(events) - body), events):
        if cut > start:
            if cut < room:  # between two words, if there are any
                cut = max(text.rfind(b" ", start, cut), text.rfind(b"\n", start, cut)) + 1 or cut
            if cut > start:
                out.append((text[start:cut].rstrip() + gap, TEXT))
                start = cut
        out.extend(parts)
        last, kind = out[-1]
        out[-1] = (last if last.endswith(b"\n") else last + gap, kind)
    out.append((text[start:], TEXT))
    return out


def task_parts(rng, texts, length):
    """One sequence of tasks."""
    budget = int(length * rng.uniform(0.15, 0.95))
    at_end = rng.random() < 0.5
    makers = rng.choices(((recall_events,), (copy_events,), (track_events,),
                          (recall_events, copy_events, track_events)), (6, 6, 5, 4))[0]
    events, size, used = [], 0, set()
    while size < budget:
        new = rng.choice(makers)(rng, texts, budget - size, at_end, used)
        grown = size + sum(len(data) + 1 for _, parts in new for data, _ in parts)
        if grown > length - 8 and events:
            break
        events, size = events + new, grown
    kind = rng.choices(("text", "sentences", "noise", "words"), (6, 2, 1, 2))[0]
    gap = b"\n" if rng.random() < 0.75 else b" "
    return assemble(rng, events, length, lambda n: filler(rng, kind, n, texts), gap)


def repeat_parts(rng, texts, length):
    """Random bytes that come again and again: the shortest way to learn to look back."""
    alphabet = rng.choice((LOWER, DIGITS, PRINTABLE, UPPER, LOWER + b"  "))
    unit = letters(rng, alphabet, rng.randint(8, max(9, min(length // 2, 512))))
    out = [(unit, STATEMENT)]
    for size in range(len(unit), length, len(unit)):
        start = rng.randrange(max(1, len(unit) // 2))
        out += [(unit[start:start + 4], QUERY), (unit[start + 4:], COPY)]
    return out


def sequence(rng, texts, length, text_share):
    """A training sequence: `length` + 1 tokens and the classes of the last `length` of them."""
    choice = rng.random()
    begins = rng.random() < 0.9  # most begin with BOS
    size = length if begins else length + 1
    if choice < text_share:
        parts = [(texts.slice(rng, size), TEXT)]
    elif choice < text_share + 0.06:
        parts = repeat_parts(rng, texts, size)
    else:
        parts = task_parts(rng, texts, size)
    data = b"".join(part for part, _ in parts)[:size]
    if len(data) < size:
        parts.append((texts.slice(rng, size - len(data)), TEXT))
        data += parts[-1][0]
    kinds = np.repeat(np.array([kind for _, kind in parts], np.uint8),
                      [len(part) for part, _ in parts])[:size]
    tokens = np.frombuffer(data, np.uint8).astype(np.int16)
    if begins:
        return np.concatenate(([np.int16(BOS)], tokens)), kinds
    return tokens, kinds[1:]


def batch(seed, index, rows, length, text_share, texts):
    """Training batch `index`: tokens (rows, length + 1) and classes (rows, length)."""
    rng = random.Random(f"{seed} {index}")
    pairs = [sequence(rng, texts, length, text_share) for _ in range(rows)]
    return np.stack([tokens for tokens, _ in pairs]), np.stack([kinds for _, kinds in pairs])


QUESTIONS = ("recall-letters", "recall-words", "passkey", "needle", "copy-letters", "copy-words",
             "copy-text", "track-2", "track-3", "track-4", "track-5")


def question(rng, task, length, texts, fill_kind):
    """One evaluation prompt and its answer, `length` - 1 bytes together at most (BOS comes before).

    The position of what is asked for is uniform in the body; the question stands at the end."""
    events, answer = [], b""
    if task in ("recall-letters", "recall-words", "passkey", "needle"):
        name = {"passkey": "passkey", "needle": "needle"}.get(task, "code")
        statement, query, _ = RECALL[name]
        count = 1 if name == "passkey" else rng.choice(
            [n for n in (1, 2, 4, 8, 16, 32)
             if n * (len(statement) + 16) + len(query) < 0.8 * length])
        kind = "letters" if task == "recall-letters" else "words"
        for key in make_keys(rng, kind, count, texts):
            answer = make_value(rng, "digits")
            events.append((rng.random(), [(fill(statement, key, answer), STATEMENT)]))
        ask = fill(query, key)
    elif task.startswith("copy-"):
        text = passage(rng, task[5:], rng.randint(64, min(512, length // 4)), texts)
        events.append((rng.random(), [(b"passage: " + text, STATEMENT)]))
        ask, answer = b"repeat: " + text[:16], text[16:]
    else:  # three chains: the one asked for and two of random length
        hops = [rng.randint(2, 5), rng.randint(2, 5), int(task[6:])]
        for value, names in make_chains(rng, 3, hops):
            times = sorted(rng.random() for _ in names)
            events += [(time, [(line, STATEMENT)])
                       for time, line in zip(times, chain_statements(value, names))]
        ask, answer = b"which variables hold %s? " % value, b" ".join(names)
    events.append((1, [(ask, QUERY)]))
    parts = assemble(rng, events, length - 2 - len(answer),
                     lambda n: filler(rng, fill_kind, n, texts), b"\n")
    prompt = b"".join(data for data, _ in parts)
    assert prompt.endswith(ask + b"\n"), prompt[-80:]
    prompt = prompt[:-1]
    assert len(prompt) + len(answer) < length
    return prompt, answer


def exam(seed, task, length, count, fill_kinds, texts):
    """`count` questions of one kind. The fillers of `fill_kinds` take turns."""
    rng = random.Random(f"{seed} {task} {length} {' '.join(fill_kinds)}")
    return [question(rng, task, length, texts, fill_kinds[i % len(fill_kinds)])
            for i in range(count)]
