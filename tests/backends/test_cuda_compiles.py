"""Every CUDA C kernel, compiled by NVIDIA's compiler for Ampere and Hopper: no spills, no local memory, the instructions that are meant."""

import re

import pytest
from cuda_on_cpu.nvrtc import ARCHITECTURES, compile_for

from minimoe_cupy import sources

MADE_FOR = [(source, architecture) for source in sources() for architecture in ARCHITECTURES if source.architecture in (None, architecture)]


@pytest.mark.parametrize("source, architecture", [pytest.param(*each, id=f"{each[0].file}-{each[1]}") for each in MADE_FOR])
def test_a_kernel_compiles_without_spills_or_local_memory(source, architecture):
    for name, made in compile_for(source.path, source.names, architecture).items():
        assert (made.stack, made.spilled) == (0, 0), f"{name}: {made.stack} bytes of local memory, {made.spilled} spilled"
        if "mma_bf16(" in source.path.read_text() and "bf16" in name:
            assert "mma.sync" in made.ptx or "wgmma" in made.ptx, f"{name} does not use the tensor cores"
        if name.endswith((", 4>", ", 8>")):
            for access in ("ld.global", "st.global"):
                assert re.search(rf"{access}(\.nc)?\.v4", made.ptx), f"{name} has no {access} of 16 bytes"
