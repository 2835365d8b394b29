"""The decoder of minimoe's Transformer as PyTorch users write it: the peer of the benchmarks and of the live parity tests.

Parameters have minimoe's names, shapes and orientation, so `load_arrays(model, minimoe_model.state_dict())` is strict; with
`separate_experts` the experts' stacks are lists with a parameter for each expert. Attention goes through `scaled_dot_product_attention`.
The routed layer comes in the three usual styles: a loop over experts that gathers each expert's tokens ("loop"), tokens sorted by expert
once, then one contiguous slice for each expert ("sorted"), or all slices in one `grouped_mm` ("grouped"; needs the stacks).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig, MoEConfig
from minimoe.errors import ConfigError

MoEStyle = Literal["sorted", "loop", "grouped"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    width = config.d_model if width is None else width
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def activate(name: str, up: Tensor) -> Tensor:
    """swiglu: [.., 2H] (gate first) -> [.., H]; the others keep the shape."""
    if name == "swiglu":
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate) * value
    return ACTIVATIONS[name](up)


class Rotary(nn.Module):
    """Rotary positions, half-split: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, angle = pos * theta^(-2i/C)   (Su et al. 2021)."""

    def __init__(self, width: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        inv_freq = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        self.angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), inv_freq)  # (T, C/2); float64 whatever the model's dtype
        self.tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, heads, T, C] -> the same"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if (dtype, x.device) not in self.tables:
            self.tables[dtype, x.device] = (self.angle.cos().to(x.device, dtype), self.angle.sin().to(x.device, dtype))
        cos, sin = (table[: x.shape[2]] for table in self.tables[dtype, x.device])
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; query head i reads key/value head i // (Q/G); a window w sees the w newest positions, its own included."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.width, self.window = config.n_heads, config.kv_heads, config.head_width, config.window(layer)
        self.rotary = rotary
        self.qkv_proj = nn.Linear(config.d_model, (self.n_heads + 2 * self.n_kv) * self.width, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.n_heads * self.width, config.d_model, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            heads = (self.n_heads, self.n_kv) if self.qk_norm == "full" else (1, 1)
            self.q_norm = nn.RMSNorm(heads[0] * self.width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(heads[1] * self.width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        batch, seq, _ = x.shape
        q, k, v = self.qkv_proj(x).split([self.n_heads * self.width, self.n_kv * self.width, self.n_kv * self.width], dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(batch, seq, -1, self.width).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = self.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.n_kv != self.n_heads
        seq = q.shape[2]
        if not self.window or self.window >= seq:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        visible = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


class FeedForward(nn.Module):
    """The dense FFN: down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate_up_proj = nn.Linear(config.d_model, 2 * hidden, bias=config.bias)
        else:
            self.up_proj = nn.Linear(config.d_model, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.gate_up_proj if self.activation == "swiglu" else self.up_proj
        return self.down_proj(activate(self.activation, up(x)))


class Router(nn.Module):
    """softmax over all experts, the k largest, over their sum if `norm_topk_prob` (Jiang et al. 2024); logits in at least float32.

    Its loss is the layer's share of the model's: the balance loss E * sum_i f_i P_i summed over layers, mean logsumexp(z)^2 averaged.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        assert moe.aux_loss_coef is not None
        self.n_experts, self.k = moe.n_experts, moe.k
        self.norm = moe.norm_topk_prob and moe.router == "softmax_topk"
        self.balance_coef, self.z_coef = moe.aux_loss_coef, moe.z_loss_coef / len(config.moe_layers())
        self.weight = nn.Parameter(torch.empty(moe.n_experts, config.d_model))
        self.bias = nn.Parameter(torch.zeros(moe.n_experts)) if moe.router_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [N, D] -> weights [N, K], ids [N, K], tokens of each expert [E] (floats), loss"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        p = logits.softmax(dim=-1)
        weights, ids = p.topk(self.k, dim=-1)
        if self.norm:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = torch.histc(ids.to(dtype), bins=self.n_experts, min=0, max=self.n_experts - 1)  # bincount, which cannot be compiled
        loss = (self.balance_coef * self.n_experts / ids.numel()) * (counts * p.mean(dim=0)).sum()
        if self.z_coef:
            loss = loss + self.z_coef * logits.logsumexp(dim=-1).square().mean()
        return weights, ids, counts, loss


class Experts(nn.Module):
    """E FFNs with stacked weights or, if `separate`, a parameter for each expert, so that no gradient has to be stacked."""

    def __init__(self, config: ModelConfig, n_experts: int, separate: bool) -> None:
        super().__init__()
        self.activation = config.activation
        d, h = config.d_model, config.expert_hidden
        up, rows = ("gate_up", 2 * h) if self.activation == "swiglu" else ("up", h)
        shapes: dict[str, tuple[int, ...]] = {f"{up}_proj": (rows, d), "down_proj": (d, h)}
        if config.bias:
            shapes |= {f"{up}_bias": (rows,), "down_bias": (d,)}
        self.names = list(shapes)
        for name, shape in shapes.items():
            if separate:
                self.add_module(name, nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(n_experts)))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(n_experts, *shape)))

    def each(self) -> list[tuple[Tensor, ...]]:
        """For each expert its up weight, down weight and, with biases, their biases. A stack is split once per forward pass."""
        parts = (getattr(self, name) for name in self.names)
        return list(zip(*(part if isinstance(part, nn.ParameterList) else part.unbind(0) for part in parts), strict=True))

    def one(self, x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:
        return F.linear(activate(self.activation, F.linear(x, up, up_bias)), down, down_bias)

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """All experts in two grouped products.   rows [R, D] in expert order, tokens of each expert [E] -> [R, D]"""
        up, down = (getattr(self, name).transpose(-2, -1) for name in self.names)
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(activate(self.activation, F.grouped_mm(rows, up, offs=ends)), down, offs=ends)


class MoE(nn.Module):
    """The routed layer, dropless: y = sum over the experts of a token of weight * expert(x), plus the shared experts."""

    def __init__(self, config: ModelConfig, style: MoEStyle, separate: bool) -> None:
        super().__init__()
        assert config.moe is not None
        self.style, self.k = style, config.moe.k
        self.router = Router(config, config.moe)
        self.experts = Experts(config, config.moe.n_experts, separate)
        shared = config.moe.n_shared_experts
        self.shared = FeedForward(config, shared * config.expert_hidden) if shared else None
        self.mix = self.loop if style == "loop" else self.sorted

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> y [B, T, D], the router's loss"""
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        weights, ids, counts, loss = self.router(flat)
        y = self.mix(flat, weights.to(flat.dtype), ids, counts).view_as(x)
        return (y if self.shared is None else y + self.shared(x)), loss

    def sorted(self, x: Tensor, weights: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)  # (R,) slots n*K + j in expert order
        token = order // self.k
        rows = x.index_select(0, token)
        if self.style == "grouped":
            rows = self.experts.grouped(rows, counts)
        else:
            slices = torch.split(rows, counts.long().tolist())
            rows = torch.cat([self.experts.one(part, *w) for part, w in zip(slices, self.experts.each(), strict=True)])
        rows = rows * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add_(0, token, rows)

    def loop(self, x: Tensor, weights: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, parameters in enumerate(self.experts.each()):
            token, slot = torch.where(ids == expert)
            y.index_add_(0, token, self.experts.one(x[token], *parameters) * weights[token, slot, None])
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary | None, style: MoEStyle, separate: bool) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer, rotary)
        self.ffn_norm = make_norm(config)
        self.routed = layer in config.moe_layers()
        if self.routed:
            self.moe = MoE(config, style, separate)
        else:
            self.ffn = FeedForward(config, config.d_hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x))
        if not self.routed:
            return x + self.ffn(self.ffn_norm(x)), None
        y, loss = self.moe(self.ffn_norm(x))
        return x + y, loss


class TorchTransformer(nn.Module):
    """A pre-norm causal language model from minimoe's configuration; `moe_style` picks how the routed layers are written.

    Raises `ConfigError` for what this peer does not have (encoders, dropout, capacity, the other routers).
    """

    def __init__(self, config: ModelConfig, moe_style: MoEStyle = "sorted", separate_experts: bool = False) -> None:
        super().__init__()
        check_supported(config)
        if moe_style == "grouped" and (separate_experts or config.bias):
            raise ConfigError("moe_style = 'grouped' multiplies stacked experts without biases")
        assert config.vocab_size is not None
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        rotary = Rotary(config.head_width, config.max_seq_len, config.rope_theta) if config.position == "rope" else None
        self.blocks = nn.ModuleList(Block(config, layer, rotary, moe_style, separate_experts) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal of `init_std`, the projections into the residual stream over sqrt(2L); norms one, biases zero   (Radford et al. 2019)"""
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            name = stacked_name(name)
            if name.endswith("router.bias"):
                assert self.config.moe is not None
                parameter.normal_(0.0, self.config.moe.router_bias_std)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, residual_std if "o_proj" in name or "down_proj" in name else self.config.init_std)

    def run_blocks(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens [B, T] -> logits [B, T, V], and the loss of each routed layer"""
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        losses = []
        for block in self.blocks:
            x, loss = block(x)
            if loss is not None:
                losses.append(loss)
        head = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), head), losses

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, V]"""
        return self.run_blocks(tokens)[0]

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, targets [B, T] -> mean cross-entropy in nats (targets of -100 left out), weighted router loss (0 without experts)"""
        logits, losses = self.run_blocks(tokens)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).to(dtype), targets.flatten())
        return cross_entropy, torch.stack(losses).sum() if losses else cross_entropy.new_zeros(())


def check_supported(config: ModelConfig) -> None:
    """Refuse configurations that this peer would otherwise silently ignore."""
    wrong = []
    if config.vocab_size is None:
        raise ConfigError("the PyTorch peer needs model.vocab_size")
    if not config.causal or config.head != "lm" or config.norm_position != "pre" or config.image_size or config.type_vocab_size:
        wrong.append("an encoder or post-norm model")
    if config.dropout or config.attention_dropout:
        wrong.append("dropout")
    moe = config.moe
    if moe is not None and config.moe_layers():
        if moe.router not in ("softmax_topk", "switch"):
            wrong.append(f"router = {moe.router!r}")
        if moe.aux_convention != "switch" and moe.aux_loss_coef:
            wrong.append(f"aux_convention = {moe.aux_convention!r}")
        if moe.capacity_factor or moe.jitter or moe.noise_std:
            wrong.append("capacity, jitter or noise")
    if wrong:
        raise ConfigError(f"the PyTorch peer is a dropless pre-norm decoder without dropout; it has no {', no '.join(wrong)}")


def stacked_name(name: str) -> str:
    """The name of the stack that one expert's parameter belongs to; any other name as it is."""
    return re.sub(r"(\.experts\.\w+)\.\d+$", r"\1", name)


def load_arrays(model: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Strictly load minimoe's arrays by name; PyTorch's error names what is missing, unexpected or of the wrong shape."""
    state: dict[str, Tensor] = {}
    separate = {stacked_name(name) for name in model.state_dict() if stacked_name(name) != name}
    for name, array in arrays.items():
        if name in separate:
            state |= {f"{name}.{expert}": torch.tensor(part) for expert, part in enumerate(array)}
        else:
            state[name] = torch.tensor(array)
    model.load_state_dict(state, strict=True)
