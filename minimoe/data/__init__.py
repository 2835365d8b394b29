"""Text as token ids: tokenizers, corpora and batches."""
