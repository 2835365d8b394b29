"""minimoe: Transformers and Mixtures of Experts from scratch.

    import minimoe as mm
    layer = mm.MoE(d_model=16, d_hidden=24, moe=mm.MoEConfig(n_experts=4, top_k=2))
    y, stats = layer(mm.tensor(array, requires_grad=True))

Names are imported when they are first used, so that `minimoe --help` and `import minimoe` are fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe import nn as nn
    from minimoe import ops as ops
    from minimoe import optim as optim
    from minimoe import testing as testing
    from minimoe.backend import set_backend as set_backend
    from minimoe.backend import use_backend as use_backend
    from minimoe.config import Config as Config
    from minimoe.config import DataConfig as DataConfig
    from minimoe.config import LoraConfig as LoraConfig
    from minimoe.config import ModelConfig as ModelConfig
    from minimoe.config import MoEConfig as MoEConfig
    from minimoe.config import TrainConfig as TrainConfig
    from minimoe.config import load_config as load_config
    from minimoe.engine.creation import tensor as tensor
    from minimoe.engine.grad_mode import no_grad as no_grad
    from minimoe.engine.graph import show_graph as show_graph
    from minimoe.engine.random import Rng as Rng
    from minimoe.engine.tensor import Tensor as Tensor
    from minimoe.errors import UserError as UserError
    from minimoe.generation.conversation import Conversation as Conversation
    from minimoe.generation.generation import generate as generate
    from minimoe.layers.cache import Cache as Cache
    from minimoe.layers.moe import MoE as MoE
    from minimoe.pretrained.loading import load as load
    from minimoe.pretrained.transformer import PretrainedTransformer
    from minimoe.study.classify import classify as classify
    from minimoe.study.compare import compare as compare
    from minimoe.study.evaluate import evaluate as evaluate
    from minimoe.study.fill import fill as fill
    from minimoe.study.inspect import inspect as inspect
    from minimoe.training.starting import resume as resume
    from minimoe.training.starting import train as train

    Transformer = PretrainedTransformer

__version__ = "0.1.0"

_HOME = {
    "Tensor": "engine.tensor", "no_grad": "engine.grad_mode", "tensor": "engine.creation",
    "Rng": "engine.random", "show_graph": "engine.graph",
    "set_backend": "backend", "use_backend": "backend", "UserError": "errors",
    "Config": "config", "DataConfig": "config", "LoraConfig": "config", "ModelConfig": "config", "MoEConfig": "config",
    "TrainConfig": "config",
    "load_config": "config", "MoE": "layers.moe", "Cache": "layers.cache", "Transformer": "pretrained.transformer:PretrainedTransformer",
    "load": "pretrained.loading", "generate": "generation.generation", "resume": "training.starting", "train": "training.starting",
    "classify": "study.classify", "compare": "study.compare", "evaluate": "study.evaluate", "inspect": "study.inspect",
    "fill": "study.fill", "Conversation": "generation.conversation",
}  # fmt: skip
_MODULES = ("nn", "ops", "optim", "testing")
__all__ = ["__version__", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"minimoe.{name}")
    if name in _HOME:
        module, _, own_name = _HOME[name].partition(":")
        value = getattr(import_module(f"minimoe.{module}"), own_name or name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minimoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
