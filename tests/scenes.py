"""Draws the display of training, and tables, with made-up figures: `python scenes.py NAME...`. Each waits for a line on standard input.

The clock stands still, so that the same scene looks the same each time; test_screens.py keeps what a terminal of some widths makes of it.
"""

import math
import os
import random
import signal
import sys
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from minimoe.cli import live
from minimoe.cli.live import LiveProgress
from minimoe.config import load_config
from minimoe.training import progress

CLOCK = [1000.0]
COMPILING = "compiling kernels for this processor: once, for less than a minute; the next start finds them on the disk"


def made_up_load(experts: int, seed: int) -> list[float]:
    """Return shares of which some are far below the even one."""
    draw = random.Random(seed)
    weights = [abs(math.log(1.0 - draw.random())) ** (1.0 + seed % 3) for _ in range(experts)]
    return [weight / sum(weights) for weight in weights]


def training(layers: int, experts: int, step: int = 0, earlier: int = 0) -> LiveProgress:
    """Return the display of a run of 300 steps, which is at its beginning or is resumed."""
    sizes = ("model.vocab_size=256", f"model.n_layers={layers}", f"moe.n_experts={experts}", f"moe.top_k={min(2, experts)}")
    trainer: Any = SimpleNamespace(
        config=load_config("tiny-moe", sizes), step=step, saved=step, best=2.1354 if earlier else None, uniform_aux_loss=float(layers),
        backend=SimpleNamespace(name="numpy", memory=lambda: {"used": 0, "peak": 3_221_225_472}), elapsed=float(earlier), stops=[],
        task=SimpleNamespace(source="python-docs", size=lambda: "419,645 + 46,628 tokens", step_size=lambda: "2,048 tokens"),
        earlier_losses=lambda: [loss_of(at) for at in range(1, earlier + 1)],
    )  # fmt: skip
    display = LiveProgress()
    display.started(trainer)
    return display


def loss_of(step: int) -> float:
    return 1.4 + 4.1 * math.exp(-step / 40) + 0.05 * math.sin(step)


def row(step: int, layers: int, experts: int) -> dict[str, Any]:
    loads = [made_up_load(experts, layer) for layer in range(layers)]
    own = [experts * sum(share * share for share in shares) for shares in loads]
    entropy = sum(-share * math.log(share) for shares in loads for share in shares if share) / layers
    return {
        "step": step, "loss": loss_of(step), "tokens_per_s": 18322.0, "lr": 8.1e-4, "grad_norm": 1.08, "skipped": False,
        "aux_loss": sum(own), "aux_loss_layers": own, "router_entropy": entropy, "dropped": 0.0125, "expert_load": loads,
    }  # fmt: skip


def under_way(layers: int, experts: int, steps: int = 120, earlier: int = 0) -> LiveProgress:
    display = training(layers, experts, earlier, earlier)
    for step in range(earlier + 1, steps + 1):
        display.stepped(step)
        CLOCK[0] += 1
        display.logged([row(step, layers, experts)] if step in (steps, steps - 1) else [{**row(step, 1, 2), "expert_load": []}])
    display.val = 1.5651
    return display


def waiting() -> LiveProgress:
    display = training(4, 8)
    display.waiting(COMPILING)
    CLOCK[0] += 12
    return display


def validating() -> LiveProgress:
    display = under_way(12, 64)
    display.validating(0, 1234)
    CLOCK[0] += 10
    display.validating(345, 1234)
    display.waiting(COMPILING)
    display.stopping()
    return display


SCENES = {
    "12x64": lambda: under_way(12, 64), "1x4": lambda: under_way(1, 4), "32x8": lambda: under_way(32, 8),
    "resumed": lambda: under_way(4, 8, 220, earlier=200), "waiting": waiting, "validating": validating,
}  # fmt: skip


def wait_for_a_line() -> None:
    """Wait also in the background, where reading is an error."""
    while True:
        with suppress(OSError):
            sys.stdin.readline()
            return
        time.sleep(0.05)


def main(names: list[str]) -> None:
    for module in (live, progress):
        module.now = lambda: CLOCK[0]  # type: ignore[attr-defined]
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    progress.peak_memory = lambda: 432_013_312  # type: ignore[attr-defined]
    for name in names:
        CLOCK[0] = 1000.0
        print("\x1b[H\x1b[2J", end="", flush=True)
        display = SCENES[name]()
        display.live.refresh()
        os.write(2, f"\x1b]2;{name}\x07".encode())  # the window's title says that the scene is complete
        wait_for_a_line()
        display.ended(display.trainer)


if __name__ == "__main__":
    main(sys.argv[1:])
