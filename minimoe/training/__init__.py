"""Training: one step, the loop over steps, metrics, optimizers, evaluation and tasks."""
