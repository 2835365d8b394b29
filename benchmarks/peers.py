"""The sides of the CPU benchmark: each does the same whole training step of a model, or only the matrix products of one.

A step is forward, backward, clipping to a norm of 1.0 and AdamW, in float32, on the same tokens; its loss is read at its end. minimoe's is
`minimoe/training/step.py`. PyTorch is written in its fastest form: fused AdamW, gradients freed, a parameter for each expert, rotary tables
kept, nothing read back except the rows of each expert if the style needs them. transformers is measured as Mixtral with each implementation
of its experts; its balance loss pools the layers instead of adding them, at the same cost. `torch.compile` takes the whole model, or leaves
the experts, whose shapes differ from step to step, to eager mode ("compiled around the experts").
"""

from collections.abc import Callable
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.models import Case, products
from minimoe.backend import Backend, load
from minimoe.reference.extensions import BACKENDS

Step = Callable[[], float]
Kind = Literal["minimoe", "eager", "compiled", "products"]
MAX_GATHERED = 256 * 2**20  # bytes of one layer's weights that Mixtral's batched_mm may copy, one for each row


class Side(NamedTuple):
    """A recipe for a side: `make(case, *arguments)` returns its step after `libraries` are imported."""

    kind: Kind
    libraries: tuple[str, ...]
    make: Callable[..., Step]
    arguments: tuple[Any, ...] = ()


def sides(case: Case, backends: list[str], threads: int, compiled: bool) -> dict[str, Side]:
    """Every side that a model has, by name: the products, minimoe on each backend, and its peers."""
    found = {"matrix products alone": Side("products", ("numpy",), products_step)}
    for backend in backends:
        libraries = ("minimoe.model.transformer", "minimoe.training.optim", *([BACKENDS[backend]] if backend in BACKENDS else []))
        found[f"minimoe, {backend}"] = Side("minimoe", libraries, minimoe_step, (backend, threads))
    torch = ("torch", "benchmarks.torch_models")
    routed = bool(case.model.moe_layers())
    for style in ("loop", "sorted", "grouped") if routed else ("",):
        found[join("PyTorch eager", style)] = Side("eager", torch, torch_step, (style, ""))
    if compiled:
        for style in ("loop", "sorted") if routed else ("",):
            found[join("PyTorch compiled", style)] = Side("compiled", torch, torch_step, (style, "whole"))
    if compiled and routed:
        found["PyTorch compiled around the experts, sorted"] = Side("compiled", torch, torch_step, ("sorted", "around"))
    if is_mixtral(case):
        found |= mixtral_sides(case, compiled)
    return found


def join(*words: str) -> str:
    return ", ".join(word for word in words if word)


# ---- minimoe, and the products alone -------------------------------------------------------------------------------------------


def minimoe_step(case: Case, backend: str, threads: int) -> Step:
    return step_on(case, load(backend), threads)


def step_on(case: Case, chosen: Backend, threads: int, recorded: bool = True) -> Step:
    """Return a training step on a backend: recorded, if it can record, or plain."""
    from minimoe.engine.recording import Recorded
    from minimoe.model.transformer import Transformer
    from minimoe.optim import AdamW
    from minimoe.training.metrics import LOSS
    from minimoe.training.step import Step

    chosen.use_threads(threads)
    model = Transformer(case.model, seed=0, backend=chosen)
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    whole = Step(model, optimizer, grad_clip=1.0)
    batch = [part[None] for part in case.random_batch()]  # one micro-batch: [1,B,T]
    repeated = Recorded(whole, chosen, lambda why: print(f"minimoe, {chosen.name}: {why}", flush=True), whole.state)
    call = repeated if recorded else whole
    numbers = count()

    def step() -> float:
        return float(chosen.to_host(call(*whole.arrays(next(numbers), 1e-3, *batch)))[LOSS])

    return step


def products_step(case: Case) -> Step:
    """Each product of a training step once, by NumPy into existing arrays: one for each weight, activations shared by shape."""
    rng = np.random.default_rng(0)
    shared: dict[tuple[str, int, int], Any] = {}

    def activation(role: str, rows: int, width: int) -> Any:
        if (role, rows, width) not in shared:
            shared[role, rows, width] = rng.standard_normal((rows, width), dtype=np.float32)
        return shared[role, rows, width]

    forward, backward = [], []
    for n, out, into in products(case):
        w, dw = rng.standard_normal((out, into), dtype=np.float32), np.zeros((out, into), dtype=np.float32)
        x, y = activation("x", n, into), activation("y", n, out)
        dx, dy = activation("dx", n, into), activation("dy", n, out)
        forward.append((x, w.T, y))
        backward += [(dy.T, x, dw), (dy, w, dx)]
    calls = forward + backward[::-1]

    def step() -> float:
        for a, b, c in calls:
            np.matmul(a, b, out=c)
        return float("nan")

    return step


# ---- PyTorch -------------------------------------------------------------------------------------------------------------------


def torch_step(case: Case, style: str, compiled: str) -> Step:
    """`compiled`: "", "whole" or "around" the experts."""
    import torch

    from benchmarks.torch_models import MoE, TorchTransformer

    torch.manual_seed(0)
    model = torch_model(case, style)
    assert isinstance(model, TorchTransformer)
    if compiled == "around":
        for module in model.modules():
            if isinstance(module, MoE):
                module.mix = torch.compiler.disable(module.mix)  # type: ignore[no-untyped-call]
    call = torch.compile(model) if compiled else model
    routed = bool(case.model.moe_layers())

    def losses(tokens: Any, targets: Any) -> tuple[Any, Any]:
        cross_entropy, router_loss = call(tokens, targets)
        return cross_entropy, cross_entropy + router_loss if routed else cross_entropy

    return whole_step(case, list(model.parameters()), losses)


def torch_model(case: Case, style: str) -> Any:
    """A TorchTransformer: a grouped product needs stacked experts, the other styles have one parameter for each."""
    from benchmarks.torch_models import TorchTransformer

    return TorchTransformer(case.model, style or "sorted", separate_experts=style != "grouped")  # type: ignore[arg-type]


def whole_step(case: Case, parameters: list[Any], losses: Callable[[Any, Any], tuple[Any, Any]]) -> Step:
    """A training step in PyTorch; `losses` gives the cross-entropy and the loss to differentiate."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(array).long() for array in case.random_batch())

    def step() -> float:
        cross_entropy, total = losses(tokens, targets)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(cross_entropy.detach())

    return step


# ---- transformers --------------------------------------------------------------------------------------------------------------


def is_mixtral(case: Case) -> bool:
    """True if transformers' Mixtral can be this model."""
    m = case.model
    if m.moe is None or m.moe_layers() != tuple(range(m.n_layers)):
        return False
    shape = (m.norm, m.position, m.activation, m.moe.router) == ("rms", "rope", "swiglu", "softmax_topk")
    bare = not (m.bias or m.attention_bias or m.qk_norm != "none" or m.sliding_window or m.tie_embeddings)
    return shape and bare and m.moe.norm_topk_prob and not (m.moe.z_loss_coef or m.moe.n_shared_experts or m.moe.router_bias)


def mixtral_sides(case: Case, compiled: bool) -> dict[str, Side]:
    """Its experts eager (a loop), by grouped products, and by batched ones; these copy an expert's weights for each row, and are measured
    only if the copies are small. Grouped products are also compiled, since nothing in them stops the compiler."""
    m = case.model
    assert m.moe is not None
    libraries = ("torch", "transformers", "transformers.models.mixtral.modeling_mixtral")
    implementations = ["eager", "grouped_mm"]
    if case.tokens * m.moe.k * 2 * m.expert_hidden * m.d_model * 4 <= MAX_GATHERED:
        implementations.append("batched_mm")
    found = {f"transformers Mixtral, {name}": Side("eager", libraries, mixtral_step, (name, False)) for name in implementations}
    if compiled:
        found["transformers Mixtral compiled, grouped_mm"] = Side("compiled", libraries, mixtral_step, ("grouped_mm", True))
    return found


def mixtral_model(case: Case, implementation: str) -> Any:
    """MixtralForCausalLM of the model's shape."""
    from transformers import MixtralConfig, MixtralForCausalLM

    m, moe = case.model, case.model.moe
    assert moe is not None and moe.aux_loss_coef is not None and m.vocab_size is not None
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.expert_hidden, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads, head_dim=m.head_width, rms_norm_eps=m.norm_eps,
        max_position_embeddings=m.max_seq_len, rope_parameters={"rope_theta": m.rope_theta, "rope_type": "default"},
        num_local_experts=moe.n_experts, num_experts_per_tok=moe.k, router_aux_loss_coef=moe.aux_loss_coef, use_cache=False,
    ))  # fmt: skip
    model.set_experts_implementation(implementation)
    return model.train()


def mixtral_losses(model: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Gives the cross-entropy alone and with the weighted balance loss.   tokens, targets [B, T] int64"""
    import torch.nn.functional as F

    def losses(tokens: Any, targets: Any) -> tuple[Any, Any]:
        out = model(tokens, output_router_logits=True, use_cache=False)
        cross_entropy = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        return cross_entropy, cross_entropy + model.config.router_aux_loss_coef * out.aux_loss

    return losses


def mixtral_step(case: Case, implementation: str, compiled: bool) -> Step:
    import torch

    torch.manual_seed(0)
    model = mixtral_model(case, implementation)
    losses = mixtral_losses(model)
    return whole_step(case, list(model.parameters()), torch.compile(losses) if compiled else losses)
