"""The folder of a run: configuration, metrics, status and checkpoints. docs/runs.md describes every file and field."""
