"""PyTorch's and transformers' sides of layer and step.

In bfloat16 they have what minimoe has: float32 weights, rounded into the bfloat16 ones that compute before each pass (`Masters`), and
float32 gradients; activations and the residual stream are bfloat16, the router's arithmetic float32 (Mixtral's: its softmax). That is
faster than autocast, whose norms and residual stream are float32. Products in float32 never use TF32. Nothing is read back from the card
unless the style needs it (loop, sorted: the rows of each expert). Modules are made and their weights drawn on the card.
"""

from typing import Any, Literal, NamedTuple

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sides import Made
from benchmarks.models import Case
from benchmarks.peers import mixtral_losses, mixtral_model, torch_model
from minimoe.config import ModelConfig, MoEConfig

Style = Literal["loop", "sorted", "grouped"]
"""How the routed layer is written: benchmarks/torch_models.py."""

How = Literal["eager", "compiled", "graph"]
"""Eager, by torch.compile, or recorded as a CUDA graph."""


class Layer(NamedTuple):
    """A routed layer: tokens, width, hidden width of an expert, experts, experts per token."""

    n: int
    d: int
    h: int
    e: int
    k: int
    dtype: str

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(n_experts=self.e, top_k=self.k, d_hidden=self.h, aux_loss_coef=0.01, z_loss_coef=0.0)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"N": self.n, "D": self.d, "H": self.h, "E": self.e, "K": self.k}

    @property
    def memory(self) -> float:
        """About the bytes that a side takes: weights and gradients in float32 and bfloat16, activations and theirs; half as much again for
        what a recording and pools keep; the context."""
        weights, rows = 3 * self.e * self.d * self.h, self.n * self.k
        return 1.5 * (12 * weights + 4 * rows * (2 * self.d + 3 * self.h)) + 7e8


class Masters:
    """float32 weights and gradients of a module, which computes in them, or in its own rounded copies. The router's are never rounded."""

    def __init__(self, module: Any, dtype: str) -> None:
        import torch

        self.torch = torch
        self.narrow: list[Any] = []  # what the module computes with, where that is another array
        self.wide: list[Any] = []  # what that is rounded from
        self.own: list[Any] = []  # what is computed in as it is
        for name, parameter in module.named_parameters():
            if dtype == "float32" or "router" in name:
                self.own.append(parameter)
                continue
            wide = parameter.detach().clone().requires_grad_()
            wide.grad = torch.zeros_like(wide)
            parameter.data = parameter.data.to(getattr(torch, dtype))
            self.wide.append(wide)
            self.narrow.append(parameter)

    @property
    def parameters(self) -> list[Any]:
        """Return the parameters that an optimizer updates, after `widen` has set the gradients."""
        return self.wide + self.own

    def lower(self) -> None:
        """Round the weights for the next pass, and drop older gradients."""
        for parameter in self.narrow + self.own:
            parameter.grad = None
        if self.narrow:
            with self.torch.no_grad():
                self.torch._foreach_copy_(self.narrow, self.wide)

    def widen(self) -> None:
        """The gradients of the pass in float32."""
        if self.narrow:
            self.torch._foreach_copy_([wide.grad for wide in self.wide], [narrow.grad for narrow in self.narrow])


def started() -> Any:
    """PyTorch, its products in float32 and its numbers always the same."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    return torch


def graphed(call: Call) -> Call:
    """A call recorded as a CUDA graph. Raises RuntimeError if the host waits for the card in it."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- the layer -----------------------------------------------------------------------------------------------------------------------


def torch_layer(layer: Layer, style: Style, how: How, lab: Lab) -> Made:
    """Forward and backward of `benchmarks.torch_models.MoE`, its balance loss included."""
    torch = started()
    from benchmarks.torch_models import MoE

    shape: dict[str, Any] = {"d_model": layer.d, "n_layers": 1, "n_heads": 1, "d_hidden": layer.h, "max_seq_len": layer.n, "vocab_size": 1}
    with torch.device(lab.torch):
        module = MoE(ModelConfig(**shape, moe=layer.moe), style, separate=style != "grouped")
    return layer_call(layer, filled(torch, module), how, lab)


def mixtral_layer(layer: Layer, implementation: str, lab: Lab) -> Made:
    """Forward and backward of transformers' MixtralSparseMoeBlock, which has no balance loss of its own."""
    torch = started()
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=layer.d, intermediate_size=layer.h, num_local_experts=layer.e, num_experts_per_tok=layer.k)
    config._experts_implementation = implementation
    block: Any = MixtralSparseMoeBlock
    with torch.device(lab.torch):
        module = block(config)
    return layer_call(layer, filled(torch, module), "eager", lab)


def filled(torch: Any, module: Any) -> Any:
    """Draw a module's parameters on its own device, small and normal."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02)
    return module


def layer_call(layer: Layer, module: Any, how: How, lab: Lab) -> Made:
    """A call from float32 weights to float32 gradients of the weights and of x.   x [1,N,D]"""
    import torch

    masters = Masters(module, layer.dtype)
    kind = getattr(torch, layer.dtype)
    x, dy = (torch.randn(1, layer.n, layer.d, device=lab.torch, dtype=kind) for _ in range(2))
    x.requires_grad_()
    one = torch.ones((), device=lab.torch)
    forward = torch.compile(module) if how == "compiled" else module

    def call() -> None:
        masters.lower()
        x.grad = None
        result = forward(x)
        roots, gradients = (result, (dy, one)) if isinstance(result, tuple) else ((result,), (dy,))
        torch.autograd.backward(roots, gradients)
        masters.widen()

    return Made(graphed(call) if how == "graph" else call, [])


# ---- the step ------------------------------------------------------------------------------------------------------------------------


def torch_step(case: Case, style: str, dtype: str, mode: str, lab: Lab) -> Made:
    """A step of `benchmarks.torch_models.TorchTransformer`; `mode`: "" is eager, else torch.compile's."""
    torch = started()
    with torch.device(lab.torch):
        model = torch_model(case, style)
    masters = Masters(model, dtype)
    return step_call(case, masters, torch.compile(model, mode=mode) if mode else model, lab)


def mixtral_step(case: Case, implementation: str, dtype: str, lab: Lab) -> Made:
    """A step of transformers' MixtralForCausalLM of the same shape; its balance loss pools the layers, at the same cost."""
    torch = started()
    with torch.device(lab.torch):
        model = mixtral_model(case, implementation)
    masters, losses = Masters(model, dtype), mixtral_losses(model)

    def both(tokens: Any, targets: Any) -> tuple[Any, Any]:
        cross_entropy, total = losses(tokens, targets)
        return cross_entropy, total - cross_entropy

    return step_call(case, masters, both, lab)


def step_call(case: Case, masters: Masters, losses: Any, lab: Lab) -> Made:
    """Forward, backward, clipping to a norm of 1.0 and fused AdamW; gives the cross-entropy, which stays on the card."""
    import torch

    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(masters.parameters, **settings)  # type: ignore[arg-type]
    tokens, targets = (torch.from_numpy(array).long().to(lab.torch) for array in case.random_batch())

    def call() -> Any:
        masters.lower()
        cross_entropy, router_loss = losses(tokens, targets)
        (cross_entropy + router_loss).backward()
        masters.widen()
        torch.nn.utils.clip_grad_norm_(masters.parameters, 1.0)
        optimizer.step()
        return cross_entropy.detach()

    return Made(call, [])
