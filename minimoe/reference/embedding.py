"""Embedding: a row of the table for each id; its gradient adds the rows of equal ids in their order."""

from minimoe.reference.arrays import Array, ArrayLayer


class EmbeddingKernels(ArrayLayer):
    def embedding(self, ids: Array, weight: Array, out: Array | None = None) -> Array:
        """ids [...] int32, weight [V,D] -> [...,D]"""
        taken = self.xp.take(weight, self.xp.reshape(ids, (-1,)), axis=0)
        return self.store(self.xp.reshape(taken, (*ids.shape, weight.shape[1])), out)

    def embedding_backward(
        self, dy: Array, ids: Array, vocab: int, padding: int | None = None, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        """dy [...,D], ids [...] -> dweight [V,D]; the row of `padding` stays zero"""
        xp, dy = self.xp, self.for_sum(dy, out)
        dweight = xp.zeros((vocab, dy.shape[-1]), dtype=dy.dtype)
        self.scatter_add(dweight, xp.reshape(ids, (-1,)), self.rows(dy))
        if padding is not None:
            dweight[padding, :] = 0.0
        return self.store(dweight, out, accumulate)
