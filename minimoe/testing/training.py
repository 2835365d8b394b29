"""The level "curve" trains small Mixtures of Experts; "repeatability" runs everything twice and compares the bytes.

The main curve has 20 steps of two micro-batches, dropout and swiglu; another has gelu. Each router and
optimizer of the tables has a curve of a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend, kernel_names
from minimoe.reference import optimizers, routers
from minimoe.testing.conformance import Case, is_array, leaves, require, to_device, tree_map
from minimoe.testing.dense_examples import Example, reference
from minimoe.testing.kernels import EXAMPLES, Run
from minimoe.testing.quick import quick_examples
from minimoe.testing.small_models import micro_batches, small_step
from minimoe.testing.tolerances import CURVE, CURVE_START

if TYPE_CHECKING:
    from minimoe.training.step import Step

Figures: TypeAlias = npt.NDArray[np.float64]

STEPS = 20
RATE = 3e-3
SEED, SEED_BY_EXPERT = 1, 14  # with these no choice of experts, or of tokens by experts, is nearly tied
FIGURES = ("loss", "gradient's norm")
LOSS_AT, NORM_AT = 3, 0  # in a step's packed figures (minimoe/training/metrics.py)
FEW = 6  # steps of the curves of single routers and optimizers

MAIN: dict[str, Any] = {"moe": {"router": "softmax_topk"}, "dropout": 0.1}
"""The model of the longest curve, besides what `curve_step` gives all of them."""


def curve_cases(backend: Backend) -> Iterator[Case]:
    """Yield the main curve in each dtype in which whole models are trained; then, in the first, gelu, and each router and optimizer."""
    for dtype in backend.dtypes:
        if dtype in CURVE:
            check = partial(check_curve, backend, dtype)
            yield Case(f"{STEPS} training steps [{dtype}]", "curve", "training", check, dtype == backend.dtypes[0])
    dtype = backend.dtypes[0]
    if dtype in CURVE:
        for label in curves():
            steps = FEW if "router" in label or "optimizer" in label else STEPS
            check = partial(check_curve, backend, dtype, label, steps)
            yield Case(f"{steps} training steps, {label} [{dtype}]", "curve", "training", check, quick=False)


def curves() -> dict[str, dict[str, Any]]:
    """Return the models besides the main one, with their labels."""
    others: dict[str, dict[str, Any]] = {"activation gelu": {"activation": "gelu", "moe": {"router": "softmax_topk"}}}
    others = others | {f"router {name}": {"moe": {"router": name}, "seed": seed_for(name)} for name in routers.names()}
    return others | {f"optimizer {name}": {"optimizer": name} for name in optimizers.names()}


def seed_for(router: str) -> int:
    return SEED_BY_EXPERT if routers.find(router).by_expert else SEED


def check_curve(backend: Backend, dtype: str, label: str = "", steps: int = STEPS) -> None:
    """Compare the loss and the gradient's norm of each step with those of NumPy's float64."""
    got, expected = train(backend, dtype, label, steps), expected_curve(label, steps)
    error = np.abs(got - expected) / np.abs(expected)  # [steps,2]
    bounds = np.where(np.arange(steps) < FEW, CURVE_START[dtype], CURVE[dtype])  # [steps]
    right = error <= bounds[:, None]
    step, figure = np.unravel_index(int(np.argmax(~right)), right.shape)
    what = f"the {FIGURES[figure]} is {got[step, figure]:.12g}, NumPy's float64 has {expected[step, figure]:.12g}"
    where = f"{label or 'router softmax_topk, optimizer adamw'}, step {step} of {steps} [{dtype}]"
    todo = "If the levels below pass, an optimizer, a router, a micro-batch's weight or the order of a sum differs"
    require(bool(right.all()), "training", where, f"{what}, tolerance {bounds[step]:.3g} (relative)", todo)


@cache
def expected_curve(label: str = "", steps: int = STEPS) -> Figures:
    return train(reference(), "float64", label, steps)


def curve_step(backend: Backend, dtype: str, label: str = "") -> Step:
    """Return the step of a model of two dense and two routed layers, with weights so large that hardly any two logits are nearly equal."""
    settings: dict[str, Any] = {"seed": SEED, **(curves()[label] if label else MAIN)}
    return small_step(backend, dtype, n_layers=4, init_std=0.2, **settings)


def train(backend: Backend, dtype: str, label: str = "", steps: int = STEPS) -> Figures:
    """Return the loss before each step, and the norm of its gradient.   -> [steps,2]"""
    step = curve_step(backend, dtype, label)
    packed = [step(*step.arrays(number, RATE, *micro_batches(number))) for number in range(steps)]
    figures = np.array([np.asarray(backend.to_host(array), dtype=np.float64) for array in packed])
    return np.ascontiguousarray(figures[:, [LOSS_AT, NORM_AT]])


# ---- repeatability ----------------------------------------------------------------------------------------------------------------------

REPEAT = "Equal inputs give equal bytes: no atomics on floats, and sums in a fixed order"


def repeatability_cases(backend: Backend) -> Iterator[Case]:
    """Return a case for each kernel, and one for training."""
    for kernel in kernel_names():
        check = partial(check_repeats, backend, kernel)
        yield Case(f"{kernel}, twice", "repeatability", kernel, check, run_quick=partial(check, quick=True))
    twice = partial(check_training_repeats, backend)
    yield Case("training, twice", "repeatability", "training", twice, run_quick=partial(twice, steps=FEW))


def check_repeats(backend: Backend, kernel: str, quick: bool = False) -> None:
    examples = list(EXAMPLES[kernel]())
    with np.errstate(all="ignore"):
        for example in quick_examples(examples) if quick else examples[:12]:
            same = run_bytes(backend, kernel, example) == run_bytes(backend, kernel, example)
            require(same, kernel, example.label, "two calls with equal inputs differ in their bytes", REPEAT)


def run_bytes(backend: Backend, kernel: str, example: Example) -> list[bytes]:
    """Return the bytes of what a kernel returned or wrote."""
    args, options = to_device(backend, (example.args, example.options), backend.dtypes[0])
    result = Run(backend, kernel, backend.dtypes[0], example).call(backend, args, options)
    hosts = example.trim(to_host_exact(backend, result))
    return [np.ascontiguousarray(array).tobytes() if is_array(array) else repr(array).encode() for _, array in leaves(hosts)]


def to_host_exact(backend: Backend, result: Any) -> Any:
    return tree_map(lambda value: np.array(backend.to_host(value)) if is_array(value) else value, result)


def check_training_repeats(backend: Backend, steps: int = STEPS) -> None:
    dtype = backend.dtypes[0]
    same = train(backend, dtype, steps=steps).tobytes() == train(backend, dtype, steps=steps).tobytes()
    require(same, "training", f"{steps} steps [{dtype}]", "two runs differ", REPEAT)
