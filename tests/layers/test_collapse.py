"""The preset `collapse`: experts that nobody keeps even collapse, and each remedy does what it is for (docs/losses-and-collapse.md)."""

from typing import Any

import pytest

from benchmarks.collapse import measure

SHORT = ["train.eval_every=0", "train.checkpoint_every=0", "train.steps=160", "data.val_fraction=0.02"]


@pytest.fixture(scope="module")
def untreated() -> list[dict[str, float]]:
    return [measure(SHORT, seed) for seed in range(3)]


def test_without_a_remedy_every_seed_collapses_in_load_before_capacity(untreated: list[dict[str, float]]) -> None:
    for seed in untreated:
        assert seed["entropy"] < 0.5 or seed["dead"] >= 1
        assert seed["fullest"] > 0.3  # of two choices per token the fullest expert could have 0.5 at most; its even share is 0.125


@pytest.mark.parametrize(
    "remedy",
    [
        ["moe.aux_loss_coef=0.05"],
        ["moe.router=sigmoid_bias", "moe.bias_rate=0.02"],
        ["moe.router=noisy_topk", "moe.aux_loss_coef=0.1"],
    ],
)
def test_a_balance_loss_bias_updates_and_noisy_topk_each_even_the_load(remedy: list[str]) -> None:
    seed = measure([*SHORT, *remedy], 0)
    assert seed["entropy"] >= 0.9
    assert seed["dead"] == 0


def test_capacity_bounds_the_rows_that_an_expert_works_on(untreated: list[dict[str, float]]) -> None:
    bounded = measure([*SHORT, "moe.capacity_factor=1.25"], 0)
    assert bounded["processed"] <= 1.25 < untreated[0]["processed"]
    assert bounded["dropped"] > 0.1


def test_z_loss_lowers_the_mean_squared_logsumexp(untreated: list[dict[str, float]]) -> None:
    assert measure([*SHORT, "moe.z_loss_coef=0.01"], 0)["z"] < 0.5 * untreated[0]["z"]


@pytest.mark.parametrize("switch", ["moe.jitter=0.2", "moe.noise_std=1.0"])
def test_jitter_and_noise_train_and_are_reported_as_they_come_out(switch: str) -> None:
    result: dict[str, Any] = measure([*SHORT, switch], 0, steps=30)
    assert all(value == value for value in result.values())
