"""Backends: an array layer with every kernel of the contract, found by name.

A backend subclasses `Backend`, fills in the array layer, and overrides the kernels that it implements itself; every other kernel is the
reference, run on its arrays. `load("numpy")` finds the built-in ones by a table and others by the entry-point group
`minimoe.backends`, whose entries name a function without arguments that returns a backend. If a device may be absent, the same module
has a function `backend_class()`, which needs none, so that the kernels of a backend that cannot run here are known too.
"""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from minimoe.config import Config
from minimoe.errors import UserError, nearest
from minimoe.reference.activation import ActivationKernels
from minimoe.reference.arrays import Array as Array
from minimoe.reference.arrays import ArrayLayer
from minimoe.reference.attention import AttentionKernels
from minimoe.reference.embedding import EmbeddingKernels
from minimoe.reference.expert import ExpertKernels
from minimoe.reference.extensions import BACKENDS as BUILT_IN
from minimoe.reference.extensions import backend_names
from minimoe.reference.gating import GatingKernels
from minimoe.reference.linear import LinearKernels
from minimoe.reference.loss import LossKernels
from minimoe.reference.norm import NormKernels
from minimoe.reference.optimizer import OptimizerKernels
from minimoe.reference.random import RandomKernels
from minimoe.reference.rope import RopeKernels
from minimoe.reference.routing import RoutingKernels

CONTRACT = 1
"""The number of the kernel contract; from the first release on it grows when a kernel's signature or meaning changes."""

TOPICS: dict[str, tuple[type[ArrayLayer], tuple[str, ...]]] = {
    "norm": (NormKernels, ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")),
    "activation": (ActivationKernels, ("swiglu", "gelu", "relu")),
    "rope": (RopeKernels, ("rope", "split_heads")),
    "linear": (LinearKernels, ("linear", "linear_dx", "linear_dw", "linear_db")),
    "attention": (AttentionKernels, ("attention",)),
    "gating": (GatingKernels, ("gate",)),
    "routing": (RoutingKernels, ("route", "dispatch", "combine", "noisy_load")),
    "expert": (ExpertKernels, ("grouped_matmul", "grouped_matmul_dw", "grouped_bias", "ffn", "expert_ffn", "moe_ffn")),
    "loss": (LossKernels, ("cross_entropy", "linear_cross_entropy")),
    "embedding": (EmbeddingKernels, ("embedding",)),
    "random": (RandomKernels, ("random_bits", "uniform", "normal", "dropout")),
    "optimizer": (OptimizerKernels, ("adamw", "sgd", "lion", "muon", "sum_of_squares")),
}
"""Every kernel, by topic. A differentiable kernel `x` has its gradient in `x_backward`."""


COMPOSITES = ("ffn", "expert_ffn", "moe_ffn", "add_rms_norm", "add_layer_norm", "linear_cross_entropy")
"""The kernels that return (outputs, saved): a backend decides what is saved, so it overrides both halves or neither."""


class Work:
    """What a recording repeats. Calling it does the work once."""

    inputs: list[Array]  # arrays that it reads; the caller writes new arguments into them before each repetition
    result: Array  # the array that the last call returned

    def __init__(self, function: Callable[..., Array], inputs: list[Array], state: list[Array]) -> None:
        """`state`: the arrays that `function` keeps: those it updates in place, and those it reads at every call."""
        self.function, self.inputs, self.state = function, inputs, state

    def __call__(self) -> None:
        self.result = self.function(*self.inputs)


class Backend(
    NormKernels,
    RopeKernels,
    AttentionKernels,
    GatingKernels,
    ExpertKernels,
    LossKernels,
    EmbeddingKernels,
    OptimizerKernels,
):
    """Arrays and kernels of one library on one device. Abstract: a subclass implements the array layer."""

    contract = CONTRACT
    library: frozenset[str] = frozenset()  # overrides that call a library's kernel
    proven: dict[str, str] = {}  # kernel -> the device and the date on which it agreed with its reference
    emulated = ""  # how the tests run its hand-written kernels without a device, such as "executed as PTX on a CPU"

    def tell(self, listener: Callable[[str], None] | None) -> None:
        """Report what keeps a user waiting, or runs slower than it could, to `listener`; None: to standard error."""

    def prepare(self, config: Config) -> None:
        """Called before training reads data and draws weights: a backend may begin to compile this configuration's kernels."""

    def host_view(self, array: Array) -> "np.ndarray[Any, Any] | None":
        """Return the array as NumPy's if it can be read without waiting for a device, else None."""
        return array if isinstance(array, np.ndarray) else None

    def adopt(self, array: "np.ndarray[Any, Any]") -> Array:
        """Return an array of the host as the backend's: over the same memory if possible, else copied to the device."""
        return self.from_host(array)

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads of the host from now on; 0 means as many as it has. For backends that use any."""

    warm_up = 2  # steps before one is recorded
    exact_recording = True  # a recorded step gives the bytes of a plain one; False: the same numbers to rounding

    def record(self, work: Work, say: Callable[[str], None]) -> Callable[[], None] | None:
        """Run `work` once, and return a function that repeats its device work on the same arrays at a lower cost.

        Return None if it cannot be repeated, after calling `say` with the reason if there is one. A backend whose library watches memory
        need only call `work`; one that compiles pure functions finds the arrays in `work.inputs`, `work.state` and `work.result`.
        """
        work()
        return None

    def out_of_memory(self, error: BaseException) -> tuple[int, int] | None:
        """Return (bytes asked for, bytes free) if the error says that the device is out of memory, else None."""
        return None

    def __repr__(self) -> str:
        return f"<backend {self.name}>"


class BackendUnavailable(UserError):
    """Raised for a backend that cannot run on this machine; the message says why."""


def kernel_names() -> list[str]:
    """Return the names of all kernels of the contract, backward halves included."""
    names = []
    for _, kernels in TOPICS.values():
        for kernel in kernels:
            names += [kernel, f"{kernel}_backward"] if hasattr(Backend, f"{kernel}_backward") else [kernel]
    return names


def overridden(backend: Backend | type[Backend], kernel: str) -> bool:
    """Return True if the backend, or the class of one, overrides this kernel, or this helper of references."""
    return getattr(backend if isinstance(backend, type) else type(backend), kernel) is not getattr(Backend, kernel)


def unproven(backend: Backend) -> bool:
    """Return True if a kernel of the backend is not `proven`. A reference counts as proven on the array layers that minimoe comes with."""
    built_in = backend.name in BUILT_IN
    return any(kernel not in backend.proven for kernel in kernel_names() if overridden(backend, kernel) or not built_in)


def kernel_kinds(backend: Backend | type[Backend]) -> dict[str, str]:
    """Return `hand-written`, `library` or `reference` for each kernel of a backend, or of the class of one."""
    kinds = {}
    for kernel in kernel_names():
        own = "library" if kernel in backend.library else "hand-written"
        kinds[kernel] = own if overridden(backend, kernel) else "reference"
    return kinds


def helper_names() -> list[str]:
    """Return the names of the helpers that references share (`softmax`, `_mask`, ...), which a backend may override and need not."""
    classes = [ArrayLayer, *(kernels for kernels, _ in TOPICS.values())]
    members = {name: member for one in classes for name, member in vars(one).items() if inspect.isfunction(member)}
    needed = {name for name, member in members.items() if getattr(member, "__isabstractmethod__", False)}
    return sorted(name for name in members if name not in needed and name not in kernel_names() and not name.startswith("__"))


def helper_kinds(backend: Backend | type[Backend]) -> dict[str, str]:
    """Return `hand-written` or `library` for each helper that a backend, or the class of one, overrides."""
    own = [name for name in helper_names() if overridden(backend, name)]
    return {name: "library" if name in backend.library else "hand-written" for name in own}


def check_overrides(backend: Backend) -> None:
    """Refuse a backend whose contract, array layer or overrides differ from the reference's, naming the difference."""
    if backend.contract != CONTRACT:
        raise UserError(f"backend {backend.name}: made for contract {backend.contract}, this minimoe has contract {CONTRACT}")
    bases = [base for base in reversed(type(backend).__mro__) if base is not object]
    known = {name for base in bases if base.__module__.startswith("minimoe.") for name in (*dir(base), *inspect.get_annotations(base))}
    own = {name: member for base in bases if not base.__module__.startswith("minimoe.") for name, member in vars(base).items()}
    for name, member in own.items():
        if name in kernel_names():
            compare_signatures(backend.name, name, member)
        elif callable(member) and not name.startswith("_") and name not in known:
            hint = f"{nearest(name, kernel_names())}; the name of a helper begins with an underscore"
            raise UserError(f"backend {backend.name}: {name} is not a kernel of the contract{hint}")
    for kernel in kernel_names():
        other = f"{kernel}_backward"
        if kernel in COMPOSITES and overridden(backend, kernel) != overridden(backend, other):
            raise UserError(f"backend {backend.name}: {kernel} and {other} share what they save: override both or neither")


def compare_signatures(backend: str, name: str, override: Callable[..., object]) -> None:
    contract = list(inspect.signature(getattr(Backend, name)).parameters.values())
    own = list(inspect.signature(override).parameters.values())
    expected, given = ([_shown(p) for p in group] for group in (contract, own))
    if expected != given:
        raise UserError(f"backend {backend}: {name} takes ({', '.join(given)}), the reference takes ({', '.join(expected)})")


def _shown(parameter: inspect.Parameter) -> str:
    """Return `name` or `name=default`, with a star if it is keyword-only."""
    star = "*, " if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
    return f"{star}{parameter.name}" + ("" if parameter.default is parameter.empty else f"={parameter.default!r}")


# ---- finding ------------------------------------------------------------------------------------------------------------------


def available() -> list[str]:
    """Return the names of all known backends, whether or not they run here: built-in first, then entry points."""
    return backend_names()


_loading = threading.RLock()


def load(name: str = "auto") -> Backend:
    """Return the backend of that name; each is made once. `auto` is the first built-in one that runs here.

    Raises `UserError` for an unknown name, `BackendUnavailable` for a backend that cannot run here.
    """
    with _loading:  # threads that ask at once get the same one, since tensors of two do not mix
        return made_once(name)


@cache
def made_once(name: str) -> Backend:
    """Make the backend of a name, once; `load` lets one thread at a time do so."""
    if name == "auto":
        return _first_that_runs()
    entry = _entry(name)
    absent = ImportError if entry.module == BUILT_IN.get(name) else Exception  # a package of other authors may raise anything
    try:
        backend = entry.load()()
    except UserError:
        raise
    except absent as error:
        raise BackendUnavailable(f"backend {name} does not run here: {type(error).__name__}: {error}") from error
    check_overrides(backend)
    return backend


def _entry(name: str) -> EntryPoint:
    """Return the entry point of the function that makes the backend of that name."""
    if name in BUILT_IN and find_spec(BUILT_IN[name]):
        return EntryPoint(name, f"{BUILT_IN[name]}:backend", "minimoe.backends")
    for entry in entry_points(group="minimoe.backends"):
        if entry.name == name:
            return entry
    raise UserError(f"no backend {name!r}{nearest(name, [*available(), 'auto'])}")


def _first_that_runs() -> Backend:
    wanted = os.environ.get("MINIMOE_BACKEND")
    if wanted:
        return load(wanted)
    for name in BUILT_IN:
        if name in available():
            try:
                return load(name)
            except BackendUnavailable as error:
                if name == "numba":  # only a broken installation keeps it from running, whereas a GPU is often absent
                    print(f"minimoe: {error}; using numpy, which is slower", file=sys.stderr)
    raise UserError("no backend runs here")


class BackendSummary(NamedTuple):
    """What `minimoe backends` shows of a backend."""

    available: bool
    why_not: str
    kernels: dict[str, str]
    proven: dict[str, str]
    dtypes: tuple[str, ...]
    helpers: dict[str, str] = {}  # that it overrides
    emulated: str = ""


def describe(name: str) -> BackendSummary:
    """Return what a backend offers, or why it does not run here and what it would offer."""
    try:
        backend = load(name)
    except UserError as error:
        kind = _class_without_device(name)
        if kind is None:
            return BackendSummary(False, str(error), {}, {}, ())
        return BackendSummary(False, str(error), kernel_kinds(kind), dict(kind.proven), (), helper_kinds(kind), kind.emulated)
    return BackendSummary(True, "", kernel_kinds(backend), dict(backend.proven), backend.dtypes, helper_kinds(backend), backend.emulated)


def _class_without_device(name: str) -> type[Backend] | None:
    """Return the class of a backend that cannot be made here, or None if its package does not provide it."""
    try:
        kind: type[Backend] = import_module(_entry(name).module).backend_class()
    except Exception:  # whatever a package raises that does not run here: `load` has said why
        return None
    return kind


# ---- the current one ------------------------------------------------------------------------------------------------------------

_backend: ContextVar[Backend | None] = ContextVar("minimoe_backend", default=None)  # of use_backend: in this thread alone
_default: list[Backend] = []  # of set_backend: everywhere; at most one


def current_backend() -> Backend:
    """Return the backend on which tensors and modules are made when none is named."""
    backend = _backend.get()
    if backend is not None:
        return backend
    return _default[0] if _default else set_backend("auto")


def set_backend(backend: str | Backend) -> Backend:
    """Make tensors and modules on this backend from now on."""
    chosen = load(backend) if isinstance(backend, str) else backend
    _default[:] = [chosen]
    return chosen


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[Backend]:
    """Make tensors and modules on this backend within the block."""
    chosen = load(backend) if isinstance(backend, str) else backend
    token = _backend.set(chosen)
    try:
        yield chosen
    finally:
        _backend.reset(token)
