"""The engine: tensors that remember how they were made, their operations, and backward."""

from minimoe.engine.operators import bind

bind()
