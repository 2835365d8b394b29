"""Families of models as transformers knows them, a small file each: the keys of its config.json and the names of its weights.

To add one, write `minimoe/pretrained/families/NAME.py` with a `FAMILY` (see `family.py`, and `llama.py` for a short example) and add it
to `table.py`; tests/pretrained/test_families.py then checks its round trip, tests/parity/test_pretrained.py its numbers.
"""
