"""The GPU benchmark without a GPU: its problems and sides at tiny sizes on kernels that the processor executes, and what it reports."""

import json
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gpu import fresh
from gpu.guard import Guard
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import CupyOnPtx

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import layer, small, step, suite
from benchmarks.gpu.ceilings import ceiling_problems, ceilings_of
from benchmarks.gpu.clocks import EventClock, WallClock
from benchmarks.gpu.data import POOL, Data, host_ids
from benchmarks.gpu.lab import OURS, Lab
from benchmarks.gpu.models import FilledTransformer
from benchmarks.gpu.problems import Lost, Problem, measure, sets_of
from benchmarks.gpu.report import as_markdown, as_text, conclude, failures
from benchmarks.gpu.sides import Made, Player, Runner, Side, admitted, compete, get_ready, take_turns
from benchmarks.gpu.suite import LAST_LINE, TIME_UP, errors, is_failure, outcomes
from benchmarks.gpu.targets import SIDE, targets, verdicts
from benchmarks.gpu.workers import Bench, Deadline, Failed, Process, kernel_problems
from minimoe.backend import kernel_names

BACKEND = CupyOnPtx()


def lab_of_processor():
    """Without PyTorch's peers: tests/parity has them."""
    lab = Lab("tiny", {OURS: BACKEND}, WallClock(BACKEND.synchronize), 0)
    lab.torch = ""
    return lab


# ---- problems ----------------------------------------------------------------------------------------------------------------------------

PROBLEMS = [*ceiling_problems("tiny"), *kernel_problems("tiny")]


@pytest.mark.parametrize("problem", [pytest.param(p, id=f"{p.kernel}, {p.label}") for p in PROBLEMS])
def test_a_problem_is_measured_on_kernels_that_the_processor_executes(problem):
    (row,) = measure(lab_of_processor(), problem)
    assert "failed" not in row, row
    assert row["side"] == OURS and 0.0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"] and row["bytes"] > 0


@pytest.mark.parametrize("scale", ["full", "quick"])
def test_every_target_has_its_problem_or_case_once_and_first(scale):
    wanted = {target.found.keywords["goal"] for target in targets() if isinstance(target.found, partial)} | {"route"}
    problems = kernel_problems(scale)
    goals = [p.goal for p in problems if p.goal]
    assert len(goals) == len(set(goals)) and all(p.goal for p in problems[: len(goals)])
    cases = {layer.goal_of(case)["goal"] for case in layer.CASES[scale] if layer.goal_of(case)}
    assert wanted - {"step"} - set(goals) == (cases if scale == "full" else {"layer, E 8", "layer, E 64"})


def test_the_watched_kernels_exist():
    assert {p.watched or p.kernel for p in kernel_problems("full")} <= set(kernel_names())


def failing(backend, data):
    raise ValueError("a kernel\n that fails")


def test_a_side_that_fails_costs_its_row_and_one_that_loses_the_device_says_so():
    problem = Problem("copy", {"N": 1}, "float32", failing, 8)
    assert [row["failed"] for row in measure(lab_of_processor(), problem)] == ["ValueError: a kernel that fails"]
    assert measure(lab_of_processor(), problem, without=[OURS]) == []
    lab = lab_of_processor()
    lab.check = lambda: failing(None, None)
    with pytest.raises(Lost) as lost:
        measure(lab, problem)
    assert [row["side"] for row in lost.value.rows] == [OURS]


def test_random_inputs_are_bounded_repeated_and_differ():
    data = Data(BACKEND)
    x = data.normal(5, 1_000_003)
    flat = x.reshape(-1)
    assert x.dtype == np.float32 and not np.array_equal(x[0], x[1]) and np.array_equal(flat[POOL:], flat[: flat.size - POOL])
    assert data.bytes == x.nbytes
    ids = host_ids(np.random.default_rng(0), 5000, 8, 2, "skewed")
    counts = np.bincount(ids.ravel(), minlength=8)
    assert (ids[:, 0] != ids[:, 1]).all() and counts[0] > 2 * counts[7]
    ends = data.offsets(1000, 16, "balanced")
    assert ends[0] == 0 and ends[-1] == 1000 and (np.diff(ends) >= 0).all()
    assert np.array_equal(ends, data.offsets(1000, 16, "balanced"))


@pytest.mark.parametrize("inputs, sets", [(1, 24), (10**6, 24), (20 * 10**6, 8), (10**9, 2)])
def test_sets_of_inputs_fill_three_caches_and_are_two_at_least(inputs, sets):
    assert sets_of(inputs, 50 * 10**6) == sets


class NoEvents(EventClock):
    """Without a card."""

    def __init__(self):
        pass

    def _hold(self, seconds):
        pass

    def _mark(self):
        return None

    def _between(self, first, last):
        return 0.0

    def _synchronize(self):
        pass


def test_timing_starts_with_the_inputs_that_were_used_longest_ago():
    seen = []
    calls = [partial(seen.append, i) for i in range(3)]
    assert NoEvents().each(calls, 4) == [0.0] * 4 and seen == [0, 1, 2, 0, 1]


def test_the_numbers_of_a_model_are_not_drawn_on_the_host(monkeypatch):
    monkeypatch.setattr("minimoe.layers.module.host_normal", failing)
    model = FilledTransformer(step.CASES["tiny"][0].model, dtype="bfloat16", backend=BACKEND)
    found = {name: (array.dtype, array.shape, float(array.mean()), float(array.std())) for name, array in model.state_dict().items()}
    declared = {name: (parameter.declared, parameter.std, parameter.start) for name, parameter in model.named_state()}
    assert len(found) == len(declared) > 5
    for name, (dtype, shape, mean, std) in found.items():
        assert (dtype, shape) == (np.float32, declared[name][0])
        assert abs(mean - declared[name][2]) < 0.02 and 0.6 * declared[name][1] <= std <= 1.6 * declared[name][1]


def test_the_sanitizers_case_runs_every_problem_and_steps():
    assert small.run(lab_of_processor()) == {OURS: len(kernel_problems("tiny"))}


# ---- sides -------------------------------------------------------------------------------------------------------------------------------

SIDES = [*(side for case in layer.CASES["tiny"] for side in layer.layer_sides(case)), *step.step_sides(step.CASES["tiny"][0])]


@pytest.mark.parametrize("side", [pytest.param(s, id=f"{s.name}, {s.dtype}, {i}") for i, s in enumerate(SIDES) if SIDE in s.name])
def test_minimoes_sides_of_layer_and_step_work(side):
    runner = Runner(side, lab_of_processor())
    assert runner.turn(2) > 0.0
    said = runner.end()
    assert said["notes"] == [] and 0.0 < said["loss"] < 10.0


def test_minimoes_step_learns():
    made = step.minimoe_step(step.CASES["tiny"][0], OURS, "bfloat16", lab_of_processor())
    losses = [float(made.call().item()) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05 and abs(losses[0] - math.log(256)) < 0.2


def test_a_side_whose_loss_is_no_number_fails():
    side = Side("minimoe, cupy", "minimoe", "float32", lambda lab: Made(lambda: np.array(np.nan), []))
    with pytest.raises(ArithmeticError, match="the loss is nan"):
        Runner(side, lab_of_processor()).end()


# ---- processes ---------------------------------------------------------------------------------------------------------------------------


def serve_words(pipe):
    """Answers what it is told to."""
    while (word := pipe.recv()) is not None:
        if word == "end":
            sys.exit(3)
        if word == "raise":
            raise ValueError("no more")
        if word == "sleep":
            time.sleep(60)
        pipe.send(("word", word))


def serve_a_child(pipe):
    """Starts a process, tells its number, and sleeps."""
    pipe.send(("child", subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)


def runs(number):
    """True if a process of this number lives and is not a zombie."""
    status = Path(f"/proc/{number}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_is_stopped_takes_with_it_what_it_started(tmp_path):
    process = Process(tmp_path / "log.txt", serve_a_child)
    _, child = process.answer(60.0)
    assert runs(child)
    process.stop(patience=0.0)
    deadline = Deadline(20.0)
    while runs(child) and deadline.left():
        time.sleep(0.05)
    assert not runs(child)


def test_no_wait_outlasts_the_whole_run():
    whole = Deadline(5.0)
    part = whole.share(0.5).share(0.5)
    assert part.left() <= 1.25 and part.patience(1.0) == 1.0 and 4.0 < part.patience(60.0) <= 5.0
    assert Deadline(60.0, Deadline(0.0)).patience(9.0) == 0.0


@pytest.mark.parametrize(
    "word, error, words",
    [
        ("end", "NoAnswer", r"its process ended \(3\)"),
        ("raise", "Failed", "ValueError: no more"),
        ("sleep", "NoAnswer", "no answer in 1 s"),
    ],
)
def test_a_process_that_ends_fails_or_sleeps_is_told_apart(tmp_path, word, error, words):
    from benchmarks.gpu import workers

    process = Process(tmp_path / "log.txt", serve_words)
    try:
        process.send("hello")
        assert process.answer(60.0) == ("word", "hello")
        process.send(word)
        with pytest.raises(getattr(workers, error), match=words):
            process.answer(1.0 if word == "sleep" else 20.0)
    finally:
        process.stop()


class Answers:
    """Stands for a process; an exception among the answers is raised."""

    def __init__(self, answers):
        self.answers, self.sent, self.stopped = list(answers), [], False

    def send(self, message):
        self.sent.append(message)

    def answer(self, patience):
        value = self.answers.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    def stop(self, patience=1.0):
        self.stopped = True


def test_a_side_that_takes_the_process_with_it_is_left_out_of_the_next_try(monkeypatch, tmp_path):
    from benchmarks.gpu.workers import NoAnswer

    good = {"side": "PyTorch", "ms": 1.0}
    lives = [
        Answers([("at", "cupy"), ("at", "numba-cuda"), NoAnswer("no answer in 9 s")]),
        Answers([("at", "cupy"), ("lost", [{"side": "cupy", "failed": "gone"}])]),
        Answers([("at", "PyTorch"), ("rows", [good])]),
    ]
    bench, started = Bench("kernels", "tiny", tmp_path / "log.txt", Deadline(60.0)), iter(lives)
    monkeypatch.setattr(Bench, "start", lambda self: setattr(self, "process", next(started)))
    rows = bench.rows(5, PROBLEMS[0])
    assert [(row["side"], row.get("failed")) for row in rows] == [("numba-cuda", "no answer in 9 s"), ("cupy", "gone"), ("PyTorch", None)]
    assert [life.sent for life in lives] == [[(5, [])], [(5, ["numba-cuda"])], [(5, ["numba-cuda", "cupy"])]]
    assert [life.stopped for life in lives] == [True, True, False]


def test_a_process_that_cannot_start_fails_its_part(monkeypatch, tmp_path):
    def start(self):
        raise Failed("UserError: no card")

    monkeypatch.setattr(Bench, "start", start)
    with pytest.raises(Failed, match="no card"):
        Bench("kernels", "tiny", tmp_path / "log.txt", Deadline(60.0)).rows(0, PROBLEMS[0])


def test_sides_take_turns_and_one_that_fails_leaves_the_game():
    side = Side("PyTorch", "eager", "float32", failing)
    good = Player(side, Answers([("seconds", 0.5), ("seconds", 0.25), ("end", {"loss": 1.0, "notes": []})]), usual=0.5)
    bad = Player(side, Answers([("seconds", 0.5), Failed("out of memory")]), usual=0.5)
    for _ in range(2):
        take_turns([good, bad], "tiny", Deadline(60.0))
    good.said = good.ask(0, 1.0)
    assert bad.row({"N": 1}, 10) == {"side": "PyTorch", "kind": "eager", "dtype": "float32", "sizes": {"N": 1}, "failed": "out of memory"}
    row = good.row({"N": 1}, 10)
    assert (row["ms"], row["calls"], row["loss"]) == (375.0, 2, 1.0) and math.isclose(row["tokens_per_s"], 10 / 0.375)
    assert bad.process.stopped


def sleeping(lab):
    time.sleep(60)


def test_sides_that_are_not_ready_in_time_say_so_and_what_never_began_is_given_back(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu.sides.os.cpu_count", lambda: 1)
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    idle = iter(pipes)
    monkeypatch.setattr("benchmarks.gpu.sides.Process", lambda *_: SimpleNamespace(pipe=next(idle)[0], stop=lambda patience: None))
    sides, players = [Side(f"{i}", "eager", "float32", sleeping) for i in range(4)], []
    late = get_ready(sides, players, "tiny", Deadline(0.3), tmp_path / "log.txt")
    assert [player.said["failed"].startswith("not ready in ") for player in players] == [True] * 2 and late == sides[2:]


def test_what_the_cards_memory_does_not_suffice_for_is_the_least_wanted():
    sides = [Side(f"{i}", "eager", "float32", sleeping, memory=bytes_) for i, bytes_ in enumerate((4e9, 3e9, 2e9))]
    able, out = admitted(sides, 7.5e9)
    assert able == sides[:2] and out == [(sides[2], "no memory for it beside the others")]
    for case in layer.CASES["full"]:
        able, _ = admitted([replace(side, libraries=()) for side in layer.layer_sides(case)], 76e9)
        assert [side.name for side in able][:5] == [side.name for side in layer.layer_sides(case)][:5]


def test_a_side_whose_library_is_absent_is_left_out_and_no_process_is_made(tmp_path):
    side = Side("PyTorch", "eager", "float32", failing, ("numpy", "no_such_library"))
    (row,) = compete([side], {"N": 1}, 1, "tiny", Deadline(60.0), tmp_path / "log.txt")
    assert row["left_out"] == "no_such_library not installed"


def test_sides_that_cannot_start_are_rows_that_say_why(tmp_path):
    (side,) = [side for side in step.step_sides(step.CASES["tiny"][0]) if side.name == SIDE]
    (row,) = compete([side], {"N": 1}, 1, "tiny", Deadline(60.0), tmp_path / "log.txt")
    assert row["failed"].startswith("BackendUnavailable: backend cupy: ")


# ---- what tests on a card stand on -------------------------------------------------------------------------------------------------------


class FakePointer:
    """CuPy's pointer, to a NumPy array."""

    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return FakePointer(self.memory, self.offset + offset)

    def memset_async(self, value, size, stream):
        self.memory[self.offset : self.offset + size] = value


def fake_cupy():
    """The part of CuPy that the guard uses."""
    pool = SimpleNamespace(malloc=lambda size: FakePointer(np.zeros(size, np.uint8)))
    stream = SimpleNamespace(is_capturing=lambda: False)
    cuda = SimpleNamespace(MemoryPool=lambda: pool, get_current_stream=lambda: stream)
    array = lambda shape, dtype, memptr: memptr.memory[memptr.offset : memptr.offset + shape[0]]  # noqa: E731
    return SimpleNamespace(cuda=cuda, ndarray=array, uint8=np.uint8, concatenate=np.concatenate)


@pytest.mark.parametrize(
    "size, place, caught", [(8, 7, False), (8, 8, True), (8, -1, True), (1024, 1024, True), (0, 0, True), (513, 512, False)]
)
def test_the_guard_finds_a_byte_beside_an_array_and_hands_out_nan(size, place, caught):
    guard = Guard(fake_cupy())
    pieces = [guard.malloc(n) for n in (4, size, 700)]
    assert (pieces[1].memory == 0xFF).all()
    pieces[1].memory[pieces[1].offset + place] = 0
    if caught:
        with pytest.raises(AssertionError, match=rf"beside arrays of \[{size}\] bytes"):
            guard.check()
    guard.check()
    for _ in range(600):
        guard.malloc(1)


@pytest.mark.parametrize("topic", [name for name in fresh.TOPICS if name not in ("products", "layer")])
def test_fresh_examples_are_such_that_the_references_agree_on_them(topic):
    assert fresh.check(HostArrays(), topic, "float32", seed=time.time_ns() % 2**32)


# ---- what pytest said --------------------------------------------------------------------------------------------------------------------


def test_outcomes_of_tests_are_read_from_their_words():
    text = """collected 9 items / 4 deselected / 5 selected

tests/gpu/test_a.py::test_x[cupy-kernels: rms_norm [float32]] PASSED     [ 20%]
tests/gpu/test_a.py::test_y[cupy] FAILED                                  [ 40%]
tests/gpu/test_a.py::test_z[cupy] SKIPPED (needs a physical GPU)          [ 60%]
=========================== short test summary info ============================
FAILED tests/gpu/test_a.py::test_y[cupy] - AssertionError: differs
"""
    assert outcomes(text) == {
        "passed": 1, "skipped": 1, "failed": [{"test": "tests/gpu/test_a.py::test_y[cupy]", "error": "AssertionError: differs"}],
        "not_reached": 2,
    }  # fmt: skip
    assert outcomes("") == {"passed": 0, "skipped": 0, "failed": [], "not_reached": 0}


@pytest.mark.parametrize(
    "text, found, complete",
    [
        ("x", None, False),
        (f"== ERROR SUMMARY: 3 errors\n{LAST_LINE}\n", 3, True),
        (f"{LAST_LINE}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 1, False),
    ],
)
def test_both_sanitizers_summaries_are_read_and_whether_the_case_came_to_its_end(text, found, complete):
    assert errors(text) == {"errors": found, "complete": complete}


GREEN = {"passed": 3, "skipped": 0, "failed": [], "not_reached": 0}


@pytest.mark.parametrize(
    "outcome, wrong",
    [
        ({**GREEN, "ended": "exit code 0"}, False),
        ({**GREEN, "ended": TIME_UP}, False),
        ({**GREEN, "ended": "exit code -11"}, True),
        ({**GREEN, "ended": "exit code 2"}, True),
        ({**GREEN, "passed": 0, "ended": "exit code 0"}, True),
        ({**GREEN, "failed": [{"test": "t", "error": "e"}], "ended": "exit code 1"}, True),
        ({"errors": 0, "complete": True, "ended": "exit code 0"}, False),
        ({"errors": 0, "complete": True, "ended": "exit code 1"}, True),
        ({"errors": 0, "complete": False, "ended": "exit code 0"}, True),
        ({"errors": None, "complete": False, "ended": "exit code 1"}, True),
        ({"errors": None, "complete": False, "ended": TIME_UP}, False),
        ({"errors": 1, "complete": False, "ended": TIME_UP}, True),
        ({"left_out": "it is not here"}, False),
    ],
)
def test_what_ends_otherwise_than_well_or_by_time_is_a_failure(outcome, wrong):
    assert is_failure(outcome) == wrong


WAITS = """
import time
try:
    print("collected 1 item", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("tests/gpu/test_a.py::t PASSED", flush=True)
"""


class UntilTheyBegan(Deadline):
    """A deadline that is over when no file is empty."""

    def __init__(self, files):
        super().__init__(60.0, Deadline(60.0))
        self.files = files

    def left(self):
        return 0.0 if all(file.exists() and file.read_text() for file in self.files) else 1.0


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_tests_that_do_not_end_in_time_are_asked_to_stop_and_heard(monkeypatch, tmp_path, interrupts):
    """Also where interrupts are ignored from the start, as in a job in the background of a script."""
    signal.signal(signal.SIGINT, interrupts)
    monkeypatch.setattr(suite, "pytest_command", lambda: [sys.executable, "-c", WAITS])
    monkeypatch.setattr(suite.shutil, "which", lambda *_, **__: None)
    files = [tmp_path / f"tests-{name}.txt" for name in suite.CHOSEN]
    found = dict(suite.suite(tmp_path, UntilTheyBegan(files)))
    assert found.pop("compute-sanitizer") == {"left_out": "it is not here"}
    assert {(outcome["passed"], outcome["ended"]) for outcome in found.values()} == {(1, TIME_UP)} and len(found) == 2


# ---- targets and report ------------------------------------------------------------------------------------------------------------------


def made_up(factor=1.0):
    """A run in which every target is met by a little at factor 1, and missed at 2."""
    rates = {"copy": 4e12, "bfloat16": 8e14, "float32": 5e13}
    kernels = []
    for problem in kernel_problems("full"):
        if not problem.goal:
            continue
        aims = {"gate": 0.61, "attention": 0.5, "attention_backward": 0.5}
        aim = aims.get(problem.goal, 0.61 if problem.flops else 0.76)
        amount, rate = (problem.flops, rates["bfloat16"]) if problem.flops else (problem.bytes, rates["copy"])
        ms = amount / rate / aim * 1e3 if problem.goal != "route" else 0.059
        kernels.append({**problem.row(OURS), "kind": "hand-written", "ms": ms * factor})
        if problem.peer is not None and problem.goal.startswith("attention"):
            kernels.append({**problem.row("PyTorch"), "kind": "peer", "ms": ms / 1.4})
    sides = {SIDE: factor, "PyTorch eager, loop": 3.1, "PyTorch eager, grouped": 1.5, "PyTorch compiled, grouped": 1.1}
    shared = {"kind": "eager", "dtype": "bfloat16", "fastest_ms": 1.0, "tokens_per_s": 9.0, "first_s": 2.0}
    rows = [{"side": side, "ms": ms, **shared} for side, ms in sides.items()]
    layers = [{**row, "goal": f"layer, E {e}", "sizes": {"E": e}, "case": "bfloat16"} for e in (8, 64) for row in rows]
    steps = [{**row, "goal": "step", "sizes": {"D": 512}, "case": "small"} for row in rows]
    return {
        "machine": {"card": "a card"}, "parts": {"kernels": {"state": "done", "seconds": 1.0}}, "rates": rates,
        "kernels": kernels, "layer": layers, "step": steps,
        "tests": {"cupy": {"passed": 3, "skipped": 0, "failed": [], "not_reached": 0, "ended": "exit code 0"}},
    }  # fmt: skip


def test_targets_that_are_met_leave_nothing_short():
    results = made_up()
    conclude(results)
    assert [v["target"] for v in results["targets"] if not v["met"]] == [] and results["short"] == [] and not failures(results)
    products = [v for v in results["targets"] if "stretch" in v]
    assert len(products) == 6 and not any(v["stretched"] for v in products)


def test_targets_that_are_missed_are_listed_with_what_was_wanted_and_found():
    results = made_up(2.0)
    conclude(results)
    assert [v["met"] for v in results["targets"]] == [False] * len(list(targets()))
    assert results["short"][0] == "target dispatch, of the copy rate: wanted at least 75%, found 38%"
    assert "target step, over PyTorch's best compiled: wanted at least 1.00 x, found 0.55 x" in results["short"]
    assert "target route of 65,536 x 8 over 256 experts: wanted at most 60.0 us, found 118.0 us" in results["short"]
    assert not failures(results)


def test_what_was_not_measured_says_why():
    results = made_up()
    results["kernels"][0] = {**{k: v for k, v in results["kernels"][0].items() if k != "ms"}, "failed": "RuntimeError: bad"}
    results["layer"] = []
    results["step"] = [{**row, "left_out": "the time was up"} for row in results["step"] if row.pop("ms")]
    found = {v["target"]: v["found"] for v in verdicts(results) if v["met"] is None}
    assert found["dispatch, of the copy rate"] == "cupy: RuntimeError: bad"
    assert found["layer, E 8, over PyTorch's best grouped"] == "minimoe, cupy: it was not measured"
    assert found["step, over PyTorch's eager loop"] == "minimoe, cupy: the time was up"
    empty = {v["found"] for v in verdicts({})}
    assert all("not measured" in text for text in empty)


@pytest.mark.parametrize("render", [as_text, as_markdown])
def test_a_report_shows_figures_failures_and_what_fell_short(render):
    results = made_up(2.0)
    kernels = results["kernels"]
    kernels.append({**kernel_problems("full")[0].row("numba-cuda"), "failed": "ValueError: [no] kernel"})
    kernels.append({**kernel_problems("full")[-1].row("cupy"), "kind": "reference", "ms": 3.0})
    kernels.append({**kernel_problems("full")[-2].row("all"), "left_out": "the time was up"})
    results["step"][1] = {**{k: v for k, v in results["step"][1].items() if k != "ms"}, "failed": "OutOfMemoryError: none"}
    results["step"][0]["notes"] = ["the step is not repeated from a recording: because"]
    results["tests"]["numba-cuda"] = {
        "passed": 0, "skipped": 2, "failed": [{"test": "tests/gpu/test_a.py::t", "error": "E"}], "not_reached": 1, "ended": "exit code 1",
    }  # fmt: skip
    results["tests"]["sanitizer-memcheck"] = {"errors": 2, "complete": True, "ended": "exit code 9", "seconds": 3.0, "file": "f"}
    results["tests"]["compute-sanitizer"] = {"left_out": "it is not here"}
    results["machine"]["absent_backends"] = {"numba-cuda": "backend numba-cuda: Numba-CUDA is not installed"}
    results["parts"]["layer"] = {"state": "failed: ValueError: odd", "seconds": 0.1}
    conclude(results)
    shown = " ".join(render(results).split())
    for words in (
        "ValueError: [no] kernel", "ran the reference", "1 rows left out", "OutOfMemoryError: none", "MISSED",
        "because", "test tests/gpu/test_a.py::t: E", "part layer: failed: ValueError: odd", "2 errors", "a card", "38%", "is not installed",
    ):  # fmt: skip
        assert words in shown, words
    assert failures(results)


def test_ceilings_are_the_best_of_all_sides():
    copies = [{"kernel": "copy", "dtype": "float32", "bytes": 4e9, "ms": ms} for ms in (2.0, 1.0)]
    product = {"kernel": "product", "dtype": "bfloat16", "bytes": 1.0, "flops": 1e12, "ms": 2.0}
    failed = {"kernel": "product", "dtype": "float32", "bytes": 1.0, "flops": 1e12, "failed": "no"}
    assert ceilings_of([*copies, product, failed]) == {"copy": 4e12, "bfloat16": 5e14}


# ---- the command -------------------------------------------------------------------------------------------------------------------------


def fake_parts(monkeypatch, **works):
    monkeypatch.setattr(command, "check_card", lambda: None)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "PARTS", {name: (1.0, work) for name, work in works.items()})


def row(run, deadline):
    problem = kernel_problems("full")[0]
    run.add("kernels", [{**problem.row(OURS), "kind": "hand-written", "ms": 1.0}])


def broken(run, deadline):
    raise ValueError("a part that fails")


def interrupted(run, deadline):
    row(run, deadline)
    raise KeyboardInterrupt


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    fake_parts(monkeypatch, machine=broken, ceilings=lambda run, deadline: None, kernels=row)
    assert command.main(["--out", str(tmp_path / "new"), "--part", "kernels"]) == 1
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert found["parts"]["machine"]["state"] == "failed: ValueError: a part that fails"
    assert found["parts"]["kernels"]["state"] == "done" and found["kernels"][0]["ms"] == 1.0
    assert "part machine: failed: ValueError: a part that fails" in found["short"]
    assert "a part that fails" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"gpu.json", "gpu.txt", "gpu.md"}


def test_an_interrupt_leaves_what_there_is(monkeypatch, tmp_path):
    fake_parts(monkeypatch, machine=lambda run, deadline: None, kernels=interrupted, step=broken)
    assert command.main(["--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["interrupted"] and len(found["kernels"]) == 1
    assert {name: part["state"] for name, part in found["parts"].items()} == {"machine": "done", "kernels": "stopped"}
    assert "dispatch" in (tmp_path / "gpu.txt").read_text()


def test_what_a_part_leaves_of_its_time_goes_to_the_others(monkeypatch, tmp_path):
    left = []
    fake_parts(monkeypatch, machine=lambda run, d: left.append(d.left()), kernels=lambda run, d: left.append(d.left()))
    monkeypatch.setattr(command, "chosen", lambda parts: ["machine", "kernels"])
    command.main(["--out", str(tmp_path), "--minutes", "1"])
    assert 20.0 < left[0] <= 22.5 and 40.0 < left[1] <= 45.0


def test_kernels_bring_the_ceilings_and_the_machine():
    assert command.chosen(["kernels"]) == ["machine", "ceilings", "kernels"] and command.chosen(["step"]) == ["machine", "step"]
    assert command.chosen(None) == list(command.PARTS)


@pytest.mark.parametrize("words", [["--out", "x", "--minutes", "0.2"], ["--out", "x", "--part", "none"], []])
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(words)
    assert error.value.code == 2 and "benchmarks.gpu: error: " in capsys.readouterr().err


def test_without_a_card_the_command_says_so_in_one_line(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "new")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert answer.returncode == 2 and answer.stdout == "" and not (tmp_path / "new").exists()
    assert answer.stderr.startswith("benchmarks.gpu: backend cupy: ") and answer.stderr.count("\n") == 1
