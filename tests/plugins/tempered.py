"""A router of one file: each expert's logits times a number that it learns, a softmax at a temperature, then the k largest."""

from minimoe.reference.extensions import Option
from minimoe.reference.routers import (
    Adjust,
    Router,
    RouterState,
    softmax_backward,
    spread,
    sum_valid_backward,
    token_choice,
    weigh_backward,
)


def scaled(b, logits, w):
    """y = z * w   [N,E], [E] -> [N,E]"""
    return logits * w


def scaled_backward(b, dy, logits, w):
    """dz = dy * w, dw = sum over tokens of dy * z"""
    return dy * w, b.xp.sum(dy * logits, axis=0)


def forward(b, logits, bias, valid, rule):
    """p = softmax(z / t); the k largest p are the weights, over their sum.   z [N,E]"""
    p = b.softmax(logits / rule.option("temperature"))
    weights, ids = b.top_k(p, rule.top_k)  # [N,K] each
    return token_choice(b, weights / b.xp.sum(weights, axis=-1, keepdims=True), ids, p, p, valid)


def backward(b, dweights, dprob_sum, gate, valid, rule):
    """dz = p * (dp - sum(dp * p)) / t, dp from the sums of p and, at the chosen, from the weights"""
    p = gate.scores
    dp = b.xp.zeros_like(p)
    if dprob_sum is not None:
        dp += sum_valid_backward(b, dprob_sum, valid, p)
    if dweights is not None:
        dp += spread(b, weigh_backward(b, dweights, gate, normalised=True), gate.ids, p.shape[1])
    return softmax_backward(b, dp, p) / rule.option("temperature")


router = Router(
    name="tempered",
    chosen="the k largest p = softmax(z / temperature)",
    weight="p over their sum",
    paper="Hinton et al. 2015",
    forward=forward,
    backward=backward,
    norm="always",
    state=(RouterState("scale", "logits", start=1.0),),
    adjust=Adjust(scaled, scaled_backward),
    options={"temperature": Option(1.0, "divides the logits", lambda t: None if t > 0 else "must be above 0")},
)
