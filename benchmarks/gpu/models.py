"""minimoe's layer and model with weights drawn on the device: on the host, where `Module.init` draws them, large models take minutes."""

from typing import Self

from benchmarks.gpu.data import Data
from minimoe.backend import Backend, current_backend
from minimoe.layers.moe import MoE
from minimoe.model.transformer import Transformer
from minimoe.nn import Module


class Filled(Module):
    """`init` with each parameter's own spread and mean, but independent of seed and path; float32 whatever the dtype of computation."""

    def init(self, seed: int = 0, dtype: str = "float32", backend: Backend | None = None) -> Self:
        data = Data(backend or current_backend())
        for path, module in self.named_modules():
            module.path = path
            module.setup(data.backend, dtype)
        for _, parameter in self.named_state():
            parameter.backend, parameter.grad = data.backend, None
            parameter.data = data.normal(*parameter.shape, scale=parameter.std)
            parameter.data += parameter.start
        return self


class FilledMoE(Filled, MoE):
    """A routed layer with weights drawn on the device."""


class FilledTransformer(Filled, Transformer):
    """A model with weights drawn on the device."""
