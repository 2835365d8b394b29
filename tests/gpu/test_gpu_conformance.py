"""Every conformance case of both GPU backends on the card, against NumPy in float64: array layer, kernels, gradients, a training curve,
and everything twice to the bit. Results start as NaN, and nothing is written beside an array."""


def test_a_case_conforms(case, guarded):
    case.run()
