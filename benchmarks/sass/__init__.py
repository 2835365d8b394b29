"""What a card would do with each kernel, by count, without a card: `python -m benchmarks.sass`.

The command takes every kernel that a training step of a routed model launches on the backends `cupy` and `numba-cuda`, at one size, and

- compiles it to machine code for the A100 (sm_80) and the H100 and H200 (sm_90a), disassembles that with `nvidia-cuda-nvdisasm`, and counts
  registers, shared memory, and the instructions of the main loop (built.py, listing.py, flow.py);
- executes it on the PTX machine of tests/ptx_machine at a small size with the same tiles, which counts instructions, sectors and bank
  conflicts (launches.py, executed.py), and multiplies instructions to the typical size by FLOPs, or without products by bytes;
- says how many blocks a multiprocessor holds, and predicts the least time on each card from published peaks (cards.py).

It writes benchmarks/results/sass.json and the table in docs/gpu.md, which says what the columns mean (report.py). If results of
`python -m benchmarks.gpu` are in benchmarks/results/ (gpu*.json), it also shows their times beside the predictions (beside.py).
"""
