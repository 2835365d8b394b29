"""What a step measures: packed into one array on the device, and unpacked into rows of metrics.jsonl on the host.

A step leaves its figures in one array of 9 + L (1 + E) numbers, in this order:

    grad_norm, applied, bad_steps, loss, aux_loss, z_loss, router_loss, dropped, router_entropy        [9]
    then, for each routed layer, its balance loss and the share of the tokens that chose each expert   [1+E]

`docs/runs.md` says what each figure means. Nothing is read from the device until a `Backlog` is emptied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.model.transformer import LossParts

FIGURES = ("grad_norm", "applied", "bad_steps", "loss", "aux_loss", "z_loss", "router_loss", "dropped", "router_entropy")
LOSS = FIGURES.index("loss")


# ---- on the device ---------------------------------------------------------------------------------------------------------------


def measures(parts: LossParts, backend: Backend) -> Array:
    """Return the figures of one micro-batch, from `loss` to `router_entropy`.   -> [6]"""
    xp = backend.xp
    zero = xp.zeros_like(parts.total.data)
    values = [parts.cross_entropy.data, *(zero if t is None else t.data for t in (parts.aux_loss, parts.z_loss, parts.router_loss))]
    if parts.stats:
        values.append(sum(stats.dropped for stats in parts.stats) / len(parts.stats))
        values.append(sum(stats.entropy for stats in parts.stats) / len(parts.stats))
    else:
        values += [zero, zero]
    return xp.stack([xp.astype(value, zero.dtype) for value in values])


def layer_figures(parts: LossParts, counts: list[Array], dtype: Any, backend: Backend) -> list[Array]:
    """Return the balance loss of each routed layer, and its load before capacity.   counts [E] of each -> [1+E] of each"""
    xp, rows = backend.xp, []
    for stats, count in zip(parts.stats, counts, strict=True):
        tokens = xp.astype(count, dtype)  # [E]
        own_loss = xp.reshape(xp.astype(stats.aux_loss.data, dtype), (1,))
        rows.append(xp.concat([own_loss, tokens / xp.clip(xp.sum(tokens), min=1.0)]))
    return rows


# ---- on the host -----------------------------------------------------------------------------------------------------------------


def unpack(packed: Sequence[float], n_layers: int, n_experts: int) -> dict[str, Any]:
    """Return the figures of a packed array by name, with `expert_load` [L][E] and `aux_loss_layers` [L]."""
    size, first = n_experts + 1, len(FIGURES)
    layers = [packed[first + i * size : first + (i + 1) * size] for i in range(n_layers)]
    figures = dict(zip(FIGURES, packed[:first], strict=True))
    return {**figures, "expert_load": [list(layer[1:]) for layer in layers], "aux_loss_layers": [layer[0] for layer in layers]}


class Backlog:
    """Metrics that have not left the device: a packed array for each step, what the host knows about it, and how long it took.

    A device may be busy with a step long after the host has launched it. So the host waits for the device whenever it reads the metrics,
    and that wait is shared evenly by the steps since the last one: the times of all steps add up to the time that passed.
    """

    def __init__(self, backend: Backend, n_layers: int, n_experts: int, tokens_per_step: int) -> None:
        self.backend, self.n_layers, self.n_experts, self.tokens_per_step = backend, n_layers, n_experts, tokens_per_step
        self.elapsed = 0.0  # seconds of all steps up to the last that was taken, over all sessions
        self.packed: list[Array] = []
        self.known: list[dict[str, Any]] = []  # step, lr
        self.seconds: list[float] = []  # of the host, and of the waits so far
        self.settled = 0  # how many steps, from the first, have been waited for

    def add(self, packed: Array, seconds: float, *, step: int, lr: float) -> None:
        """Keep a step's figures without reading them. `seconds`: how long the host took to launch it."""
        self.packed.append(packed)
        self.seconds.append(seconds)
        self.known.append({"step": step, "lr": lr})

    def wait(self) -> None:
        """Wait for the device, and add the time to that of the steps since the last wait, to each an equal part."""
        steps = range(self.settled, len(self.packed))
        if not steps:
            return
        began = time.perf_counter()
        self.backend.to_host(self.packed[-1])  # a library that computes only what is read has to compute it now
        self.backend.synchronize()
        part = (time.perf_counter() - began) / len(steps)
        for i in steps:
            self.seconds[i] += part
        self.settled = len(self.packed)

    def take(self) -> list[tuple[dict[str, Any], int]]:
        """Read all of them in one transfer, and forget them.   -> for each step its row, and the bad steps in a row up to it"""
        self.wait()
        packed, known, seconds = self.packed, self.known, self.seconds
        self.packed, self.known, self.seconds, self.settled = [], [], [], 0
        if not packed:
            return []
        values = np.asarray(self.backend.to_host(self.backend.xp.stack(packed)), dtype=np.float64)  # [steps, 9 + L (1+E)]
        rows = []
        for host, took, numbers in zip(known, seconds, values.tolist(), strict=True):
            found = unpack(numbers, self.n_layers, self.n_experts)
            self.elapsed += took
            clock = {"step_ms": took * 1e3, "tokens_per_s": self.tokens_per_step / took, "elapsed_s": self.elapsed}
            rows.append((metrics_row(found, host | clock), int(found["bad_steps"])))
        return rows


def metrics_row(found: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl, with its keys in the order of the file."""
    return {
        "step": known["step"], "loss": found["loss"], "aux_loss": found["aux_loss"], "z_loss": found["z_loss"],
        "router_loss": found["router_loss"], "lr": known["lr"], "grad_norm": found["grad_norm"], "step_ms": known["step_ms"],
        "tokens_per_s": known["tokens_per_s"], "elapsed_s": known["elapsed_s"], "expert_load": found["expert_load"],
        "aux_loss_layers": found["aux_loss_layers"], "dropped": found["dropped"], "router_entropy": found["router_entropy"],
        "skipped": not found["applied"],
    }  # fmt: skip
