"""Every differentiable operation, once: the call of a kernel, and the closure that computes its gradient.

The formulas of kernels are in `minimoe/reference/`, each forward next to its backward. Only operations that no kernel computes have
their formulas here: arithmetic, elementwise functions, reductions, and changes of shape.

A closure holds arrays, never tensors: so there is no cycle of references, and an optimizer that gives a parameter a new array cannot
change a gradient. A gradient that no input needs is not computed. If a closure takes `outs`, they say for each input where the kernel
may write its gradient (`engine/buffers.py`).
"""

from minimoe.engine.ops.arithmetic import add, divide, matmul, multiply, power, subtract, where
from minimoe.engine.ops.elementwise import activate, astype, dropout, exp, gelu, log, relu, sigmoid, softplus, swiglu, tanh
from minimoe.engine.ops.experts import expert_sum, ffn, gate, moe_ffn, noisy_load
from minimoe.engine.ops.layers import add_norm, attention, embedding, layer_norm, linear, rms_norm, rope, split_heads
from minimoe.engine.ops.loss import cross_entropy, linear_cross_entropy
from minimoe.engine.ops.low_rank import low_rank
from minimoe.engine.ops.reductions import logsumexp, max, mean, softmax, sum
from minimoe.engine.ops.shape import broadcast_to, concat, getitem, permute, reshape, split, stack

__all__ = [
    "activate", "add", "add_norm", "astype", "attention", "broadcast_to", "concat", "cross_entropy", "divide", "dropout",
    "embedding", "exp", "expert_sum", "ffn", "gate", "gelu", "getitem", "layer_norm", "linear", "linear_cross_entropy",
    "log", "logsumexp", "low_rank", "matmul", "max", "mean", "moe_ffn", "multiply", "noisy_load", "permute", "power", "relu", "reshape",
    "rms_norm", "rope", "sigmoid", "softmax", "softplus", "split", "split_heads", "stack", "subtract", "sum", "swiglu",
    "tanh", "where",
]  # fmt: skip
