"""The kernel contract: every kernel of minimoe, a topic a file, defined in plain array code with its gradient beside it.

Each topic is a class whose methods are the kernels, written over the array layer alone (`arrays.py`); a backend inherits them all
and overrides the ones that it has by hand. An override is a method, so the type checker compares its signature with the reference's.
"""
