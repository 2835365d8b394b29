"""Optimizers and learning-rate schedules: `minimoe.training.optim` under its public name."""

from minimoe.training.optim import *  # noqa: F403
