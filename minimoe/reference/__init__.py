"""The kernel contract: every kernel of minimoe, one file per topic, defined in plain array code next to its gradient.

Each topic is a class whose methods are the kernels, written over the array layer alone (`arrays.py`); a backend inherits them all
and overrides those that it implements itself. An override is a method, so the type checker compares its signature with the reference's.
"""
