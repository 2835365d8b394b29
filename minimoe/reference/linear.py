"""The dense product of a layer: y = x W^T + b, with W in torch's orientation [out, in], and a kernel for each of its gradients.

dx = dy W,   dW = dy^T x,   db = sum(dy).   The last two may be added to float32 where dy and x are bfloat16: then they are not rounded.
"""

from minimoe.reference.arrays import Array, ArrayLayer


class LinearKernels(ArrayLayer):
    def linear(self, x: Array, weight: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        """x [...,I], weight [O,I], bias [O] or None -> [...,O]"""
        y = self.xp.matmul(self.rows(x), weight.T)
        if bias is not None:
            y += bias
        return self.store(self.xp.reshape(y, (*x.shape[:-1], weight.shape[0])), out)

    def linear_dx(self, dy: Array, weight: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        """dy [...,O], weight [O,I] -> dx [...,I]"""
        dx = self.xp.matmul(self.rows(dy), weight)
        return self.store(self.xp.reshape(dx, (*dy.shape[:-1], weight.shape[1])), out, accumulate)

    def linear_dw(self, dy: Array, x: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        """dy [...,O], x [...,I] -> dweight [O,I]"""
        dy, x = (self.for_sum(self.rows(array), out) for array in (dy, x))
        return self.store(self.xp.matmul(dy.T, x), out, accumulate)

    def linear_db(self, dy: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        """dy [...,O] -> dbias [O]"""
        db = self.xp.sum(self.wide(self.rows(dy)), axis=0)
        return self.store(self.narrowed(db, dy, out), out, accumulate)
