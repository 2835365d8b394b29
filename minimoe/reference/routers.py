"""Routers, one object each: how it scores, selects and weighs, its gradient, and the facts that all other parts of minimoe read.

    z [N,E] logits, p = softmax(z) over all E, s = sigmoid(z)

A forward makes a `Gate` from the logits. Besides weights and ids it holds the probabilities P_i that a balance loss needs, summed over the
tokens, and the counts before capacity. A backward takes the gradients of the weights and of those sums. Configuration, cost, layers,
conformance, documentation and backends look a router up by its name in `ROUTERS`, or with `find`, which also knows those of installed
packages (entry-point group `minimoe.routers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from minimoe.reference.extensions import Option, Value, load_outside, outside_names

if TYPE_CHECKING:  # `minimoe train --help` lists the names, without NumPy
    from minimoe.reference.arrays import Array, ArrayLayer

GROUP = "minimoe.routers"
TINY = 1e-20  # added to a sum of sigmoids, which may all round to 0 (DeepSeek-V3)


class Rule(NamedTuple):
    """How a router chooses experts; the same for a whole run."""

    router: str
    top_k: int
    norm: bool = True
    n_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    options: tuple[tuple[str, Value], ...] = ()  # settings of a router from another package: [moe.options]

    @property
    def normalised(self) -> bool:
        """True if the weights of a token's experts are divided by their sum because `norm` asks for it."""
        return self.norm and find(self.router).norm == "optional"

    def option(self, name: str) -> Any:
        """Return the value of a setting that the router declares in its `options`."""
        given = dict(self.options)
        return given[name] if name in given else find(self.router).options[name].default


class Gate(NamedTuple):
    """What a router decided. W is K, but E for expert choice. Sums over tokens are taken in an order that the shape alone fixes."""

    weights: Array  # [N,W]
    ids: Array  # [N,W] int32 in range, or -1: no expert (expert choice)
    scores: Array  # [N,E]: p, or s for sigmoid_bias
    counts: Array  # [E] int32, before capacity, valid tokens only
    prob_sum: Array  # [E]: sum over valid tokens of p (of s over its row's sum)


Settings: TypeAlias = Any
"""The table [moe] (`minimoe.config.MoEConfig`), which is defined above this module."""
Forward: TypeAlias = "Callable[[ArrayLayer, Array, Array | None, Array | None, Rule], Gate]"
Backward: TypeAlias = "Callable[[ArrayLayer, Array | None, Array | None, Gate, Array | None, Rule], Array]"


class Adjust(NamedTuple):
    """How a learned array w [E] changes the logits, and the gradient."""

    forward: Callable[[ArrayLayer, Array, Array], Array]  # (backend, logits [N,E], w) -> logits [N,E]
    backward: Callable[[ArrayLayer, Array, Array, Array], tuple[Array, Array]]  # (backend, dy [N,E], logits, w) -> dlogits, dw


@dataclass(frozen=True)
class RouterState:
    """An array that a router has besides its matrix.   E experts, D model width

    use: "noise"   [E,D], learned: in training h = z + eps * (softplus(x w^T) + 0.01), eps ~ N(0,1), replaces z   (Shazeer et al. 2017)
         "bias"    [E], given to the forward as `bias` and not learned: after each step it moves against the load   (DeepSeek-V3)
         "logits"  [E], learned: the router's `adjust` changes the logits by it
    """

    name: str
    use: Literal["noise", "bias", "logits"]
    start: float = 0.0

    @property
    def trainable(self) -> bool:
        """True if the optimizer updates it."""
        return self.use != "bias"

    def shape(self, e: int, d: int) -> tuple[int, ...]:
        """Return its shape in a layer of E experts and width D."""
        return (e, d) if self.use == "noise" else (e,)


@dataclass(frozen=True, kw_only=True)
class Router:
    """A router: its array functions, and facts about it."""

    name: str
    chosen: str  # which experts are chosen, for the documentation
    weight: str  # and their weight
    paper: str
    forward: Forward  # (backend, logits [N,E], bias [E] or None, valid [N] or None, rule) -> Gate
    backward: Backward  # (backend, dweights [N,W] or None, dprob_sum [E] or None, gate, valid, rule) -> dlogits [N,E]
    norm: Literal["always", "optional", "never"] = "never"  # the weights of a token's experts sum to one: optional means norm_topk_prob
    by_expert: bool = False  # experts choose tokens: W is E, and an id of -1 means that the expert did not choose the token
    groups: bool = False  # n_groups and top_groups restrict the choice
    state: tuple[RouterState, ...] = ()
    adjust: Adjust | None = None  # with a state of use "logits"
    balance: Literal["counts", "importance", "none"] = "counts"  # E sum f_i P_i; CV^2(importance) + CV^2(load); even by construction
    top_k: int = 2  # the defaults of [moe]
    aux_loss_coef: float = 0.01
    options: Mapping[str, Option] = field(default_factory=dict)  # its settings in [moe.options]
    same_as: Mapping[str, Any] = field(default_factory=dict)  # keys of [moe] with which another router does the same
    refuses: Callable[[Settings], str | None] = lambda moe: None  # what is wrong with a configuration, in one line
    warns: str = ""  # what may surprise in a causal model
    rules: tuple[tuple[str, Callable[[int, int], Rule | None]], ...] = ()  # for conformance: variation, (K, E) -> Rule or None

    def state_for(self, use: str) -> RouterState | None:
        """Return its array of that use, or None."""
        return next((array for array in self.state if array.use == use), None)

    def shapes(self, e: int, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of what it learns besides its matrix; a matrix costs one product per token."""
        return ((array.name, array.shape(e, d)) for array in self.state if array.trainable)

    def constant_weight(self, moe: Settings) -> str | None:
        """Return why a token's only combine weight is always 1, so that the task's loss cannot train the router; None if it can."""
        if moe.n_experts == 1 or moe.k > 1 or self.by_expert:
            return None
        if self.norm == "always":
            return (
                f"moe.router = {self.name!r} with moe.top_k = 1 gives the router no gradient (its only weight is always 1): "
                "set moe.top_k = 2, or moe.router = 'switch'"
            )
        if self.norm == "optional" and moe.norm_topk_prob:
            return (
                "moe.top_k = 1 with moe.norm_topk_prob = true gives the router no gradient (its only weight is always 1): "
                "set moe.norm_topk_prob = false, or moe.router = 'switch'"
            )
        return None

    def conformance_rules(self) -> tuple[tuple[str, Callable[[int, int], Rule | None]], ...]:
        """Return the rules that conformance tries, with their labels."""
        made = self.rules or (("", lambda k, e: Rule(self.name, k)),)
        return tuple((f"{self.name}, {variation}" if variation else self.name, make) for variation, make in made)


# ---- parts ---------------------------------------------------------------------------------------------------------------------------


def token_choice(b: ArrayLayer, weights: Array, ids: Array, scores: Array, probs: Array, valid: Array | None) -> Gate:
    """Return the Gate of a router that chooses for each token: counts, and sums of probs [N,E], over valid tokens."""
    e = scores.shape[1]
    counted = ids if valid is None else b.xp.where(valid[:, None], ids, b.xp.full_like(ids, e))
    counts = b.bincount(b.xp.reshape(counted, (-1,)), e + 1)[:e]
    return Gate(weights, ids, scores, counts, sum_valid(b, probs, valid))


def sum_valid(b: ArrayLayer, probs: Array, valid: Array | None) -> Array:
    """Sum over valid tokens.   [N,E] -> [E]"""
    if valid is not None:
        probs = b.xp.where(valid[:, None], probs, b.xp.zeros_like(probs))
    return b.xp.sum(probs, axis=0)


def sum_valid_backward(b: ArrayLayer, dsum: Array, valid: Array | None, like: Array) -> Array:
    """Return the gradient of `sum_valid` at each token.   [E] -> [N,E]"""
    each = b.xp.broadcast_to(dsum, like.shape)
    return each if valid is None else b.xp.where(valid[:, None], each, b.xp.zeros_like(like))


def spread(b: ArrayLayer, values: Array, ids: Array, e: int) -> Array:
    """Put values [N,K] at columns ids [N,K] of zeros [N,E]; slot by slot, so that no scatter is needed."""
    xp = b.xp
    experts = xp.arange(e, dtype=xp.int32)
    full = xp.zeros((values.shape[0], e), dtype=values.dtype)
    for slot in range(ids.shape[1]):
        here = ids[:, slot, None] == experts
        full += xp.astype(here, values.dtype) * values[:, slot, None]
    return full


def at_chosen(b: ArrayLayer, scores: Array, ids: Array) -> Array:
    """Return the scores of the chosen experts.   [N,E], ids [N,K] -> [N,K]"""
    return b.xp.take_along_axis(scores, b.xp.astype(ids, b.xp.int64), axis=-1)


def softmax_backward(b: ArrayLayer, dp: Array, p: Array) -> Array:
    """p = softmax(z):   dz = p * (dp - sum(dp * p))"""
    return p * (dp - b.xp.sum(dp * p, axis=-1, keepdims=True))


def weigh_backward(b: ArrayLayer, dweights: Array, gate: Gate, normalised: bool, scale: float = 1.0, tiny: float = 0.0) -> Array:
    """w = c s / (sum(s) + tiny), or c s:   ds = c / (sum(s) + tiny) * (dw - sum(dw w) / c), or c dw.   [N,K]"""
    if not normalised:
        return dweights * scale
    total = b.xp.sum(at_chosen(b, gate.scores, gate.ids), axis=-1, keepdims=True) + tiny
    return (dweights * scale - b.xp.sum(dweights * gate.weights, axis=-1, keepdims=True)) / total


# ---- softmax_topk and switch ---------------------------------------------------------------------------------------------------------


def softmax_topk(b: ArrayLayer, logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    """p = softmax(z); the k largest p are the weights, over their sum if `norm_topk_prob`.   (Jiang et al. 2024)"""
    p = b.softmax(logits)
    weights, ids = b.top_k(p, rule.top_k)
    if rule.normalised:
        weights = weights / b.xp.sum(weights, axis=-1, keepdims=True)
    return token_choice(b, weights, ids, p, p, valid)


def softmax_topk_backward(
    b: ArrayLayer, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, rule: Rule
) -> Array:
    """dp comes from the sums and, at the chosen experts, from the weights; dz = p * (dp - sum(dp * p))"""
    p = gate.scores
    dp = b.xp.zeros_like(p)
    if dprob_sum is not None:
        dp += sum_valid_backward(b, dprob_sum, valid, p)
    if dweights is not None:
        dp += spread(b, weigh_backward(b, dweights, gate, rule.normalised), gate.ids, p.shape[1])
    return b.xp.zeros_like(p) + softmax_backward(b, dp, p)  # 0 + makes +0 of -0


# ---- topk_softmax and noisy_topk -----------------------------------------------------------------------------------------------------


def topk_softmax(b: ArrayLayer, logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    """Choose the k largest z; the weights are a softmax over those.   (gpt-oss; on noisy logits: Shazeer et al. 2017)"""
    values, ids = b.top_k(logits, rule.top_k)
    p = b.softmax(logits)
    return token_choice(b, b.softmax(values), ids, p, p, valid)


def topk_softmax_backward(
    b: ArrayLayer, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, rule: Rule
) -> Array:
    """w = softmax(z_k):   dz = w * (dw - sum(dw * w)) at the chosen experts, plus the gradient through the sums of p"""
    p = gate.scores
    dp, dlogits = b.xp.zeros_like(p), b.xp.zeros_like(p)
    if dprob_sum is not None:
        dp += sum_valid_backward(b, dprob_sum, valid, p)
    if dweights is not None:
        dlogits += spread(b, softmax_backward(b, dweights, gate.weights), gate.ids, p.shape[1])
    dlogits += softmax_backward(b, dp, p)
    return dlogits


# ---- sigmoid_bias --------------------------------------------------------------------------------------------------------------------


def sigmoid_bias(b: ArrayLayer, logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    """s = sigmoid(z); choose by s + b within the best groups; weigh by s, over its sum if `norm_topk_prob`, times `route_scale`.

    (DeepSeek-V3)
    """
    xp = b.xp
    s = b.sigmoid(logits)
    choice = s if bias is None else s + bias
    if rule.n_groups > 1:
        choice = within_best_groups(b, choice, rule.n_groups, rule.top_groups)
    _, ids = b.top_k(choice, rule.top_k)
    weights = at_chosen(b, s, ids)
    if rule.norm:
        weights = weights / (xp.sum(weights, axis=-1, keepdims=True) + TINY)
    probs = s / (xp.sum(s, axis=-1, keepdims=True) + TINY)
    return token_choice(b, weights * rule.route_scale, ids, s, probs, valid)


def within_best_groups(b: ArrayLayer, choice: Array, n_groups: int, top_groups: int) -> Array:
    """-inf outside the best groups; a group's score is the sum of its two best.   [N,E] -> [N,E]"""
    xp, (n, e) = b.xp, choice.shape
    grouped = xp.reshape(choice, (n, n_groups, e // n_groups))
    best, _ = b.top_k(grouped, 2)
    _, groups = b.top_k(xp.sum(best, axis=-1), top_groups)  # [N,top_groups]
    inside = xp.any(groups[:, :, None] == xp.arange(n_groups, dtype=xp.int32), axis=1)  # [N,n_groups]
    return xp.reshape(xp.where(inside[:, :, None], grouped, xp.full_like(grouped, -xp.inf)), (n, e))


def sigmoid_bias_backward(
    b: ArrayLayer, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, rule: Rule
) -> Array:
    """dz = ds * s * (1 - s); ds comes from the weights at the chosen experts, and from P = s / sum(s)"""
    xp, s = b.xp, gate.scores
    ds = xp.zeros_like(s)
    if dweights is not None:
        ds += spread(b, weigh_backward(b, dweights, gate, rule.normalised, rule.route_scale, TINY), gate.ids, s.shape[1])
    if dprob_sum is not None:
        total = xp.sum(s, axis=-1, keepdims=True) + TINY
        dprobs = sum_valid_backward(b, dprob_sum, valid, s)
        ds += (dprobs - xp.sum(dprobs * s, axis=-1, keepdims=True) / total) / total
    return ds * s * (1.0 - s)


# ---- expert_choice -------------------------------------------------------------------------------------------------------------------


def expert_choice(b: ArrayLayer, logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    """Each expert takes its c = min(N, max(1, ceil(N k / E))) largest p, with N valid tokens; the weight is p.   (Zhou et al. 2022)"""
    xp = b.xp
    n, e = logits.shape
    p = b.softmax(logits)
    order = p if valid is None else xp.where(valid[:, None], p, xp.full_like(p, -xp.inf))
    rank = b.argsort(b.argsort(-order, axis=0), axis=0)
    chosen = rank < choice_size(b, n, valid, rule.top_k, e)
    if valid is not None:
        chosen = chosen & valid[:, None]
    experts = xp.broadcast_to(xp.arange(e, dtype=xp.int32), (n, e))
    ids = xp.where(chosen, experts, xp.full_like(experts, -1))
    weights = xp.where(chosen, p, xp.zeros_like(p))
    counts = xp.sum(xp.astype(chosen, xp.int32), axis=0, dtype=xp.int32)
    return Gate(weights, ids, p, counts, sum_valid(b, p, valid))


def expert_choice_backward(
    b: ArrayLayer, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, rule: Rule
) -> Array:
    """dp comes from the sums and, where the expert chose the token, from the weight; dz = p * (dp - sum(dp * p))"""
    p = gate.scores
    dp = b.xp.zeros_like(p)
    if dprob_sum is not None:
        dp += sum_valid_backward(b, dprob_sum, valid, p)
    if dweights is not None:
        dp += dweights * b.xp.astype(gate.ids >= 0, dweights.dtype)
    return b.xp.zeros_like(p) + softmax_backward(b, dp, p)  # 0 + makes +0 of -0


def n_valid(b: ArrayLayer, n: int, valid: Array | None) -> int | Array:
    """Return the number of valid tokens: an int, or a 0-d int64 on the device."""
    return n if valid is None else b.xp.sum(b.xp.astype(valid, b.xp.int64))


def choice_size(b: ArrayLayer, n: int, valid: Array | None, k: int, e: int) -> int | Array:
    """Return c of expert choice; with padding, a 0-d device array."""
    if valid is None:
        return min(n, max(1, -(-n * k // e)))
    count = n_valid(b, n, valid)
    return b.xp.minimum(count, b.xp.clip((count * k + (e - 1)) // e, min=1))


# ---- configurations that they refuse -------------------------------------------------------------------------------------------------


def refused_by_switch(moe: Settings) -> str | None:
    if moe.k != 1:
        return f"moe.router = 'switch' sends each token to one expert: moe.top_k must be 1, not {moe.k}"
    return None


def refused_by_noisy_topk(moe: Settings) -> str | None:
    if moe.aux_convention == "mixtral":
        return "moe.aux_convention = 'mixtral' pools f and P over layers, but noisy_topk has its own losses: set 'switch' or 'megablocks'"
    return None


def refused_by_expert_choice(moe: Settings) -> str | None:
    if moe.aux_loss_coef:
        return "moe.router = 'expert_choice' is balanced by construction: set moe.aux_loss_coef = 0"
    if moe.capacity_factor:
        return "moe.router = 'expert_choice' sets each expert's rows by top_k: set moe.capacity_factor = 0"
    return None


def in_groups(size: int, k: int, e: int) -> Rule | None:
    """Return conformance's rule for sigmoid_bias with groups of that many experts, half of them open, if E and K allow it."""
    n_groups = e // size
    top_groups = max(1, n_groups // 2)
    if e % (2 * size) or k > size * top_groups:
        return None
    return Rule("sigmoid_bias", k, n_groups=n_groups, top_groups=top_groups, norm=False)


# ---- the table -----------------------------------------------------------------------------------------------------------------------

_TABLE = (
    Router(
        name="softmax_topk",
        chosen="the k largest p",
        weight="p, over their sum if `norm_topk_prob`",
        paper="Mixtral (Jiang et al. 2024)",
        forward=softmax_topk,
        backward=softmax_topk_backward,
        norm="optional",
        rules=(("", lambda k, e: Rule("softmax_topk", k)), ("not normalised", lambda k, e: Rule("softmax_topk", k, norm=False))),
    ),
    Router(
        name="topk_softmax",
        chosen="the k largest z",
        weight="softmax over those k logits",
        paper="gpt-oss",
        forward=topk_softmax,
        backward=topk_softmax_backward,
        norm="always",
        same_as={"router": "softmax_topk", "norm_topk_prob": True},  # the softmax over k logits is p over the sum of those k
    ),
    Router(
        name="switch",
        chosen="the largest p (k = 1)",
        weight="p",
        paper="Fedus et al. 2021",
        forward=softmax_topk,
        backward=softmax_topk_backward,
        same_as={"router": "softmax_topk", "norm_topk_prob": False},
        top_k=1,
        refuses=refused_by_switch,
        rules=(("", lambda k, e: Rule("switch", 1)),),
    ),
    Router(
        name="noisy_topk",
        chosen="the k largest noisy logits `h`",
        weight="softmax over those k",
        paper="Shazeer et al. 2017",
        forward=topk_softmax,
        backward=topk_softmax_backward,
        norm="always",
        state=(RouterState("noise_weight", "noise"),),  # starts at zero: softplus(0) + 0.01 of noise
        balance="importance",
        refuses=refused_by_noisy_topk,
    ),
    Router(
        name="sigmoid_bias",
        chosen="the k largest `s + b`, `s = sigmoid(z)`",
        weight="s without b, over their sum if `norm_topk_prob`, times `route_scale`",
        paper="DeepSeek-V3",
        forward=sigmoid_bias,
        backward=sigmoid_bias_backward,
        norm="optional",
        groups=True,
        state=(RouterState("balance_bias", "bias"),),
        rules=(
            ("", lambda k, e: Rule("sigmoid_bias", k, route_scale=2.5)),
            ("groups", partial(in_groups, 2)),
            ("groups of four", partial(in_groups, 4)),
        ),
    ),
    Router(
        name="expert_choice",
        chosen="each expert takes its `c` largest p over the tokens",
        weight="p",
        paper="Zhou et al. 2022",
        forward=expert_choice,
        backward=expert_choice_backward,
        by_expert=True,
        balance="none",
        aux_loss_coef=0.0,
        refuses=refused_by_expert_choice,
        warns="expert_choice picks tokens over the whole batch: in a causal model the choice sees the future",
    ),
)
ROUTERS: dict[str, Router] = {router.name: router for router in _TABLE}
"""The routers that come with minimoe."""


def find(name: str) -> Router:
    """Return the router of that name, from minimoe or an installed package.

    Raises UnknownName, a ConfigError, with the nearest name; ConfigError if a package's entry is not a router.
    """
    return ROUTERS[name] if name in ROUTERS else from_outside(name)


@cache
def from_outside(name: str) -> Router:
    found: Router = load_outside(Router, GROUP, name, ROUTERS)
    return found


def names() -> list[str]:
    """Return the names of all routers: minimoe's, then those of installed packages."""
    return [*ROUTERS, *(name for name in outside_names(GROUP) if name not in ROUTERS)]
