"""Folders in every form that transformers writes or reads: other dtypes, shards, stacked experts, quantised; and there and back again."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from parity.peers import NUMPY, close
from parity.pretrained_models import CASES, FIRST, LENGTH, VOCAB, build, inputs_of, make, opened, saved, their_logits, their_tensors
from safetensors.torch import save_file

from minimoe.engine.grad_mode import no_grad
from minimoe.errors import Notice
from minimoe.pretrained.opening import open_folder

pytestmark = pytest.mark.parity
LOGITS = 1e-4
DTYPES = ("float32", "bfloat16", "float16", "float64")
FIRST_NAMES = tuple(FIRST.values())


def loaded(name, folder, **options):
    """A folder as transformers reads it; no weight may be missing or unexpected."""
    made = getattr(transformers, CASES[name][0])
    model, report = made.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def assert_same_bytes(ours, theirs):
    """Two dictionaries of torch tensors: the same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(*(values.detach().contiguous().flatten().view(torch.uint8) for values in (ours[name], tensor))), name


def prefixed(name, tensors):
    """The names of a BERT without a head are written as those of a BERT with one."""
    return {("bert." + key if "bare" in name else key): tensor for key, tensor in tensors.items()}


# ---- there and back --------------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [(name, "float32") for name in CASES] + [(name, dtype) for name in FIRST_NAMES for dtype in DTYPES[1:]]


@pytest.mark.parametrize("name, dtype", ROUND_TRIPS)
def test_every_tensor_keeps_its_bytes_through_loading_and_saving(name, dtype, tmp_path):
    opened(name, dtype).save_pretrained(tmp_path / "back")
    assert_same_bytes(their_tensors(tmp_path / "back"), prefixed(name, their_tensors(saved(name, dtype))))
    theirs = loaded(name, tmp_path / "back", dtype="auto").state_dict()
    assert_same_bytes(theirs, loaded(name, saved(name, dtype), dtype="auto").state_dict())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((saved(name, dtype) / "config.json").read_text())


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_tensors_that_transformers_keeps_in_float32_stay_so(name, tmp_path):
    loaded(name, saved(name, "float16"), dtype=torch.float16).save_pretrained(tmp_path / "mixed")
    mixed = their_tensors(tmp_path / "mixed")
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float16, torch.float32}
    model = open_folder(tmp_path / "mixed", backend=NUMPY)
    model.save_pretrained(tmp_path / "back")
    assert_same_bytes(their_tensors(tmp_path / "back"), mixed)
    inputs = inputs_of(name)
    close(model(inputs), their_logits(loaded(name, tmp_path / "mixed", dtype=torch.float32), inputs), LOGITS, "logits")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FIRST_NAMES)
def test_weights_in_half_precision_give_the_logits_that_they_give_in_float32(name, dtype):
    inputs = inputs_of(name)
    close(opened(name, dtype)(inputs), their_logits(loaded(name, saved(name, dtype), dtype=torch.float32), inputs), LOGITS, "logits")


PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a != "float64" or b in ("float64", "float32")]  # to less, PyTorch rounds float64 twice


@pytest.mark.filterwarnings("ignore:.*numbers are")  # some of these become inf
@pytest.mark.parametrize("source, target", PAIRS)
def test_another_dtype_is_rounded_to_as_pytorch_rounds(source, target, tmp_path):
    before, after = getattr(torch, source), getattr(torch, target)
    tensors = their_tensors(saved("llama", source))
    odd = torch.tensor([0.0, -0.0, 1e-8, -6e-8, 3e-5, 1e-38, 1e-45, 65504, 65520, -65519.9, 3e38, -3.4e38, torch.inf, -torch.inf])
    ties = 1.0 + torch.arange(16) * 2.0**-12
    tensors["model.embed_tokens.weight"][0] = torch.cat([odd, ties]).to(before)
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "config.json").write_bytes((saved("llama", source) / "config.json").read_bytes())
    save_file(tensors, tmp_path / "from" / "model.safetensors", {"format": "pt"})
    open_folder(tmp_path / "from", backend=NUMPY).save_pretrained(tmp_path / "to", dtype=target)
    assert_same_bytes(their_tensors(tmp_path / "to"), {name: tensor.to(after) for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "to" / "config.json").read_text())["dtype"] == target


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FIRST_NAMES)
def test_each_tensor_of_a_folder_in_another_dtype_is_the_one_that_transformers_writes(name, dtype, tmp_path):
    open_folder(saved(name), backend=NUMPY).save_pretrained(tmp_path / "ours", dtype)
    loaded(name, saved(name), dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    assert_same_bytes(their_tensors(tmp_path / "ours"), prefixed(name, their_tensors(tmp_path / "theirs")))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_keep_their_experts_when_a_balance_bias_in_a_narrow_band_is_converted(dtype, tmp_path):
    tensors = their_tensors(saved("deepseek_v3"))
    for name in tensors:
        if name.endswith("e_score_correction_bias"):  # trained biases lie so: bfloat16 rounds to steps of 1/32 here
            tensors[name] = 6.9 + 0.05 * torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "config.json").write_bytes((saved("deepseek_v3") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "from" / "model.safetensors", {"format": "pt"})
    open_folder(tmp_path / "from", backend=NUMPY).save_pretrained(tmp_path / "to", dtype)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (100, LENGTH))
    theirs = loaded("deepseek_v3", tmp_path / "to", dtype=torch.float32)
    chosen = []
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, given, result: chosen.append(result[2].sort(-1).values.numpy()))
    with torch.no_grad():
        theirs(torch.tensor(tokens))
    with no_grad():
        _, stats = open_folder(tmp_path / "to", backend=NUMPY).hidden(tokens)
    for ours, experts in zip(stats, chosen, strict=True):
        assert (np.sort(ours.ids, axis=-1) == experts).all(axis=-1).mean() > 0.999
    gates = {name: tensor for name, tensor in their_tensors(tmp_path / "to").items() if ".gate." in name}
    assert_same_bytes(gates, {name: tensors[name] for name in gates})


# ---- other forms of the same weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST_NAMES)
def test_shards_are_read_as_one_file_is(name, tmp_path):
    build(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 1
    inputs = inputs_of(name)
    close(open_folder(tmp_path, backend=NUMPY)(inputs), their_logits(build(name), inputs), LOGITS, "logits")


def test_tensors_that_the_index_does_not_list_are_read_as_transformers_reads_them(tmp_path):
    build("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    for name in [name for name in given["weight_map"] if "self_attn" in name]:
        del given["weight_map"][name]
    index.write_text(json.dumps(given))
    inputs = inputs_of("mixtral")
    with pytest.warns(Notice, match="does not list"):
        ours = open_folder(tmp_path, backend=NUMPY)(inputs)
    close(ours, their_logits(loaded("mixtral", tmp_path), inputs), LOGITS, "logits")


@pytest.mark.parametrize("name", FIRST_NAMES)
def test_weights_as_transformers_has_them_in_memory_are_read(name, tmp_path):
    """Then experts are stacked, and ViT's tensors have other names."""
    build(name).save_pretrained(tmp_path / "from", save_original_format=False)
    if build(name).config.model_type in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3"):
        assert any(key.endswith("mlp.experts.gate_up_proj") for key in their_tensors(tmp_path / "from"))
    model = open_folder(tmp_path / "from", backend=NUMPY)
    inputs = inputs_of(name)
    close(model(inputs), their_logits(build(name), inputs), LOGITS, "logits")
    model.save_pretrained(tmp_path / "back")
    assert_same_bytes(their_tensors(tmp_path / "back"), prefixed(name, their_tensors(saved(name))))


# ---- quantised -------------------------------------------------------------------------------------------------------------------------


def quantised_folder(folder, model, tensors, method):
    """A model's folder with other tensors, and a config.json that says how they are packed."""
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


def random_bytes(shape, low, high, seed):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_experts_in_mxfp4_give_the_logits_that_transformers_makes_of_them(tmp_path):
    theirs = make("gpt_oss", hidden_size=32, num_attention_heads=4, intermediate_size=32, num_key_value_heads=2)
    tensors = {}
    for seed, (key, tensor) in enumerate(theirs.state_dict().items()):
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key] = tensor
            continue
        experts, into, out = tensor.shape
        tensors[f"{key}_blocks"] = random_bytes((experts, out, into // 32, 16), 0, 256, seed)
        tensors[f"{key}_scales"] = random_bytes((experts, out, into // 32), 121, 126, seed)
    quantised_folder(tmp_path / "from", theirs, tensors, {"quant_method": "mxfp4"})
    ours = open_folder(tmp_path / "from", backend=NUMPY)
    unpack = transformers.Mxfp4Config(dequantize=True)
    theirs = loaded("gpt_oss", tmp_path / "from", quantization_config=unpack, dtype=torch.float32)
    inputs = inputs_of("gpt_oss")
    close(ours(inputs), their_logits(theirs, inputs), LOGITS, "logits")
    ours.save_pretrained(tmp_path / "back")
    written = their_tensors(tmp_path / "back")
    assert written.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():  # each of these numbers is one of bfloat16
        assert torch.equal(written[key].float(), tensor), key


def float8_weight(shape, seed):
    """A random float8 matrix, its scales for blocks of 128 x 128, and their product."""
    generator = torch.Generator().manual_seed(seed)
    weight = (100.0 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.rand([-(-size // 128) for size in shape], generator=generator) - 10.0)
    each = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    return weight, scale, weight.float() * each


def test_float8_in_blocks_gives_the_logits_of_its_product_with_the_scales(tmp_path):
    theirs = make(
        "deepseek_v3", hidden_size=150, num_attention_heads=2, num_key_value_heads=2, intermediate_size=260, moe_intermediate_size=130,
        q_lora_rank=129, kv_lora_rank=128, qk_nope_head_dim=70, v_head_dim=64,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "plain")
    packed, plain = {}, {}
    for seed, (key, tensor) in enumerate(their_tensors(tmp_path / "plain").items()):
        packed[key] = plain[key] = tensor
        if re.search(r"_proj(_with_mqa)?\.weight$", key):
            packed[key], packed[f"{key}_scale_inv"], plain[key] = float8_weight(tensor.shape, seed)
    assert any(scale.shape == (3, 2) for scale in packed.values())
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    quantised_folder(tmp_path / "from", theirs, packed, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
    ours, inputs = open_folder(tmp_path / "from", backend=NUMPY), inputs_of("deepseek_v3")
    theirs = loaded("deepseek_v3", tmp_path / "plain", dtype=torch.float32)
    close(ours(inputs), their_logits(theirs, inputs), LOGITS, "logits")
    ours.save_pretrained(tmp_path / "back")
    expected = {key: tensor.to(torch.bfloat16) if f"{key}_scale_inv" in packed else tensor for key, tensor in plain.items()}
    assert_same_bytes(their_tensors(tmp_path / "back"), expected)
    loaded("deepseek_v3", tmp_path / "back")
