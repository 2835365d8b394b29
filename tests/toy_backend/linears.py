"""The dense product and its gradients: the library's matrix product, written straight into `out`, or through scratch memory if added."""

import numpy as np

from toy_backend.parts import Array, Scratch, as_rows


class Linears(Scratch):
    def linear(self, x: Array, weight: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        y = np.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype) if out is None else out
        np.matmul(x, weight.T, out=y)
        if bias is not None:
            y += bias
        return y

    def linear_dx(self, dy: Array, weight: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        return self._product(dy, weight, out, accumulate)

    def linear_dw(self, dy: Array, x: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        return self._product(as_rows(dy).T, as_rows(x), out, accumulate)

    def linear_db(self, dy: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        db = np.zeros(dy.shape[-1], dtype=dy.dtype) if out is None else out
        if not accumulate:
            db[...] = 0.0
        db += as_rows(dy).sum(axis=0)
        return db

    def _product(self, a: Array, b: Array, out: Array | None, accumulate: bool) -> Array:
        """a b, added to `out` through scratch memory if `accumulate`.   [...,I], [I,O] -> [...,O]"""
        shape = (*a.shape[:-1], b.shape[-1])
        if out is not None and accumulate:
            product = self._scratch("product", shape, a.dtype)
            np.matmul(a, b, out=product)
            out += product
            return out
        y = np.empty(shape, dtype=a.dtype) if out is None else out
        np.matmul(a, b, out=y)
        return y
