"""The routed layer and attention, forward and backward, against golden vectors of PyTorch: 1e-10 in float64, 1e-5 in float32.

`golden/make_golden.py` made them and says what is in them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from routed_layers import BACKENDS
from safetensors import safe_open

import minimoe as mm
from minimoe import ops

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def read(name):
    """-> config, inputs by name, everything else by name"""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a safetensors file is not a dict
        config = json.loads(file.metadata()["case"])["config"]
    inputs = {key.removeprefix("input."): array for key, array in arrays.items() if key.startswith("input.")}
    return config, inputs, {key: array for key, array in arrays.items() if not key.startswith("input.")}


def names(kind):
    return sorted(path.stem for path in GOLDEN.glob(f"{kind}-*.safetensors"))


def check(name, got, expected, dtype):
    """Relative to the largest number of the array."""
    error = np.abs(np.asarray(got) - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error <= TOLERANCE[dtype], f"{name}: off by {error:.2e}"


def layer_of(config, inputs, backend, dtype):
    moe = {key: value for key, value in config.items() if key not in ("activation", "bias", "padding", "d_hidden")}
    layer = mm.MoE(
        inputs["x"].shape[1], config["d_hidden"], config["activation"], mm.MoEConfig(**moe), bias=config.get("bias", False), dtype=dtype,
        backend=backend,
    )  # fmt: skip
    layer.load_state_dict({name: array for name, array in inputs.items() if name not in ("x", "dy", "valid")})
    return layer


@each_backend
@each_dtype
@pytest.mark.parametrize("name", names("moe"))
def test_the_routed_layer_agrees_with_pytorch(name, dtype, backend):
    b, (config, inputs, expected) = BACKENDS[backend], read(name)
    layer = layer_of(config, inputs, b, dtype)
    x = mm.tensor(inputs["x"], requires_grad=True, dtype=dtype, backend=b)
    y, stats = layer(x, inputs.get("valid"))
    ((y * mm.tensor(inputs["dy"], dtype=dtype, backend=b)).sum() + stats.loss).backward()
    ids = b.to_host(stats.ids)
    keep = inputs.get("valid", np.ones(len(ids), dtype=bool))
    assert np.array_equal(ids[keep], expected["ids"][keep])
    results = {"y": y.numpy(), "aux_loss": stats.aux_loss.numpy(), "z_loss": stats.z_loss.numpy(), "dx": b.to_host(x.grad)}
    results |= {f"d.{parameter}": b.to_host(p.grad) for parameter, p in layer.named_parameters()}
    assert {f"{dtype}.{key}" for key in results} == {key for key in expected if key.startswith(dtype)}
    for key, got in results.items():
        check(key, got, expected[f"{dtype}.{key}"], dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize("name", names("attention"))
def test_attention_agrees_with_pytorch(name, dtype, backend):
    b, (config, inputs, expected) = BACKENDS[backend], read(name)
    leaves = {key: mm.tensor(inputs[key], requires_grad=True, dtype=dtype, backend=b) for key in ("q", "k", "v", "sinks") if key in inputs}
    masks = {key: b.from_host(inputs[key]) for key in ("q_pos", "k_pos", "k_valid") if key in inputs}
    options = {key: config[key] for key in ("scale", "causal", "window")}
    y = ops.attention(*leaves.values(), **options, **masks)
    (y * mm.tensor(inputs["dy"], dtype=dtype, backend=b)).sum().backward()
    results = {"y": y.numpy()} | {f"d{key}": b.to_host(leaf.grad) for key, leaf in leaves.items()}
    assert {f"{dtype}.{key}" for key in results} == {key for key in expected if key.startswith(dtype)}
    for key, got in results.items():
        check(key, got, expected[f"{dtype}.{key}"], dtype)


def test_there_are_golden_vectors_of_both_kinds():
    assert len(names("moe")) >= 5 and len(names("attention")) >= 4
