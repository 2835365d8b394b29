"""The kernels' sources, in the language of the device's compiler: here Python that Numba compiles; each is headed by its contract."""

SWIGLU = """
# y[n,h] = silu(gate[n,h]) up[n,h], silu(g) = g / (1 + exp(-g)).   gate_up [N,2H], the gate half first; y [N,H]
# One block for each row n. Bytes: 2NH read, NH written. Reference: minimoe/reference/activation.py
def swiglu(n, gate_up, y):
    hidden = y.shape[1]
    for h in range(hidden):
        gate = gate_up[n, h]
        y[n, h] = gate / (1 + exp(-gate)) * gate_up[n, hidden + h]
"""
