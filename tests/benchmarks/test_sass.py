"""benchmarks/sass: machine code is read and counted, occupancy and rooflines are right, and the committed counts are those of the code."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import batch, tiny_model

import minimoe as mm
from benchmarks.gpu import routed
from benchmarks.sass import beside, ptx
from benchmarks.sass.built import assemble, build, compiler, numba_ptx
from benchmarks.sass.cards import A100, H100, H200, occupancy, roofline
from benchmarks.sass.counts import HMMA_FLOPS, expansion, row_of, typical_launches
from benchmarks.sass.executed import Machine
from benchmarks.sass.flow import Instruction, loops_of, main_loop
from benchmarks.sass.launches import Cupy, Launch, NumbaCuda, numba_operations, operations, plain
from benchmarks.sass.listing import counted, functions, instructions, loads_in_flight, width_of
from benchmarks.sass.report import BEGIN, END, PAGE, as_markdown, load
from minimoe_cupy.attention import DELTA
from minimoe_cupy.dispatch import COMBINE
from minimoe_cupy.grouped import WGMMA_LARGE
from minimoe_cupy.loader import Source

# ---- machine code: parts of what nvdisasm prints, shortened ------------------------------------------------------------------------------

PRODUCTS = """
	.target	sm_90a

//--------------------- .text.multiply --------------------------
	.section	.text.multiply,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=154"
.text.multiply:
        .type           multiply,@function
multiply:
        /*0000*/                   MOV R14, RZ ;
.L_x_26:
        /*0010*/                   LOP3.LUT R9, R14, 0x3, RZ, 0xc0, !PT ;
.L_x_145:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R20+URZ], R15 ;
        /*0030*/              @!P1 BRA `(.L_x_24) ;
.L_x_95:
        /*0040*/                   WARPSYNC.ALL ;
        /*0050*/                   WARPGROUP.ARRIVE ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, UP0 ;
        /*0070*/                   R2UR UR6, R16 ;
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00b0*/              @!P2 BRA `(.L_x_25) ;
        /*00c0*/              @!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R12+URZ], RZ ;
.L_x_25:
        /*00d0*/                   VIADD R14, R14, 0x1 ;
        /*00e0*/                   ISETP.GE.AND P1, PT, R14, R3, PT ;
        /*00f0*/              @!P1 BRA `(.L_x_26) ;
        /*0100*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0110*/                   EXIT ;
.L_x_24:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R20+URZ], R15 ;
        /*0130*/              @!P1 BRA `(.L_x_24) ;
        /*0140*/                   BRA `(.L_x_95) ;
.L_x_999:
        /*0150*/                   BRA `(.L_x_999) ;
        /*0160*/                   NOP ;
        /*0170*/                   NOP ;

//--------------------- .text.second --------------------------
	.section	.text.second,"ax",@progbits
.text.second:
second:
        /*0000*/                   EXIT ;
"""

COPIES = """
        /*0000*/                   BSSY B0, `(.L_x_2) ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   BSYNC B0 ;
.L_x_1:
        /*0030*/                   STL [R1], R4 ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R140], [R148.64], !P6 ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R0], [R146.64], !P5 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   DEPBAR.LE SB0, 0x2 ;
        /*0080*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/                   FFMA R3, R3, R4, RZ ;
        /*00b0*/              @!P1 BRA `(.L_x_2) ;
        /*00c0*/                   DEPBAR.LE SB0, 0x0 ;
        /*00d0*/                   EXIT ;
"""


def code_of(*lines: str) -> list[Instruction]:
    """Instructions; line i has the label .L_x_i."""
    return instructions("\n".join(f".L_x_{i}:\n        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)))


def test_functions_are_read_with_their_branches_and_without_the_filling_at_their_end():
    found = functions(PRODUCTS)
    assert list(found) == ["multiply", "second"]
    code = found["multiply"]
    assert [each.opcode for each in code[2:4]] == ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA"]
    assert code[3].targets == (18,) and code[3].goes_on  # out of line, on a condition
    assert code[17] == Instruction("EXIT", goes_on=False)
    assert len(code) == 21 and code[-1] == Instruction("BRA", "`(.L_x_95)", (4,), goes_on=False)


def test_a_loop_has_the_waits_that_lie_at_the_end_of_the_kernel_and_its_chain_of_products():
    found = counted(functions(PRODUCTS)["multiply"])
    assert (found.loop, found.loop_tensor, found.tile, found.chain) == (18, 3, 18, 3)  # 15 in line, 3 at the end
    assert (found.copies, found.groups, found.local) == (0, 0, 0)


def test_copies_groups_local_memory_and_the_tensor_cores_before_multiply_adds_are_counted():
    found = counted(instructions(COPIES))
    assert (found.instructions, found.loop, found.loop_tensor, found.loop_fma) == (14, 8, 1, 1)
    assert (found.copies, found.groups, found.chain, found.local) == (2, 3, 0, 1)


def test_lanes_that_parted_meet_where_the_code_says():
    code = instructions(COPIES)
    assert code[2].targets == (4,) and not code[2].goes_on
    out_of_line = code_of("BSSY B0, `(.L_x_4)", "@P0 BRA `(.L_x_6)", "BSSY B1, `(.L_x_3)", "BSYNC B1", "EXIT", "EXIT", "BSYNC B0")
    assert [each.targets for each in out_of_line] == [(), (6,), (), (3,), (), (), (4,)]


def test_a_call_of_a_place_in_the_kernel_is_a_jump_and_a_call_of_a_function_comes_back():
    code = code_of("CALL.REL.NOINC `(.L_x_3)", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp)", "EXIT", "EXIT")
    assert (code[0].targets, code[0].goes_on) == ((3,), False)
    assert (code[1].targets, code[1].goes_on) == ((), True)


@pytest.mark.parametrize("lines, found", [
    (("LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R4, R8"), (2, 16)),
    (("LDG.E.128 R4, [R2.64]", "FADD R0, R7, R1", "LDG.E.128 R8, [R2.64+0x10]"), (1, 16)),  # R7 is of the first
    (("LDG.E R9, [R2.64]", "LDG.E R10, [R2.64]", "LDG.E R11, [R2.64]", "LDG.E.64 R4, [R2.64]"), (1, 8)),  # the widest count
    (("LDG.E R2, [R6.64]", "LDG.E R4, [R2.64]"), (1, 4)),  # an address that is loaded
    (("LDG.E R2, [R6.64]", "LDG.E R2, [R8.64]"), (1, 4)),  # the second must wait for the first
    (("LDG.E.128 R4, desc[UR4][R2.64]", "BRA `(.L_x_3)", "LDG.E.128 R8, desc[UR4][R2.64]", "EXIT"), (1, 16)),  # the second is skipped
    (("@P0 BRA `(.L_x_3)", "LDG.E R4, [R2.64]", "BRA `(.L_x_4)", "LDG.E R4, [R2.64]", "LDG.E R5, [R2.64]", "EXIT"), (2, 4)),  # either way
    (("@P0 BRA `(.L_x_2)", "FADD R0, R4, R4", "LDG.E R4, [R2.64]", "@P0 BRA `(.L_x_1)", "EXIT"), (1, 4)),
    (("FADD R0, R0, R4", "LDG.E R4, [R2.64]", "LDG.E R5, [R2.64]", "@P0 BRA `(.L_x_0)", "EXIT"), (2, 4)),  # R5 is not needed
    (("LDG.E.U8 R4, [R2.64]", "@P0 BRA `(.L_x_2)", "LDG.E.U8 R8, [R2.64]"), (2, 1)),
    (("STG.E.128 [R2.64], R4",), (0, 0)),
])  # fmt: skip
def test_loads_are_under_way_until_a_register_of_theirs_is_named(lines, found):
    assert loads_in_flight(code_of(*lines)) == found


def test_the_width_of_an_access_is_read_from_its_opcode():
    opcodes = ("LDG.E.128", "LDG.E.64.CONSTANT", "LDG.E.CONSTANT", "LDG.E.U16", "STG.E.U8", "LDG.E.LTC128B")
    assert [width_of(opcode) for opcode in opcodes] == [16, 8, 4, 2, 1, 4]


# ---- loops -------------------------------------------------------------------------------------------------------------------------------


def program(*branches: tuple[int, int, bool], length: int) -> list[Instruction]:
    """Instructions, of which those of `branches` (from, to, with a condition) branch."""
    code = [Instruction("X") for _ in range(length)]
    for start, target, condition in branches:
        code[start] = Instruction("BRA", "", (target,), condition)
    return code


def test_nested_loops_a_jump_into_a_circle_and_code_that_nothing_reaches():
    nested = loops_of(program((4, 2, True), (6, 1, True), length=8))
    assert sorted((loop.head, loop.body) for loop in nested) == [(1, (1, 2, 3, 4, 5, 6)), (2, (2, 3, 4))]
    entered_twice = program((0, 3, True), (4, 2, True), length=6)  # neither 2 nor 3 is before the other on all ways
    assert loops_of(entered_twice) == []
    assert loops_of(program((1, 4, False), (3, 2, True), length=6)) == []
    assert loops_of([]) == []


def test_the_main_loop_is_the_innermost_with_the_most_of_the_first_work_that_occurs():
    loops = loops_of(program((3, 1, True), (6, 4, True), (8, 0, True), length=10))
    assert main_loop(loops, [], [2, 4, 5]).head == 4  # two of it
    assert main_loop(loops, [7], [4, 5]).head == 0  # only the outer loop has any
    assert main_loop(loops, [9]) is None


def test_ptx_is_read_with_its_loops_and_instructions_over_several_lines():
    text = """
.visible .entry other(
	.param .u32 other_param_0
)
{
	ret;
}
.visible .entry sum(
	.param .u64 sum_param_0
)
.maxntid 128, 1, 1
{
	.reg .pred 	%p<3>;
	ld.param.u64 	%rd1, [sum_param_0];
$L__BB0_1:
	.loc 1 5 3
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,
	%f2}, %rd2, %rd3, 1, 1, 1, 0, 0;
	// end inline asm
	@%p1 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
	ret;
}
"""
    code = ptx.kernel(text, "sum")
    assert [each.name for each in code] == ["ld", "wgmma", "bra", "bra", "ret"]
    assert [loop.body for loop in loops_of(code)] == [(1, 2)]
    with pytest.raises(LookupError, match="no kernel su"):
        ptx.kernel(text, "su")


# ---- cards -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card, threads, registers, shared, blocks, limit", [
    (A100, 256, 254, 0, 1, "registers"),
    (A100, 256, 32, 0, 8, "warps"),
    (A100, 32, 16, 0, 32, "blocks"),
    (A100, 128, 32, 80 * 1024, 2, "shared memory"),
    (A100, 128, 32, 81 * 1024 + 1, 1, "shared memory"),  # with the KiB that CUDA takes, twice this is more than 164 KiB
    (H100, 128, 32, 75 * 1024, 3, "shared memory"),
    (H100, 384, 168, 196_680, 1, "registers"),
    (H100, 1024, 33, 0, 1, "registers"),  # 40 registers are handed out for 33
    (H100, 33, 32, 0, 32, "warps"),  # two warps
])  # fmt: skip
def test_as_many_blocks_fit_as_each_of_their_needs_allows(card, threads, registers, shared, blocks, limit):
    found = occupancy(card, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * -(-threads // 32)


def test_a_roofline_is_the_longest_of_the_times():
    assert roofline(H200, 4.8e9, 0, 0, 0).seconds == pytest.approx(1e-3)
    assert roofline(H200, 4.8e9, 989.4e9 * 2, 0, 0) == roofline(H200, 0, 989.4e9 * 2, 0, 0)
    assert [roofline(A100, *needs).bound for needs in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))] == [
        "memory", "tensor cores", "multipliers", "issue",
    ]  # fmt: skip
    assert roofline(A100, 0, 0, 0, 108 * 4 * 1.41e9).seconds == pytest.approx(1.0)


# ---- launches ----------------------------------------------------------------------------------------------------------------------------

OPERATIONS = {(each.backend, each.name, each.dtype, each.wgmma): each for each in (*operations(), *numba_operations())}


@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_bytes_and_flops_of_a_launch_are_those_at_the_head_of_its_kernel(backend):
    n, d, h, k, size = 4096, 1024, 2048, 2, 4
    layer, _ = typical_launches(OPERATIONS[backend, "moe_ffn and its backward", "float32", False])
    assert sum(launch.flops for launch in layer) == 3 * 6 * n * k * d * h
    (adamw,) = typical_launches(OPERATIONS[backend, "adamw", "float32", False])[0]
    assert adamw.flops == 0 and adamw.bytes == pytest.approx(28 * 2**26, rel=1e-6)
    combine, *_ = typical_launches(OPERATIONS[backend, "combine", "float32", False])[0]
    assert combine.bytes == (n * k + n) * d * size + 2 * n * k * size
    if backend == "cupy":  # numba-cuda leaves it to the array library
        (rows,) = typical_launches(OPERATIONS[backend, "embedding", "float32", False])[0]
        assert rows.bytes == 2 * n * d * size + 4 * n  # of the table only the rows that ids name
    attention, *_ = typical_launches(OPERATIONS[backend, "attention", "float32", False])[0]
    assert attention.flops == 2 * 4 * 8 * 1024 * 1024 * 128


def test_a_launch_keeps_what_is_known_of_its_arrays_and_gives_them_up():
    source = Source("combine.cu", ("combine<float, 2, 4>",))
    rows, inverse, y = np.zeros((4, 8), np.float32), np.zeros((2, 2), np.int32), np.zeros((2, 8), np.float32)
    launch = Launch("combine<float, 2, 4>", (1,), (256,), 0, (rows, np.uintp(0), inverse, y, np.int32(2), np.int32(2), np.int32(8)), source)
    assert launch.forget().key == "cupy: combine<float, 2, 4> without weights"
    assert launch.bytes == 4 * 8 * 4 + 2 * 2 * 4 + 2 * 8 * 4 and launch.args == ()


def kernels_of(step: Callable[[Callable[[Launch], None]], Any], dtype: str) -> set[str]:
    """The kernels that a training step of a routed model launches; nothing runs."""
    found: set[str] = set()
    backend = step(lambda launch: found.add(plain(launch.kernel)))
    with mm.use_backend(backend):
        model = tiny_model(backend, dtype)
        tokens = batch(0)
        with np.errstate(all="ignore"):
            model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
            mm.optim.AdamW(model.parameters(), lr=1e-3).step()
    return found


@pytest.mark.parametrize("backend, step, dtype", [
    ("cupy", lambda note: Cupy(note, False, False), "float32"),
    ("cupy", lambda note: Cupy(note, False, False), "bfloat16"),
    ("numba-cuda", lambda note: NumbaCuda(note, False), "float32"),
])  # fmt: skip
def test_every_kernel_of_a_training_step_is_counted(backend, step, dtype):
    launched = kernels_of(step, dtype)
    listed = {plain(row["kernel"]) for row in load()["rows"] if row["backend"] == backend}
    assert launched <= listed
    assert len(launched) > 15


# ---- the committed counts ----------------------------------------------------------------------------------------------------------------

RESULTS = load()
ROWS = {row["key"]: row for row in RESULTS["rows"]}
HELD = (  # one of each kind: a gather, sums of rows, products
    (COMBINE, "combine<bf16, 2, 8>", "cupy: combine<bf16, 2, 8>"),
    (DELTA, "attention_delta<8, bf16>", "cupy: attention_delta<8, bf16>"),
    (WGMMA_LARGE, "grouped_dw_wgmma<256, false>", "cupy: grouped_dw_wgmma<256, false> without order"),
)
CLOSE = 0.25  # with another version of the compiler


def agree(got: dict[str, Any], committed: dict[str, Any], same_compiler: bool) -> None:
    for name, value in got.items():
        bound = 0 if same_compiler else CLOSE * max(abs(committed[name]), 8)
        assert abs(value - committed[name]) <= bound, f"{name}: {value}, committed {committed[name]}: run python -m benchmarks.sass"


@pytest.mark.parametrize("source, name, key", [pytest.param(*held, id=held[1]) for held in HELD])
def test_the_committed_counts_of_machine_code_are_those_of_the_kernels(source, name, key):
    built = build(source, source.names, "sm_90a")[name]
    counts = counted(built.code)
    facts = {"registers": built.registers, "shared": built.shared, "stack": built.stack, "spilled": built.spilled, **counts.as_dict()}
    facts["per_ptx"] = round(expansion(built, counts), 4)
    assert facts.keys() == ROWS[key]["code"]["sm_90a"].keys()
    agree(facts, ROWS[key]["code"]["sm_90a"], RESULTS["nvrtc"] == ".".join(map(str, compiler().version)))


def test_machine_code_of_a_numba_kernel_is_counted():
    from numba.cuda import types

    from minimoe_numba_cuda.optimizer import add_all

    built = assemble(numba_ptx(add_all, (types.float32[::1], types.float32[::1]), "sm_80"), "sm_80")
    found = counted(built.code)
    assert built.registers and built.spilled == 0 and built.shared and found.loop and found.loads


@pytest.mark.parametrize("name, dtype", [("combine", "bfloat16"), ("route", "float32")])
def test_the_committed_counts_of_the_machine_are_those_of_the_kernels(name, dtype):
    from benchmarks.sass.counts import small_launches

    operation = OPERATIONS["cupy", name, dtype, False]
    same = RESULTS["nvrtc"] == ".".join(map(str, compiler().version))
    for launch in small_launches(operation, [], Machine()):
        agree(launch.counters, ROWS[launch.key]["counted"], same)


def test_committed_rows_are_whole_and_agree_with_what_is_known_of_their_kernels():
    for row in ROWS.values():
        counters, hopper = row["counted"], row["code"]["sm_90a"]
        tensor = counters["products"] * HMMA_FLOPS + counters["async_product_flops"]
        assert row["bytes"] > 0 and counters["warp_instructions"] > 0 and row["scale"] > 0, row["key"]
        assert bool(tensor) == bool(hopper["loop_tensor"]), row["key"]
        assert bool(hopper["chain"]) == ("wgmma" in row["kernel"]), row["key"]
        if tensor:
            assert tensor * row["scale"] >= 0.9 * row["flops"], row["key"]  # tiles are full, or filled with zeros
        assert all(found["us"] > 0 and row["occupancy"][card]["blocks"] > 0 for card, found in row["prediction"].items()), row["key"]
        assert ("A100" in row["prediction"]) == ("sm_80" in row["code"]) == ("wgmma" not in row["kernel"]), row["key"]


def test_a_row_is_made_of_a_launch_its_code_and_what_was_counted():
    source = Source("combine.cu", ("combine<float, 2, 4>",))
    code = tuple(code_of("LDG.E.128 R4, [R2.64]", "EXIT"))
    from benchmarks.sass.built import Built
    from benchmarks.sass.counts import Pair

    built = Built("combine", 32, 1024, 0, 0, code, "")
    known = {"bytes": 4_800_000, "flops": 0, "absent": [], "kinds": None}
    typical = Launch("combine<float, 2, 4>", (8,), (256,), 2048, (), source, known=known)
    small = Launch("combine<float, 2, 4>", (1,), (256,), 2048, (), source, known={**known, "bytes": 480_000})
    small.counters = {"warp_instructions": 1000, "products": 0, "async_product_flops": 0}
    row = row_of(Pair(OPERATIONS["cupy", "combine", "float32", False], typical, small), {"sm_90a": (built, counted(code), 1.5)})
    assert row["scale"] == 10 and row["occupancy"].keys() == row["prediction"].keys() == {"H100", "H200"}
    assert row["occupancy"]["H200"] == {"blocks": 8, "warps": 64, "limit": "warps"}
    assert row["prediction"]["H200"] == {"us": 1.0, "bound": "memory"}


def test_the_page_has_the_table_of_the_committed_counts():
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0] == as_markdown(RESULTS)


def test_times_of_a_card_stand_beside_predictions_for_the_same_sizes(tmp_path):
    move = routed.Move(4096, 1024, 8, 2, "balanced", "bfloat16")
    sizes = {"N": 4096, "D": 1024, "E": 8, "K": 2, "load": "balanced"}
    row = {"kernel": "combine", "sizes": sizes, "dtype": "bfloat16", "side": "cupy", "ms": 0.01}
    others = [{**row, "side": "PyTorch"}, {**row, "kernel": "rope"}, {k: v for k, v in row.items() if k != "ms"}]
    assert move in routed.MOVES["full"]
    (tmp_path / "gpu-h200.json").write_text(json.dumps({"machine": {"card": "NVIDIA H200"}, "kernels": [row, *others]}))
    (tmp_path / "gpu-other.json").write_text(json.dumps({"machine": {"card": "NVIDIA L4"}, "kernels": [row]}))
    (found,) = beside.measured(tmp_path, RESULTS["rows"])
    expected = ROWS["cupy: combine<bf16, 2, 8>"]["prediction"]["H200"]["us"]
    assert found["predicted_us"] == pytest.approx(expected, rel=1e-3) and found["measured_us"] == 10.0
    shown = as_markdown({**RESULTS, "measured": [found]}).splitlines()[-1]
    assert re.fullmatch(r"\| combine \| N 4096, .* \| bfloat16 \| H200 \| [\d.]+ \| 10\.0 \| \d+% \|", shown)
