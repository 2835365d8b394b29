"""minimoe: Transformers and Mixtures of Experts from scratch.

    import minimoe as mm
    layer = mm.MoE(d_model=16, d_hidden=24, moe=mm.MoEConfig(n_experts=4, top_k=2))
    y, stats = layer(mm.tensor(array, requires_grad=True))

Names are looked up when they are first used, so that `minimoe --help` and `import minimoe` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe import nn as nn
    from minimoe import ops as ops
    from minimoe import optim as optim
    from minimoe import testing as testing
    from minimoe.autograd import Tensor as Tensor
    from minimoe.autograd import no_grad as no_grad
    from minimoe.autograd import set_backend as set_backend
    from minimoe.autograd import tensor as tensor
    from minimoe.autograd import use_backend as use_backend
    from minimoe.config import Config as Config
    from minimoe.config import DataConfig as DataConfig
    from minimoe.config import ModelConfig as ModelConfig
    from minimoe.config import MoEConfig as MoEConfig
    from minimoe.config import TrainConfig as TrainConfig
    from minimoe.config import load_config as load_config
    from minimoe.errors import UserError as UserError
    from minimoe.generation import generate as generate
    from minimoe.loading import load as load
    from minimoe.model import Cache as Cache
    from minimoe.model import Transformer as Transformer
    from minimoe.moe import MoE as MoE
    from minimoe.random import Rng as Rng
    from minimoe.trainer import resume as resume
    from minimoe.trainer import train as train

__version__ = "0.1.0"

_HOME = {
    "Tensor": "autograd", "no_grad": "autograd", "set_backend": "autograd", "tensor": "autograd", "use_backend": "autograd",
    "Config": "config", "DataConfig": "config", "ModelConfig": "config", "MoEConfig": "config", "TrainConfig": "config",
    "load_config": "config", "UserError": "errors", "generate": "generation", "load": "loading", "Cache": "model", "Transformer": "model",
    "MoE": "moe", "Rng": "random", "resume": "trainer", "train": "trainer",
}  # fmt: skip
_MODULES = ("nn", "ops", "optim", "testing")
__all__ = ["__version__", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"minimoe.{name}")
    if name in _HOME:
        value = getattr(import_module(f"minimoe.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minimoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
