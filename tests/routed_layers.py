"""Routed layers with every weight drawn at random, and the oracles' results for them."""

import msgspec
import numpy as np
import oracles
from strict_backend import StrictBackend

import minimoe as mm
from minimoe.backend import load

BACKENDS = {"numpy": load("numpy"), "strict": StrictBackend()}
RNG = mm.Rng(seed=7, step=3, micro=1)  # of the calls in training mode
D, H = 5, 7


def make_layer(backend="numpy", *, activation="swiglu", bias=False, d_model=D, d_hidden=H, seed=0, std=0.7, **moe):
    """Return a float64 layer whose biases and buffers are random too."""
    moe = {"n_experts": 4, **moe}
    layer = mm.MoE(d_model, d_hidden, activation, mm.MoEConfig(**moe), bias=bias, dtype="float64", backend=BACKENDS[backend])
    draw = np.random.default_rng(seed)
    spread = {"router.balance_bias": 0.1}  # small, or it would choose alone
    layer.load_state_dict({name: spread.get(name, std) * draw.standard_normal(p.shape) for name, p in layer.named_state()})
    return layer


def tokens(n, d_model=D, seed=1):
    return np.random.default_rng(seed).standard_normal((n, d_model))


def padding(n):
    """Return a mask in which every third token is padding, but not the first.   -> [n] bool"""
    return np.arange(n) % 3 != 1


def weights_of(layer):
    """Return parameters and buffers on the host, by name."""
    return {name: np.array(layer.router.weight.backend.to_host(array)) for name, array in layer.state_dict().items()}


def gradients_of(layer):
    """Return gradients by name; a parameter without one fails the test."""
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
    return {name: np.array(p.backend.to_host(p.grad)) for name, p in layer.named_parameters()}


def run(layer, x, valid=None, training=False, requires_grad=False):
    """-> the input as a tensor, y on the host, stats"""
    x = mm.tensor(x, requires_grad=requires_grad, dtype="float64", backend=layer.router.weight.backend)
    y, stats = layer(x, valid, RNG if training else None)
    return x, y, stats


def host(layer, array):
    return np.array(layer.router.weight.backend.to_host(array))


def oracle(layer, x, valid=None, training=False):
    """Compute oracles.moe_layer with the layer's weights, and with its own draws of jitter and noise."""
    moe, b = layer.moe, layer.router.weight.backend
    config = {**msgspec.to_builtins(moe), "activation": layer.experts.activation}
    router_x = noise = None
    if training and moe.jitter:
        u = host(layer, b.uniform(x.size, RNG.draw("router", "jitter"))).reshape(x.shape)  # float32
        router_x = x * (1.0 + moe.jitter * (2.0 * u - 1.0))
        x = router_x if moe.jitter_experts else x
    if training and (moe.noise_std or moe.router == "noisy_topk"):
        purpose = "router_noise" if moe.router == "noisy_topk" else "noise"
        noise = host(layer, b.normal(len(x) * moe.n_experts, RNG.draw("router", purpose))).reshape(len(x), moe.n_experts)
    return oracles.moe_layer(x, weights_of(layer), config, valid, training=training, router_x=router_x, noise=noise)
