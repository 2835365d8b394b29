"""The folder of a run: configuration, metrics, status and checkpoints."""
