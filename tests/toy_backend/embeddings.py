"""Embedding: rows of the table, and sums of gradients by id, in the order of the ids."""

import numpy as np

from toy_backend.parts import Array, Scratch, as_rows, put


class Embeddings(Scratch):
    def embedding(self, ids: Array, weight: Array, out: Array | None = None) -> Array:
        return put(weight[ids], out)

    def embedding_backward(
        self, dy: Array, ids: Array, vocab: int, padding: int | None = None, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        dweight = np.zeros((vocab, dy.shape[-1]), dtype=dy.dtype)
        flat = ids.reshape(-1)
        used = np.ones(len(flat), dtype=np.bool_) if padding is None else flat != padding
        np.add.at(dweight, flat[used], as_rows(dy)[used])
        return put(dweight, out, accumulate)
