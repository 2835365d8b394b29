"""The table of model families. A family is found by the model_type of a config.json, or by what a model needs."""

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError, UserError
from minimoe.pretrained.families.bert import FAMILY as BERT
from minimoe.pretrained.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from minimoe.pretrained.families.family import Family
from minimoe.pretrained.families.gpt2 import FAMILY as GPT2
from minimoe.pretrained.families.gpt_oss import FAMILY as GPT_OSS
from minimoe.pretrained.families.llama import FAMILY as LLAMA
from minimoe.pretrained.families.mistral import FAMILY as MISTRAL
from minimoe.pretrained.families.mixtral import FAMILY as MIXTRAL
from minimoe.pretrained.families.olmoe import FAMILY as OLMOE
from minimoe.pretrained.families.qwen3_moe import FAMILY as QWEN3_MOE
from minimoe.pretrained.families.vit import FAMILY as VIT
from minimoe.pretrained.header import shown
from minimoe.reference.routers import ROUTERS

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "bert": BERT,
    "vit": VIT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "deepseek_v3": DEEPSEEK_V3,
}
"""The families by model_type, in the order in which `family_for` tries them."""


def family(model_type: object) -> Family:
    """Return the family of a config.json's `model_type`. Raises UserError, which lists the known ones, for any other."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type = {shown(model_type)} is not known (known: {', '.join(FAMILIES)})")
    return FAMILIES[model_type]


def family_for(config: ModelConfig) -> Family:
    """Return the first family that can express a model. If there is none, ConfigError says what the nearest one lacks."""
    if config.moe is not None and config.moe_layers() and config.moe.router not in ROUTERS:
        raise ConfigError(f"moe.router = {config.moe.router!r} comes from another package: transformers has no family with that router")
    judged = []
    for name, found in FAMILIES.items():
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
