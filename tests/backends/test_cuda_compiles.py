"""Every CUDA C kernel, compiled by each release of NVIDIA's compiler that is offered: no spills, no local memory, the instructions meant.

The kernels are written for Ampere, Ada and Hopper; for Blackwell (sm_100) they compile, and some spill a little. Each run compiles for
Hopper with the newest release, which is installed, and with the oldest as far as PTX; `--all` adds the others.
"""

import re
import tomllib
from pathlib import Path

import pytest
from ptx_machine.assembled import compile_for
from ptx_machine.nvrtc import STANDARD, WHEELS, Program, installed_release, loaded, newest
from ptx_machine.nvrtc_releases import CUDA_12, OFFERED, OLDEST, library_of

from minimoe_cupy import sources
from minimoe_cupy.device import OLDEST_NVRTC
from minimoe_cupy.ladder import LADDER

ROOT = Path(__file__).parents[2]
COMPILED = (*sources(), *LADDER)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
INSTALLED = next(filter(None, map(installed_release, WHEELS)), None)
ASSEMBLERS = ("newest", *(release for release in ("12.8", "12.9", "13.0", "13.1") if release != INSTALLED))
FOR_EVERY_CARD = ("newest", "12.8")  # the releases in between compile for one
MOST_SPILLED = {"sm_100": 168}  # bytes of a kernel; for the others none
EVERY = [
    pytest.param(source, architecture, release, id=f"{source.file}-{source.names[0]}-{architecture}-{release}")
    for release in ASSEMBLERS
    for architecture in ARCHITECTURES
    for source in COMPILED
    if source.architecture in (None, architecture) and (release in FOR_EVERY_CARD or architecture == "sm_90a")
]


@pytest.mark.parametrize("source, architecture, release", EVERY)
def test_a_kernel_compiles_without_spills_or_local_memory(source, architecture, release):
    library = newest() if release == "newest" else library_of(release)
    for name, made in compile_for(source.path, source.names, architecture, library).items():
        most, words = MOST_SPILLED.get(architecture, 0), f"{name}: {made.stack} bytes of local memory, {made.spilled} spilled"
        assert made.spilled <= most and made.stack <= most // 2, words
        assert made.remarks == (), name
        if "mma_bf16(" in source.path.read_text() and "bf16" in name:
            assert "mma.sync" in made.ptx or "wgmma" in made.ptx, f"{name} does not use the tensor cores"
        if name.endswith((", 4>", ", 8>")):
            for access in ("ld.global", "st.global"):
                assert re.search(rf"{access}(\.nc)?\.v4", made.ptx), f"{name} has no {access} of 16 bytes"


@pytest.mark.parametrize("release", OFFERED)
@pytest.mark.parametrize("source", COMPILED, ids=lambda source: f"{source.file}-{source.names[0]}")
def test_a_release_of_the_compiler_takes_a_source(source, release):
    """Without optimising (-G), which takes a seventh of the time: the language and the instructions are the same."""
    architecture = (source.architecture or "sm_80").replace("sm", "compute")
    made = loaded(library_of(release)).compile(
        Program.of(source.path, source.names), (f"--gpu-architecture={architecture}", STANDARD, "-G")
    )
    assert all(f".entry {lowered}(" in made.ptx for lowered in made.lowered.values())


# ---- the releases ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", OFFERED)
def test_a_library_is_of_the_release_that_was_asked_for(release):
    compiler = loaded(library_of(release))
    assert ".".join(map(str, compiler.version)) == release
    assert {int(re.sub(r"\D", "", architecture)) for architecture in ARCHITECTURES} <= set(compiler.architectures)


def test_what_is_offered_is_what_is_tested():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert ".".join(map(str, OLDEST_NVRTC)) == OLDEST
    assert f"{CUDA_12}>={OLDEST}" in extras["cupy-cuda12"]
    assert "==".join(OFFERED[OLDEST]) in extras["test"]
    for page in ("README.md", "docs/architecture.md", "backends/README.md"):
        assert f"NVRTC {OLDEST}" in (ROOT / page).read_text(encoding="utf-8"), page
