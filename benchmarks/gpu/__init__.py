"""minimoe's GPU backends on a card: are they right, how near the card's limits is each kernel, how do layer and step stand to PyTorch's.

`python -m benchmarks.gpu --out DIR [--quick] [--part NAME]... [--minutes 8]`, from the repository's root. It needs minimoe, cupy,
numba-cuda and pytest; torch, transformers and triton are measured beside where they are. Its parts, each with a share of the time:

    machine    card, driver, versions
    tests      tests/gpu by pytest, and a small case under compute-sanitizer         suite.py, small.py
    ceilings   the card's own: a large copy, large matrix products                   ceilings.py
    kernels    each kernel as a share of its ceiling, cupy beside numba-cuda         problems.py, routed.py, dense.py
    layer      the MoE layer forward and backward, and its peers                     layer.py
    step       a whole training step, and its peers                                  step.py

How is measured:

- Every part works in processes of its own (`workers.py`, `sides.py`): a kernel or a side that loses the card's context, or hangs, costs its
  row, and the rest goes on anew. Of the tests each backend has one process: what follows such a kernel fails too, or is not reached.
- A kernel's time is the device's, by CUDA events, the stream held while the host queues the work (`clocks.py`): what a launch costs the
  host is left out, as in a step that is replayed. Medians, contenders in turns. Calls rotate through 2 to 24 sets of inputs, as many as
  fill three L2 caches: no set is in the cache when its turn comes, but where inputs are so small that 24 sets are less.
- Bytes are counted as in the kernel's head: what must be read and written once. FLOPs are two a multiply-add. A kernel's share is the
  least time that these need at the card's own rates, over its time.
- A layer's or a step's time is that of many in a row, the host's part included; all sides take turns, each in its own process. In bfloat16
  every side keeps float32 weights and gradients beside (`torch_sides.py`). "first" is how long a side takes until its first call is
  through, while others get ready too; kernels of `cupy` are kept on disk once they were compiled, by an earlier part or run. The least
  wanted sides are left out where the card's memory or the time does not suffice for all.
- What has no kernel of its own for a dtype runs the reference; its row says so.

It ends with what fell short of the targets (`targets.py`), and writes gpu.json, gpu.txt and gpu.md into DIR (`report.py`), after every part
too, so that a run that is stopped leaves what it has; log.txt there holds what the processes printed, tests-*.txt what pytest did. Its exit
code is 1 where a part, a test or the small case failed.
"""
