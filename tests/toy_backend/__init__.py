"""A backend on NumPy with every kernel of the contract written out: an example of own kernels, and what mutants are made of.

One file for each topic, as in minimoe/reference/, but with formulas, loops and saved arrays of its own. It shares no code with the
references, so the suite finds a wrong line here as it would in any other port. Kernels take scratch memory from `parts.py` and never
return it. `tests/mutants/` changes these files one line at a time and checks that the conformance suite fails.
"""

from toy_backend.activations import Activations
from toy_backend.array_layer import ToyArrays
from toy_backend.attending import Attending
from toy_backend.embeddings import Embeddings
from toy_backend.experts import Experts
from toy_backend.gates import Gates
from toy_backend.linears import Linears
from toy_backend.losses import Losses
from toy_backend.norms import Norms
from toy_backend.optimizers import Optimizers
from toy_backend.random_numbers import RandomNumbers
from toy_backend.rotations import Rotations
from toy_backend.routes import Routes


class ToyBackend(
    Norms, Rotations, Linears, Attending, Gates, Experts, Routes, Activations, Losses, Embeddings, RandomNumbers, Optimizers, ToyArrays
):
    """NumPy on the host, with its own kernel for everything."""

    name = "toy"
