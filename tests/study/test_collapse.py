"""What the end of a run says of experts that died, and that each remedy it names can be trained with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.config import Config, apply_override, config_from_tables, load_config, to_tables
from minimoe.study.collapse import REMEDIES, count_dead, remedies, remedies_text


def rows(*loads: list[list[float]]) -> list[dict[str, Any]]:
    return [{"expert_load": load} for load in loads]


def said(config: Config, *loads: list[list[float]]) -> list[str]:
    return list(remedies_text(config, rows(*loads)))


def test_an_expert_below_a_twentieth_of_the_even_share_is_dead() -> None:
    assert count_dead(np.array([[0.5, 0.4, 0.0876, 0.0124], [0.25, 0.25, 0.25, 0.25]])) == 1  # 1 / (20 x 4) = 0.0125
    assert count_dead(np.array([[0.5, 0.4, 0.0874, 0.0126]])) == 0


def test_the_last_ten_steps_count() -> None:
    config, even, one = load_config("collapse"), [[0.25] * 4], [[0.4, 0.3, 0.3, 0.0]]
    assert said(config, *[one] * 20, *[even] * 10) == []
    assert said(config, *[one] * 9, even) == [], "0.025 on average"
    assert said(config, *[even] * 20, *[one] * 10)[0].startswith("dead experts: 1 of 4 had less than 1/20 of an even share in the last 10")
    assert said(config, one)[0].endswith("in the last 1 steps")
    assert said(config) == [] and said(load_config("tiny-dense"), []) == []


def test_a_load_that_is_not_known_is_not_called_dead() -> None:
    assert said(load_config("collapse"), [[0.5, 0.5, None, 0.0]]) == said(load_config("collapse"), [[0.5, 0.5, 0.3, 0.0]])  # type: ignore[list-item]


def test_the_preset_collapse_is_offered_all_remedies_in_lines_that_fit_the_terminal() -> None:
    lines = said(load_config("collapse"), [[0.5, 0.5, 0.0, 0.0]])
    assert len(lines) == 2 + len(REMEDIES) and max(map(len, lines)) <= 80
    assert [line.split("  ")[1] for line in lines[2:]] == [" ".join(f"--set {key}" for key in remedy.keys) for remedy in REMEDIES]


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({}, 3), ({"aux_loss_coef": 0.05}, 2), ({"router": "sigmoid_bias", "bias_rate": 0.02}, 1),
        ({"router": "noisy_topk", "aux_loss_coef": 0.1}, 1), ({"router": "expert_choice"}, 2), ({"router": "switch", "top_k": 1}, 1),
    ],
)  # fmt: skip
def test_a_remedy_that_is_on_already_or_cannot_be_trained_is_not_named(keys: dict[str, Any], left: int) -> None:
    assert len(remedies(tiny("python-docs", moe=keys))) == left


@pytest.mark.parametrize("moe", [{}, {"top_k": 1, "norm_topk_prob": False}, {"router": "switch", "top_k": 1}, {"n_experts": 3, "top_k": 3}])
def test_every_remedy_that_is_named_trains(moe: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(write_text(tmp_path), moe=moe, steps=1)
    for remedy in remedies(config):
        tables = to_tables(config)
        for key in remedy.keys:
            apply_override(tables, key)
        run = mm.train(config_from_tables(tables, "again"), root=tmp_path / "runs")
        assert run.metrics[0]["skipped"] is False


def test_the_remedies_are_those_that_the_page_measured() -> None:
    page = (ROOT / "docs" / "losses-and-collapse.md").read_text(encoding="utf-8")
    for remedy in REMEDIES:
        command = "minimoe train collapse " + " ".join(f"--set {key}" for key in remedy.keys)
        assert command in page
