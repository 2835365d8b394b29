"""The Transformer, put together from layers: input, blocks, head, loss."""
