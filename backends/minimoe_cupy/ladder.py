"""The ladder: kernels in CUDA C that are there to be read, from the definition up to the ones that the backend launches (docs/gpu.md).

No topic imports this module, so that `sources()` leaves these files out, and nobody's first start compiles them. The tests compile them for
the same cards as all others, and compare every rung with NumPy; `benchmarks/cuda_ladder.py` counts what each rung executes.
"""

from minimoe_cupy.launch import instances
from minimoe_cupy.loader import Source

PRODUCT = Source("ladder_product.cu", ("product_naive", "product_shared", "product_mma"))
ATTENTION = Source(
    "ladder_attention.cu", ("attention_scores", "attention_softmax", "attention_values", *instances("attention_online", [1, 2, 3, 4]))
)
LADDER = (PRODUCT, ATTENTION)
