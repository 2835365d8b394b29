"""minimoe's GPU backends on a card: whether they are right, how near each kernel is to the card's limits, layer and step beside PyTorch.

`python -m benchmarks.gpu --out DIR [--quick] [--part NAME]... [--minutes 8]`, from the repository's root. It needs minimoe, cupy,
numba-cuda and pytest; torch, transformers and triton are measured beside them if they are installed. Each part has a share of the time:

    machine    card, driver, versions
    tests      tests/gpu by pytest, and a small case under compute-sanitizer         suite.py, small.py
    ceilings   the card's own: a large copy, large matrix products                   ceilings.py
    kernels    each kernel as a share of its ceiling, cupy beside numba-cuda         problems.py, routed.py, dense.py
    layer      the MoE layer forward and backward, and its peers                     layer.py
    step       a whole training step, and its peers                                  step.py

How it measures:

- Every part works in its own processes (`workers.py`, `sides.py`): a kernel or a side that loses the card's context, or hangs, costs its
  row, and the rest continues. In the tests, each backend has one process: what follows such a kernel fails too, or is not reached.
- A kernel's time is the device's, by CUDA events, with the stream held while the host queues the work (`clocks.py`): the host's cost of a
  launch is left out, as in a step that is replayed. Figures are medians; contenders take turns. Calls rotate through 2 to 24 sets of
  inputs, as many as fill three L2 caches, so that no set is in the cache when its turn comes, unless 24 sets of small inputs are less.
- Bytes are counted as at the head of the kernel: what must be read and written once. A multiply-add counts as two FLOPs. A kernel's share
  is the least time that these need at the card's own rates, over its time.
- A layer's or a step's time is that of many in a row, including the host's part; all sides take turns, each in its own process. In bfloat16
  every side also keeps float32 weights and gradients (`torch_sides.py`). "first" is the time until a side's first call is done, while
  others get ready too; kernels of `cupy` that an earlier part or run compiled are kept on disk. If the card's memory or the time does not
  suffice for all, the least important sides are left out.
- A dtype for which a backend has no kernel of its own runs the reference; its row says so.

The command ends with the targets that were missed (`targets.py`), and writes gpu.json, gpu.txt and gpu.md into DIR (`report.py`), also
after every part, so that a run that is stopped leaves what it has; log.txt there holds what the processes printed, tests-*.txt what pytest
printed. Its exit code is 1 if a part, a test or the small case failed.
"""
