"""Families of models as transformers knows them, a small file each: the keys of its config.json and the names of its weights.

To add one, write `minimoe/families/NAME.py` with a `FAMILY` (see `family.py`, and `llama.py` for a short example) and name it in `NAMES`;
tests/test_families.py then checks its round trip, tests/parity/test_pretrained.py its numbers.
"""

from importlib import import_module

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError, UserError
from minimoe.families.family import Family
from minimoe.tensorheader import shown

NAMES = ("gpt2", "bert", "vit", "llama", "mistral", "mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")


def family(model_type: object) -> Family:
    """The family of a config.json's `model_type`. Raises UserError for one that is not known, with those that are."""
    if model_type not in NAMES:
        raise UserError(f"model_type = {shown(model_type)} is not known here (known: {', '.join(NAMES)})")
    found: Family = import_module(f"minimoe.families.{model_type}").FAMILY
    return found


def family_for(config: ModelConfig) -> Family:
    """The first family that can express a model. Raises ConfigError, with what the nearest one lacks, where none can."""
    judged = []
    for name in NAMES:
        found = family(name)
        try:
            problems = found.contradictions(config)
            judged.append((False, len(problems), name, problems))
        except ConfigError as error:
            judged.append((True, 1, name, [str(error)]))
            continue
        if not problems:
            return found
    *_, name, problems = min(judged)
    raise ConfigError(f"no family expresses this model; the nearest is {name}, but {'; '.join(problems[:3])}")
