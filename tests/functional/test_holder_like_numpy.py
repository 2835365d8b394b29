"""Random programs of writes, views and operators give on holders what they give on NumPy's arrays."""

import numpy as np
from frozen_backend import FrozenBackend
from hypothesis import given, note, settings
from hypothesis import strategies as st

FROZEN = FrozenBackend()
SLICES = st.builds(slice, *[st.one_of(st.none(), st.integers(-4, 4))] * 2, st.sampled_from([None, 1, 2, -1]))
INDICES = st.lists(st.one_of(SLICES, st.integers(-2, 1), st.just(Ellipsis), st.none()), min_size=1, max_size=3)


@st.composite
def programs(draw):
    """Return a list of instructions, each for arrays that are numbered in the order in which they were made."""
    kinds = st.sampled_from(["view", "reshape", "fill", "assign", "add", "scale", "operate", "index", "copy"])
    return [(draw(kinds), draw(st.integers(0, 99)), draw(st.integers(0, 99)), draw(INDICES)) for _ in range(draw(st.integers(1, 12)))]


def contiguous(array):
    return array.flags.c_contiguous


@settings(max_examples=400)
@given(program=programs())
def test_programs_give_what_they_give_on_numpy(program):
    first = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    theirs, ours = [first.copy()], [FROZEN.from_host(first)]
    for kind, i, j, parts in program:
        i, j, index = i % len(theirs), j % len(theirs), tuple(parts)
        if kind in ("view", "fill", "index"):
            if index.count(Ellipsis) > 1:
                continue
            try:
                _ = theirs[i][index]
            except IndexError:
                continue
        note(f"{kind} {i} {j} {index}")
        if kind == "view":
            theirs.append(np.asarray(theirs[i][index]) if not isinstance(theirs[i][index], np.generic) else theirs[i][(*index, ...)])
            ours.append(ours[i][index])
        elif kind == "reshape" and contiguous(theirs[i]):
            theirs.append(theirs[i].reshape(-1))
            ours.append(ours[i].reshape((theirs[i].size,)))
        elif kind == "fill":
            theirs[i][index] = float(j)
            ours[i][index] = float(j)
        elif kind == "assign" and theirs[i].shape == theirs[j].shape:
            theirs[i][...] = theirs[j].copy()
            ours[i][...] = ours[j]
        elif kind == "add" and theirs[i].shape == theirs[j].shape:
            theirs[i] += theirs[j].copy()
            ours[i] += ours[j]
        elif kind == "scale":
            theirs[i] *= 0.5
            ours[i] *= 0.5
        elif kind == "operate" and theirs[i].shape == theirs[j].shape:
            theirs.append(np.asarray(theirs[i] - 2.0 * theirs[j]))
            ours.append(ours[i] - 2.0 * ours[j])
        elif kind == "index" and theirs[i].ndim and theirs[i].shape[0]:
            rows = np.array([0, -1, 0], np.int32)
            theirs.append(theirs[i][rows])
            ours.append(ours[i][FROZEN.from_host(rows)])
        elif kind == "copy":
            theirs.append(theirs[i].copy())
            ours.append(FROZEN.xp.asarray(ours[i], copy=True))
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine.shape == expected.shape and mine.dtype == expected.dtype
            assert np.array_equal(FROZEN.to_host(mine), expected, equal_nan=True)
