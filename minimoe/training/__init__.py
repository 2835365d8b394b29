"""Training: one step, the loop around it, optimizers, evaluation and tasks."""
