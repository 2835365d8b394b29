"""PTX texts for tests of instructions: a kernel `k` of arrays, whose addresses are in %rd1, %rd2, .., with its thread's number in %r1."""

from ptx_machine.machine import Module

HEAD = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k({parameters})
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<128>;
    .reg .f32 %f<640>;
    .reg .b64 %rd<64>;
    .shared .align 1024 .b8 tile[{shared}];
    {loads}
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tile;
    {body}
    ret;
}}
"""


def module(body, arrays=2, shared=1024):
    """A kernel of that many arrays with `shared` bytes of shared memory, at %r2."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(arrays))
    loads = "\n".join(f"    ld.param.u64 %rd{i + 1}, [p{i}];\n    cvta.to.global.u64 %rd{i + 1}, %rd{i + 1};" for i in range(arrays))
    return Module(HEAD.format(parameters=parameters, loads=loads.strip(), body=body.strip(), shared=shared))


def run(body, *arrays, threads=32, shared=1024, seed=0, count=False):
    """Run such a kernel in one block.   -> the machine's counters"""
    return module(body, len(arrays), shared).launch("k", (1,), (threads,), arrays, seed=seed, count=count)
