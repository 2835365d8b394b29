"""AdamW and SGD against torch.optim: ten steps from the same weights with the same gradients."""

import numpy as np
import pytest
import torch
from parity.peers import close, leaf

from minimoe import optim

pytestmark = pytest.mark.parity
SHAPES = {"matrix": (7, 5), "experts": (3, 4, 6), "vector": (9,)}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def ten_steps(ours, theirs, optimizer, peer, dtype, clip=0.0):
    for step in range(10):
        rng = np.random.default_rng([3, step])
        gradients = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
        for name in SHAPES:
            ours[name].grad[...] = gradients[name]
            theirs[name].grad = torch.tensor(gradients[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimizer.step(lr=0.05 / (step + 1), scale=optimizer.clip_scale(optimizer.grad_norm(), clip))
        for group in peer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        peer.step()
    for name in SHAPES:
        close(ours[name], theirs[name], TOLERANCE[dtype], name)


def leaves(dtype):
    rng = np.random.default_rng(0)
    pairs = {name: leaf(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    return {name: ours for name, (ours, _) in pairs.items()}, {name: theirs for name, (_, theirs) in pairs.items()}


@each_dtype
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_agrees_with_torch(clip, dtype):
    ours, theirs = leaves(dtype)
    decayed = [{"params": [theirs["matrix"], theirs["experts"]], "weight_decay": 0.3}, {"params": [theirs["vector"]], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(decayed, betas=(0.8, 0.95), eps=1e-6)
    ten_steps(ours, theirs, optim.AdamW(ours.values(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3), peer, dtype, clip)


@each_dtype
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_agrees_with_torch(momentum, dtype):
    ours, theirs = leaves(dtype)
    ten_steps(ours, theirs, optim.SGD(ours.values(), momentum=momentum), torch.optim.SGD(theirs.values(), lr=1.0, momentum=momentum), dtype)
