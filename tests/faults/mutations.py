"""Damages files: bytes are flipped, cut and doubled; values of JSON and TOML become odd ones, move, or vanish."""

import copy
import json
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 1000, 10**6, 10**9, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), None, True, False, "", "x", "1", "\0", "\x1b[31m", "../x", "/dev/zero", "\ud800", [], [[]], [1],
    [None], [-1], [1, 1, 1], [10**10], {}, {"a": 1}, {"rope_type": "yarn", "factor": 2}, "gelu", "relu", "full_attention",
    ["full_attention"], "a" * 1000, [0] * 10_000, {str(i): i for i in range(1000)},
)  # fmt: skip
RAW = {  # what json.dumps cannot write: each stands for the text beside it
    '"<deep>"': "[" * 100_000 + "]" * 100_000, '"<open>"': '{"a":' * 100_000, '"<digits>"': "9" * 5000, '"<float>"': "1e999",
    '"<minus>"': "-0", '"<twice>"': '{"a": 1, "a": 2}', '"<wide>"': "[" + "{}," * 50_000 + "{}]",
}  # fmt: skip
PIECES = (
    b"[", b"{", b'"', b"9" * 30, b"\\u0000", b"\\ud800", b",", b":", b"\xff", b"\xef\xbb\xbf", b"-", b"e99", b"null", b"\n", b"\0", b".",
)  # fmt: skip
NUMBERS = (2, -1, 0.5, 10**9)


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """Flip a bit, cut the end off, insert, double or remove a few bytes; one to four times."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        kind, at = draw.random(), draw.randrange(len(out) + 1)
        if kind < 0.4 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind < 0.5:
            del out[at:]
        elif kind < 0.7:
            out[at:at] = draw.choice(PIECES)
        elif kind < 0.85:
            start = draw.randrange(len(out) + 1)
            out[at:at] = out[start : start + draw.randrange(40)]
        else:
            del out[at : at + draw.randrange(1, 9)]
    return bytes(out)


def mutate_json(draw: Random, data: bytes) -> bytes:
    """Change values of a JSON text, wherever they are; one time in three its bytes instead."""
    if draw.random() < 1 / 3:
        return mutate_bytes(draw, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(draw, data)
    return to_bytes(mutate_value(draw, value))


def mutate_lines(draw: Random, data: bytes) -> bytes:
    """Change a line of JSON Lines; sometimes swap, double or drop lines."""
    lines = data.splitlines()
    if not lines or draw.random() < 0.2:
        return mutate_bytes(draw, data)
    at = draw.randrange(len(lines))
    if draw.random() < 0.2:
        lines[at : at + 1] = draw.choice(([], [lines[at]] * 2, [draw.choice(lines)], [b""]))
    else:
        lines[at] = mutate_json(draw, lines[at])
    return b"\n".join(lines) + b"\n"


def mutate_value(draw: Random, value: Any) -> Any:
    """Return a copy in which one to three values are odd ones, moved, scaled, renamed or gone."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _mutate_once(draw, value)
    return value


def _mutate_once(draw: Random, node: Any) -> None:
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.7:
            node = node[key]
            continue
        kind = draw.random()
        if kind < 0.1:
            del node[key]
        elif kind < 0.2 and isinstance(node[key], int | float):
            node[key] = node[key] * draw.choice(NUMBERS)
        elif kind < 0.3 and isinstance(node, dict):
            node[draw.choice(keys) + draw.choice(("", "x"))] = node[key]
        elif kind < 0.4:
            node[key] = copy.deepcopy(node[draw.choice(keys)])
        elif kind < 0.5:
            node[key] = draw.choice(list(RAW)).strip('"')
        else:
            node[key] = copy.deepcopy(draw.choice(ODD))
        return


def to_bytes(value: Any) -> bytes:
    """Write JSON, half pairs of surrogates as escapes or as bytes that are not UTF-8."""
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8", errors="surrogatepass")


# ---- TOML --------------------------------------------------------------------------------------------------------------------

TOML = (
    "0", "-1", "1", "2", "7", "1000", "1000000000", "1e308", "nan", "inf", "-inf", "9223372036854775807", "1" + "0" * 30,
    "9" * 5000, '"x"', "[]", "[[[]]]", "{}", "{a = 1}", "true", "1979-05-27", "2026-02-31", '""', '"none"', "0.5", "1e-320",
    "0x7fffffffffffffff", '["a"]', "[0]", "[-1]", "[10000000000]", "[" * 100_000, "[" * 99 + "]" * 99,
    "{a." * 60 + "b = 1" + "}" * 60, '"' + "a" * 10_000 + '"', r'"\u001b[31m"', r'"\ud800"', "[" + "0," * 50_000 + "]", ".1", "1.",
    "True", "'", '"""', "1\n2", "\0",
)  # fmt: skip
LINES = (
    'extends = "tiny-moe"', 'extends = "c.toml"', 'extends = "/dev/zero"', 'extends = "."', "extends = 1", "[moe]", "[model]",
    "[[model]]", "[model.rope]", "[moe.options]", "a" * 5000 + " = 1", "a." * 5000 + "a = 1", "[" + "a." * 5000 + "a]",
    '"\\u001b" = 1', "name = 1", "= 1", "[model.x.y]", "moe = 1", "n_layers = 1000000000", "#" * 100_000, "n_experts = 1000000000",
    "steps = 1000000000", "batch_size = 1000000000",
)  # fmt: skip


def mutate_toml(draw: Random, data: bytes) -> bytes:
    """Change values and lines of a TOML text; one time in three its bytes instead."""
    lines = data.decode("utf-8", errors="replace").splitlines()
    if not lines or draw.random() < 1 / 3:
        return mutate_bytes(draw, data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        if equals and draw.random() < 0.7:
            lines[at] = f"{key}= {draw.choice(TOML)}"
        else:
            lines[at : at + draw.randrange(2)] = [draw.choice((draw.choice(LINES), draw.choice(lines)))]
    return "\n".join(lines).encode("utf-8", errors="replace")
