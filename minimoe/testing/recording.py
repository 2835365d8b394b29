"""The level "recording": steps repeated from a recording give what plain steps give.

They agree to the last bit if the backend promises it (`exact_recording`), else to rounding. A step in the backend's first dtype must be
recorded, not refused. What changes from step to step must be read again (the arguments, the learning rate, the count of steps, the draws of
dropout), what is kept must be kept (weights, moments, counters, the cache), and what was returned must stay. A backend that does not
override `record` has no cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.engine.recording import Recorded
from minimoe.reference import optimizers
from minimoe.testing.conformance import Case, Host, compare, require, to_host
from minimoe.testing.small_models import micro_batches, small_step
from minimoe.testing.tolerances import RECORDING

STEPS = 6  # the first few warm up, and the others are repeated
SKIPPED = 4  # at this step a weight is NaN, so that nothing may be updated

TODO = "Record every write to `work.inputs` and `work.state`, and read both anew when it is repeated"


def recording_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for each model and optimizer that is recorded, and one for a step of decoding."""
    if type(backend).record is Backend.record:
        return
    for dtype in backend.dtypes:
        if dtype in RECORDING:
            first = dtype == backend.dtypes[0]
            yield Case(f"a dense model [{dtype}]", "recording", "record", partial(check_steps, backend, dtype, routed=False), quick=first)
            routed = partial(check_steps, backend, dtype, dropout=0.1, moe={"noise_std": 0.1})
            yield Case(f"a routed model, dropout and noise [{dtype}]", "recording", "record", routed, quick=False)
            yield Case(f"one token after another [{dtype}]", "recording", "record", partial(check_decoding, backend, dtype), quick=False)
    for name in optimizers.names():
        case = partial(check_steps, backend, backend.dtypes[0], optimizer=name, routed=False, n_layers=1)
        yield Case(f"optimizer {name} [{backend.dtypes[0]}]", "recording", "record", case, quick=False)
    yield Case("results and arguments", "recording", "record", partial(check_results, backend))


def agree(backend: Backend, dtype: str, got: Any, expected: Any, where: str) -> None:
    """Compare what recorded and plain calls gave, as the backend promises."""
    compare(got, expected, 0.0 if backend.exact_recording else RECORDING[dtype], "record", where, TODO)


def refuse(backend: Backend, dtype: str, where: str, why: str) -> None:
    """Fail if the backend falls back to plain steps in its first dtype; in others a kernel that reads the host may be all that it has."""
    require(dtype != backend.dtypes[0], "record", where, why, "The step itself reads nothing on the host, so it can be recorded")


# ---- training ------------------------------------------------------------------------------------------------------------------------


def check_steps(backend: Backend, dtype: str, **model: Any) -> None:
    """Compare the figures of every step, and in the end all that is kept."""
    where = f"{STEPS} steps, {_shown(model)} [{dtype}]"
    plain, kept = train(backend, dtype, False, where, model)
    recorded, also_kept = train(backend, dtype, True, where, model)
    for number, (got, expected) in enumerate(zip(recorded, plain, strict=True)):
        agree(backend, dtype, got, expected, f"{where}, figures of step {number}")
    for i, (got, expected) in enumerate(zip(also_kept, kept, strict=True)):
        agree(backend, dtype, got, expected, f"{where}, array {i} of the state at the end")


def train(backend: Backend, dtype: str, recorded: bool, where: str, model: dict[str, Any]) -> tuple[list[Host], list[Host]]:
    """Return the figures of every step, and the arrays of the state at the end."""
    step = small_step(backend, dtype, **model)
    call = Recorded(step, backend, partial(refuse, backend, dtype, where), step.state) if recorded else step
    figures: list[Array] = []
    with np.errstate(all="ignore"):
        for number in range(STEPS):
            weight = next(iter(step.model.parameters())).data
            before = backend.xp.asarray(weight, copy=True)
            if number == SKIPPED:
                weight[...] = float("nan")
            figures.append(call(*step.arrays(number, 1e-2 / (number + 1), *micro_batches(number))))
            if number == SKIPPED:
                weight[...] = before
        return [to_host(backend, packed) for packed in figures], [to_host(backend, array) for array in step.state()]


def _shown(model: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in model.items()) or "as it is"


# ---- decoding ------------------------------------------------------------------------------------------------------------------------


def check_decoding(backend: Backend, dtype: str) -> None:
    """Compare the logits of each next token, which a step computes from the last token and a cache."""
    plain, recorded = (decode(backend, dtype, recorded) for recorded in (False, True))
    for number, (got, expected) in enumerate(zip(recorded, plain, strict=True)):
        agree(backend, dtype, got, expected, f"decoding, logits of token {number} [{dtype}]")


def decode(backend: Backend, dtype: str, recorded: bool) -> list[Host]:
    from minimoe.generation.decoding import Decoder

    decoder = Decoder(small_step(backend, dtype).model, [[1, 2], [3]], tokens=STEPS)
    if not recorded:
        decoder.recorded = None
    elif decoder.recorded is not None:
        decoder.recorded.say = partial(refuse, backend, dtype, f"decoding [{dtype}]")
    logits = []
    for number in range(STEPS):
        logits.append(np.asarray(decoder.predict(), dtype=np.float64))
        decoder.add([number, 2 * number])
    return logits


# ---- results and arguments ----------------------------------------------------------------------------------------------------------


def check_results(backend: Backend) -> None:
    """Hold every result while later ones come, and change the argument's array after each call."""
    xp, where = backend.xp, "total += x; 2 * total, with x = 1, 2, 3, ..."
    total = backend.from_host(np.zeros(3, dtype=np.float32))

    def work(x: Array) -> Array:
        nonlocal total
        total += x
        return total * 2.0

    call = Recorded(work, backend, partial(refuse, backend, backend.dtypes[0], where), lambda: [total])
    results = []
    for number in range(1, STEPS + 1):
        x = xp.full((3,), float(number), dtype=xp.float32)
        results.append(call(x))
        x[...] = -100.0
    for number, result in enumerate(results, 1):
        expected = np.full(3, float(number * (number + 1)))
        agree(backend, "float32", to_host(backend, result), expected, f"{where}, result {number}")
