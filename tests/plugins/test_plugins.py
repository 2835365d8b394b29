"""A router and an optimizer from a package of their own, a file each: configured, trained, seen, resumed and refused as minimoe's are."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, environment, sets
from tiny_runs import tiny, untimed, weights_of, write_text

import minimoe as mm
from minimoe.backend import load
from minimoe.config import TrainConfig, load_config, to_toml
from minimoe.config.cost import cost, parameter_shapes
from minimoe.errors import ConfigError, UserError
from minimoe.reference import optimizers, routers
from minimoe.reference.gating import Rule
from minimoe.runs.listing import list_runs
from minimoe.study.convert import convert
from minimoe.testing import cases
from minimoe_numba import NumbaBackend

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
ENTRIES = """[minimoe.routers]
tempered = tempered:router

[minimoe.optimizers]
rmsprop = rmsprop:optimizer
"""
MOE = {"router": "tempered", "options": {"temperature": 0.5}}
TRAIN = {"optimizer": "rmsprop", "options": {"decay": 0.9}}


def forget():
    for table in (routers, optimizers):
        table.from_outside.cache_clear()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The two files, installed as pip would: on the path, with their entry points beside them.   -> the folder"""
    folder = tmp_path / "site"
    about = folder / "minimoe_plugins-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: minimoe-plugins\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    for name in ("tempered.py", "rmsprop.py"):
        (folder / name).write_text((HERE / name).read_text())
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()
    for name in ("tempered", "rmsprop"):
        sys.modules.pop(name, None)


@pytest.fixture
def uninstalled(installed, monkeypatch):
    """Return a function that removes the two again."""

    def take_away():
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(installed)])
        importlib.invalidate_caches()
        forget()

    return take_away


def minimoe(installed, *arguments):
    """Return the output of `minimoe ARGUMENTS` in a process of its own, with the package on its path."""
    path = f"{installed}:{ROOT}:{ROOT / 'backends'}"
    command = [sys.executable, "-m", "minimoe", *arguments]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def config(tmp_path, **train):
    return tiny(write_text(tmp_path), moe=MOE, **{"steps": 8, **TRAIN, **train})


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_model_trains_with_them_on_every_cpu_backend(installed, tmp_path, backend):
    run = mm.train(config(tmp_path, backend=backend, steps=40), root=tmp_path)
    losses = [row["loss"] for row in run.metrics]
    assert losses[-1] < 0.8 * losses[0]
    assert run.config.model.moe.options == {"temperature": 0.5} and run.config.train.options == {"decay": 0.9}


def test_what_the_router_learns_is_initialised_trained_counted_and_saved(installed, tmp_path):
    run = mm.train(config(tmp_path, steps=6, grad_clip=0.0), root=tmp_path)
    name = "blocks.0.moe.router.scale"
    learned = mm.load(run.path).state_dict()[name]
    start = mm.Transformer(run.config.model, seed=0, backend=load("numpy")).state_dict()[name]
    assert start.tolist() == [1.0] * 4 and np.abs(learned - start).max() > 1e-3
    assert (name, (4,)) in list(parameter_shapes(run.config.model))


def test_the_temperature_and_the_decay_matter(installed, tmp_path):
    def losses(temperature, decay):
        moe = {"router": "tempered", "options": {"temperature": temperature}}
        config = tiny(write_text(tmp_path), moe=moe, steps=4, optimizer="rmsprop", options={"decay": decay})
        return [row["loss"] for row in mm.train(config, root=tmp_path).metrics]

    assert losses(0.5, 0.9) != losses(2.0, 0.9) and losses(0.5, 0.9) != losses(0.5, 0.5)


def test_a_step_with_them_is_recorded_and_repeated_with_the_same_bits(installed, tmp_path, monkeypatch):
    class Plain(NumbaBackend):
        def record(self, work, say):
            work()

    class Counts(NumbaBackend):
        played = 0

        def record(self, work, say):
            again = super().record(work, pytest.fail)

            def counted():
                self.played += 1
                again()

            return counted

    runs = []
    for backend in (Plain(), counts := Counts()):
        monkeypatch.setattr("minimoe.training.trainer.load", lambda name, backend=backend: backend)
        runs.append(mm.train(config(tmp_path, backend="numba"), root=tmp_path))
    assert weights_of(runs[0].path, 8) == weights_of(runs[1].path, 8) and counts.played == 8 - NumbaBackend.warm_up - 1
    assert untimed(runs[0].metrics) == untimed(runs[1].metrics)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_conformance_runs_them(installed, backend):
    b = load(backend)
    found = cases(b, level="kernels", kernel="rmsprop")
    assert [case.name for case in found] == ["optimizer rmsprop [float32]", "optimizer rmsprop [float64]"]
    gates = [case for kernel in ("gate", "gate_backward") for case in cases(b, level="kernels", kernel=kernel)]
    for case in (*found, *gates, *cases(b, kernel="tempered")):
        case.run()
    from minimoe.testing.routed_examples import rules

    assert "tempered" in rules()


def test_conformance_finds_a_wrong_update_and_a_wrong_gradient(installed, monkeypatch):
    right, b = optimizers.find("rmsprop").update, load("numpy")

    def moves_where_it_is_skipped(b, inout_param, inout_states, grad, step, **settings):
        right(b, inout_param, inout_states, grad, step._replace(ok=b.xp.asarray(True)), **settings)

    object.__setattr__(optimizers.find("rmsprop"), "update", moves_where_it_is_skipped)
    with pytest.raises(AssertionError, match=r"rmsprop at param .*skipped"):
        cases(b, kernel="rmsprop")[0].run()

    object.__setattr__(routers.find("tempered"), "backward", lambda b, dweights, dprob_sum, gate, valid, rule: gate.scores)
    with pytest.raises(AssertionError, match=r"tempered at tempered, logits \[7,8\], K 2"):
        cases(b, kernel="tempered")[0].run()


def test_conformance_finds_a_wrong_gradient_of_what_a_router_learns(installed):
    router = routers.find("tempered")
    object.__setattr__(router, "adjust", router.adjust._replace(backward=lambda b, dy, z, w: (dy * w, dy[0])))
    with pytest.raises(AssertionError, match="tempered at tempered"):
        cases(load("numpy"), kernel="tempered")[0].run()


def test_its_options_are_checked_resolved_and_written(installed, tmp_path):
    text = to_toml(config(tmp_path))
    assert "[moe.options]\ntemperature = 0.5" in text and "[train.options]\ndecay = 0.9" in text
    (tmp_path / "again.toml").write_text(text)
    again = load_config(tmp_path / "again.toml")
    assert to_toml(again) == text and again.model.moe.rule == Rule("tempered", 2, options=(("temperature", 0.5),))
    assert mm.MoEConfig(router="tempered").options == {"temperature": 1.0}
    assert load_config("tiny-moe", ["moe.router=tempered", "moe.options.temperature=2"]).model.moe.options == {"temperature": 2.0}
    for given, message in (
        ({"temprature": 1.0}, "moe.options.temprature: unknown key (did you mean 'temperature'?)"),
        ({"temperature": "hot"}, "moe.options.temperature: expected float, got str"),
        ({"temperature": 0.0}, "moe.options.temperature (0.0) must be above 0"),
        ({"temperature": float("inf")}, "moe.options.temperature (inf) must be a finite number"),
        ({"temperature": 10**400}, "moe.options.temperature (1000000000000000000000000000000000000000) must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            mm.MoEConfig(router="tempered", options=given)
    with pytest.raises(ConfigError, match=re.escape("train.options.decay (1.0) must be in [0, 1)")):
        TrainConfig(optimizer="rmsprop", options={"decay": 1.0})
    with pytest.raises(ConfigError, match=re.escape("moe.options.temperature: moe.router = 'softmax_topk' has no options")):
        mm.MoEConfig(options={"temperature": 1.0})


def test_the_commands_of_the_recipes_work_in_a_process_of_their_own(installed, tmp_path):
    keys = sets("moe.router=tempered", "moe.options.temperature=0.5", "train.optimizer=rmsprop", "train.options.decay=0.9")
    text = str(write_text(tmp_path))
    run = minimoe(installed, "train", "--data", text, "--steps", "3", "--quiet", *TINY, *keys).strip()
    assert "[moe.options]\ntemperature = 0.5" in (installed / run / "config.toml").read_text()
    counted = json.loads(minimoe(installed, "inspect", run, "--json"))["bytes"]
    assert counted["optimizer"] == counted["weights"]
    for kernel in ("tempered", "rmsprop", "gate_backward"):
        said = minimoe(installed, "backends", "check", "numpy", "--kernel", kernel)
        assert "0 failed" in said and f"it conforms in {kernel}" in said


def test_errors_help_and_cost_know_them(installed):
    with pytest.raises(ConfigError, match=re.escape("moe.router = 'temperd' is not one of its values (did you mean 'tempered'?)")):
        mm.MoEConfig(router="temperd")
    with pytest.raises(ConfigError, match=re.escape("train.optimizer = 'rmsprp' is not one of its values (did you mean 'rmsprop'?)")):
        TrainConfig(optimizer="rmsprp")
    with pytest.raises(ConfigError, match=re.escape("no router 'temperd' (did you mean 'tempered'?)")):
        load("numba").gate(np.zeros((2, 3), np.float32), None, None, rule=Rule("temperd", 2))
    shown = minimoe(installed, "train", "--help")
    assert re.search(r"moe\.router +softmax_topk.*tempered", shown, re.DOTALL) and re.search(r"train\.optimizer .*rmsprop", shown)
    model = mm.ModelConfig(vocab_size=11, moe=mm.MoEConfig(router="tempered"))
    assert cost(model, optimizer="rmsprop").bytes.optimizer == cost(model).bytes.weights


def test_a_package_that_does_not_bring_what_it_should_is_named(installed):
    entries = "[minimoe.routers]\nbroken = no_such_module:router\nwrong = tempered:forward\nother = tempered:router\nends = ends:router\n"
    (installed / "ends.py").write_text("raise SystemExit('no licence')\n")
    (installed / "minimoe_plugins-1.0.dist-info" / "entry_points.txt").write_text(entries)
    with pytest.raises(ConfigError, match=r"router 'broken' \(no_such_module:router\) does not load: ModuleNotFoundError"):
        mm.MoEConfig(router="broken")
    with pytest.raises(ConfigError, match=r"router 'wrong' \(tempered:forward\) does not load: TypeError"):
        mm.MoEConfig(router="wrong")
    with pytest.raises(ConfigError, match=r"router 'other' \(tempered:router\) is the Router 'tempered': expected minimoe's Router"):
        mm.MoEConfig(router="other")
    with pytest.raises(ConfigError, match=r"router 'ends' \(ends:router\) does not load: SystemExit: no licence"):
        mm.MoEConfig(router="ends")


def test_a_name_that_two_packages_bring_is_refused_and_a_name_of_minimoes_is_minimoes(installed):
    about = installed / "other_plugins-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugins\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[minimoe.routers]\ntempered = another:router\nswitch = another:router\n")
    importlib.invalidate_caches()
    message = "router 'tempered' comes from several packages (minimoe-plugins, other-plugins): uninstall all but one"
    with pytest.raises(ConfigError, match=re.escape(message)):
        mm.MoEConfig(router="tempered")
    assert mm.MoEConfig(router="switch").router_facts is routers.ROUTERS["switch"]
    assert routers.names().count("tempered") == 1


def test_a_constant_weight_of_theirs_is_refused_as_minimoes_is(installed):
    with pytest.raises(ConfigError, match=r"moe.router = 'tempered' with moe.top_k = 1 gives the router no gradient"):
        load_config("tiny-moe", ["moe.router=tempered", "moe.top_k=1"]).check_trainable()


def test_a_run_resumes_with_the_package_and_says_what_is_missing_without_it(installed, uninstalled, tmp_path):
    run = mm.train(config(tmp_path, steps=4), root=tmp_path)
    assert len(mm.resume(run.path, steps=6).metrics) == 6
    uninstalled()
    for use in (lambda: mm.resume(run.path, steps=8), lambda: mm.load(run.path)):
        with pytest.raises(UserError, match="router 'tempered' comes from a package that is not installed here: install it first"):
            use()
    text = (run.path / "config.toml").read_text().replace('router = "tempered"', 'router = "softmax_topk"')
    (run.path / "config.toml").write_text(re.sub(r"\[moe.options\]\n.*\n", "", text))
    with pytest.raises(UserError, match="optimizer 'rmsprop' comes from a package that is not installed here: install it first"):
        mm.resume(run.path, steps=8)


def test_the_list_of_runs_does_not_call_a_run_damaged_whose_package_is_missing(installed, uninstalled, tmp_path):
    mm.train(config(tmp_path, steps=2), root=tmp_path / "runs")
    before = list_runs(tmp_path / "runs")
    uninstalled()
    assert list_runs(tmp_path / "runs") == before and before[0]["state"] == "finished"


def test_export_refuses_it_and_writes_nothing(installed, tmp_path):
    run = mm.train(config(tmp_path, steps=2), root=tmp_path)
    refusal = "moe.router = 'tempered' comes from another package: transformers has no family with that router"
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        convert(run.path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", ["tempered.py", "rmsprop.py"])
def test_the_recipes_in_contributing_are_these_files(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert (HERE / name).read_text(encoding="utf-8") in blocks
