"""Seeded damage to files that a person or another program may hand over: text, JSON, JSON lines, YAML."""

import json
import random
from collections.abc import Callable
from pathlib import Path

JUNK = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, -1e16, float("nan"), float("inf")),
    *("", "x", "32", "nan", "1e999", "\x00", "\ud800", "../..", "/etc/passwd", "a/b", "é" * 300, "a\u2028b\x85c"),
    *("<image>", "human", "USER:</s>"),
    *([], [[]], [1, "x"], [[1, 2], [3]], {}, {"score": 1}, {"from": ["human"], "value": "x"}, {"": None}),
]
INSERTED = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\xef\xbb\xbf", b"\r", b"\n"),
    *(b'"', b"\\", b"}", b"{", b"[", b"1e999", b"NaN", b"\\ud800"),
    *(b"[" * 100_000, b'{"a":' * 20_000, b"9" * 5_000, b" " * 1_000_000),
]
LINES = [  # of YAML
    "a: &a [*a]",
    "train: &t {seed: *t}",
    "b: &b [1, 1, 1, 1, 1, 1]\nc: &c [*b, *b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c, *c]",
    "\n".join(
        ["z0: &z0 [1, 1, 1, 1, 1, 1]", *(f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * 6)}]" for n in range(1, 11))]
    ),
    "train: !!python/object/apply:os.system [echo]",
    "train: !secret x",
    "name: !!binary gIGC",
    "name: !!timestamp x",
    "name: !!float x",
    "name: !!bool x",
    "name: !!set {a, b}",
    "name: 2026-13-45",
    "name: ../../x",
    "name: 'a\\x00b'",
    'name: "a\\nb"',
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    "<<: {train: {seed: 3}}",
    "train: {<<: {seed: 3}}",
    "train: {seed: 1:59:59:59:59}",
    "train: {max_steps: 1e20}",
    "train: {max_steps: 99999999999999999999999}",
    "train: {learning_rate: .inf}",
    "train: {learning_rate: -.nan}",
    "train: {learning_rate: 0x_}",
    "base: /etc/passwd",
    "base: ../../recipes/tiny.yaml",
    "base: mine.yaml",
    "base: [tiny]",
    "base: " + "x" * 5_000,
    "pmod: {values: [" + "0.5, " * 9_000 + "]}",
    "pmod: {schedule: list, values: []}",
    "deep: " + "[" * 3_000,
    "deep: " + "{a: " * 3_000,
    "long: '" + "x" * 70_000 + "'",
    "y" * 60_000 + ": 1",
    "--- \ntrain: {seed: 1}",
    "%YAML 9.9\n---",
    "%TAG ! tag:x,2000:\n---",
    "\ttrain: 1",
    "data: {tasks: [[doc]]}",
    "model: {freeze: {router: 1}}",
    "train: null",
    "train: []",
    "eval: [3, null]",
]


def damage_text(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Damage bytes, whatever they mean."""
    kinds = ["cut", "empty", "flip", "flip", "insert", "insert", "twice", "drop", "noise", "swap", "utf-16", "crlf"]
    what = draw.choice(kinds)
    lines = data.split(b"\n")
    place = draw.randrange(len(data) + 1)
    if what == "flip":
        flipped = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped), what
    if what == "insert":
        inserted = draw.choice(INSERTED)
        return data[:place] + inserted + data[place:], f"insert {inserted[:20]!r} at {place}"
    line = draw.randrange(len(lines))
    if what == "twice":
        return b"\n".join([*lines[:line], lines[line], *lines[line:]]), f"{what} line {line}"
    if what == "drop":
        return b"\n".join(lines[:line] + lines[line + 1 :]), f"{what} line {line}"
    if what == "swap":
        draw.shuffle(lines)
        return b"\n".join(lines), what
    noise = bytes(draw.randrange(256) for _ in range(60))
    text = data.decode(errors="replace")
    made = {"cut": data[:place], "empty": b"", "noise": noise, "crlf": data.replace(b"\n", b"\r\n")}
    return (made[what] if what in made else text.encode("utf-16")), what


def damage_json(value: object, draw: random.Random) -> tuple[object, str]:
    """A copy of a JSON value in which one value, anywhere, is another one or gone."""
    root = [json.loads(json.dumps(value))]
    places: list[tuple] = []

    def walk(inner: object) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    walk(root)
    holder, key = draw.choice(places)
    what = draw.choice(["del", "key", "junk", "junk", "junk", "type"])
    if what == "del" and holder is not root:
        del holder[key]
    elif what == "key" and isinstance(holder, dict):
        holder[str(draw.choice(JUNK))] = holder.pop(key)
    elif what == "type":
        holder[key] = draw.choice([str(holder[key]), [holder[key]], {"x": holder[key]}])
    else:
        holder[key] = draw.choice(JUNK)
    return root[0], f"{what} {key}"


def mutate(path: Path, draw: random.Random, lines: bool = False) -> str:
    """Damage a file of JSON, or of JSON `lines`."""
    data = path.read_bytes()
    if draw.random() < 0.4:
        changed, what = damage_text(data, draw)
    elif lines:
        rows = [json.loads(line) for line in data.split(b"\n") if line]
        place = draw.randrange(len(rows))
        rows[place], what = damage_json(rows[place], draw)
        changed = "\n".join(map(json.dumps, rows)).encode()
    else:
        value, what = damage_json(json.loads(data), draw)
        changed = json.dumps(value).encode()
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def mutate_yaml(path: Path, draw: random.Random) -> str:
    """Damage a recipe: its text, a line more, another value."""
    data = path.read_bytes()
    kinds: list[Callable[[], tuple[bytes, str]]] = [
        lambda: damage_text(data, draw),
        lambda: _with_line(data, draw),
        lambda: _with_line(data, draw),
        lambda: _with_value(data, draw),
    ]
    changed, what = draw.choice(kinds)()
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def _with_line(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = data.decode().split("\n")
    line = draw.choice(LINES)
    place = draw.choice([0, len(lines), draw.randrange(len(lines) + 1)])
    return "\n".join([*lines[:place], line, *lines[place:]]).encode(), f"line {line[:60]!r} at {place}"


def _with_value(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = data.decode().split("\n")
    places = [place for place, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")]
    place = draw.choice(places)
    said = draw.choice(LINES).partition(": ")[2]
    junk = draw.choice([json.dumps(draw.choice(JUNK)), said or "*", "&a", "!!x y", "|", ">"])
    lines[place] = f"{lines[place].partition(': ')[0]}: {junk}"
    return "\n".join(lines).encode(), f"line {place} = {lines[place][:60]!r}"
