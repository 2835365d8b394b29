"""What a step measures: packed into one array on the device, and unpacked into rows of metrics.jsonl on the host.

A step leaves its figures in one array of 9 + L (1 + E) numbers, in this order:

    grad_norm, applied, bad_steps, loss, aux_loss, z_loss, router_loss, dropped, router_entropy        [9]
    then, for each routed layer, its balance loss and the share of the tokens that chose each expert   [1+E]

`docs/runs.md` says what each figure means. Nothing is read from the device until a `Backlog` is emptied.
"""

from __future__ import annotations

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
    """Metrics that have not left the device: a packed array for each step, and what the host knows about it."""

    def __init__(self, backend: Backend, n_layers: int, n_experts: int) -> None:
        self.backend, self.n_layers, self.n_experts = backend, n_layers, n_experts
        self.packed: list[Array] = []
        self.known: list[dict[str, Any]] = []  # step, lr, step_ms, tokens_per_s, elapsed_s

    def add(self, packed: Array, **known: Any) -> None:
        """Keep a step's figures without reading them."""
        self.packed.append(packed)
        self.known.append(known)

    def take(self) -> list[tuple[dict[str, Any], int]]:
        """Read all of them in one transfer, and forget them.   -> for each step its row, and the bad steps in a row up to it"""
        packed, known = self.packed, self.known
        self.packed, self.known = [], []
        if not packed:
            return []
        values = np.asarray(self.backend.to_host(self.backend.xp.stack(packed)), dtype=np.float64)  # [steps, 9 + L (1+E)]
        rows = []
        for host, numbers in zip(known, values.tolist(), strict=True):
            found = unpack(numbers, self.n_layers, self.n_experts)
            rows.append((metrics_row(found, host), int(found["bad_steps"])))
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
