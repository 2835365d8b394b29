"""The engine: tensors that remember how they were made, their operations, and backward."""

from minimoe.engine import backward, operators, ops

operators.bind(ops, backward.backward)
