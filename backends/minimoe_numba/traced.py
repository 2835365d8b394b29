"""Arrays that report to the tape what NumPy computes from them.

NumPy does not announce what it computes, but it asks subclasses of its array: `Traced` is one, and the result of an operator, a
function or a method on a traced array is traced again. All state of a model is traced (the backend's `xp` and `from_host` return
nothing else), and so is everything computed from it. NumPy does not ask everywhere (`np.asarray` and `np.array` of a traced array do
not), so overrides do not use those.
"""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from minimoe_numba.tape import Tape


class Recorder(threading.local):
    """Holds the tape that this Python thread is writing, if any."""

    tape: "Tape | None" = None


recorder = Recorder()


class Traced(np.ndarray[Any, Any]):
    """An array whose uses by NumPy are written down while a tape is written."""

    owner: "Traced | None" = None  # if this is a view: the array that it views, kept alive so that its memory is not used again

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Traced) and self.base is not None:
            self.owner = source if source.owner is None else source.owner

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle it as NumPy's own array."""
        return plain(self).__reduce_ex__(protocol)

    @property
    def flat(self) -> Any:
        if recorder.tape is not None:
            recorder.tape.refuse("an array was read element by element (flat)")
        return plain(self).flat

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return perform(ufunc if method == "__call__" else getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return perform(function, args, options)


def through_perform(name: str) -> Any:
    """Return the named method of NumPy's array as one that is written on the tape."""
    function = getattr(np.ndarray, name)

    def method(self: Traced, *args: Any, **options: Any) -> Any:
        return perform(function, (self, *args), options)

    return method


def read_on_the_host(name: str) -> Any:
    """Return the named method of NumPy's array as one that ends the tape, because it reads a number."""
    function = getattr(np.ndarray, name)

    def method(self: Traced, *args: Any, **options: Any) -> Any:
        if recorder.tape is not None:
            recorder.tape.refuse(f"a number was read on the host ({name.strip('_')})")
        return function(plain(self), *args, **options)

    return method


for _name in (
    "__getitem__", "__setitem__", "astype", "copy", "reshape", "ravel", "flatten", "argsort", "sort", "cumsum", "cumprod", "take", "repeat",
    "fill", "argmax", "argmin", "round", "dot", "nonzero", "searchsorted", "partition", "argpartition", "put", "choose", "compress",
    "trace", "byteswap", "__copy__", "__deepcopy__",
):  # fmt: skip
    setattr(Traced, _name, through_perform(_name))
for _name in ("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "tobytes", "tofile", "dumps", "__dlpack__"):
    setattr(Traced, _name, read_on_the_host(_name))


def plain(x: Any) -> Any:
    """Return NumPy's own array over the same memory, also inside lists and tuples. It does not keep the memory reserved."""
    if isinstance(x, Traced):
        return x.view(np.ndarray)
    return type(x)([plain(part) for part in x]) if isinstance(x, tuple | list) else x


def traced(x: "np.ndarray[Any, Any]", source: Any = None) -> Traced:
    """Return a traced array over the same memory. `source`: the traced array that x is a view of."""
    y: Traced = x.view(Traced)
    if isinstance(source, Traced):
        y.owner = source if source.owner is None else source.owner
    return y


def perform(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call function(*args, **options), and write the call down if there is a tape.   -> its result, traced"""
    bare = plain(args)
    bare_options = {name: plain(value) for name, value in options.items()} if options else options
    result = function(*bare, **bare_options)
    given = options.get("out") if options else None
    if given is not None:
        given = given[0] if isinstance(given, tuple) else given
    tape = recorder.tape
    if tape is not None:
        return tape.write(function, (*args, *options.values()), bare, bare_options, result, given)
    if given is not None:
        return given
    if isinstance(result, tuple | list):
        return rebuilt(result, [traced(part) if isinstance(part, np.ndarray) else part for part in result])
    return traced(result) if isinstance(result, np.ndarray) else result


def rebuilt(like: Any, parts: list[Any]) -> Any:
    """Return a list, a tuple or a named tuple like `like`, with other parts."""
    return like._make(parts) if hasattr(like, "_make") else type(like)(parts)
