"""The Transformer, put together from layers."""
