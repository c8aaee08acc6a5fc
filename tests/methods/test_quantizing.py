"""What `qalora quantize` refuses before GPTQModel begins; a stand-in for it, which the training environment has not."""

import json
import logging
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base, make_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.dense_models import empty_model
from qalora_plugin.methods import dense_source, quantizing
from qalora_plugin.methods.dense_source import require_sizes, sizes_in_layers
from qalora_plugin.methods.quantizing import plan_for, quantize

SEQUENCES = [list(range(4, 90)) * 2]
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
# What GPTQModel 7.6 says of these families.
LLAMA = ["model.layers"], [*ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
MIXTRAL = (
    ["model.layers"],
    [*ATTENTION, ["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj"]],
)
GPT2 = ["transformer.h"], [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizing")
    make_base(folder / "base", twin=folder / "dense")
    return folder / "dense"


@pytest.fixture
def refused(dense, tmp_path, monkeypatch):
    """The reason, and that it came before GPTQModel was asked for anything and left nothing."""

    def run(model=dense, out="out", text=__file__, **options):
        with pytest.raises(QALoraError) as caught:
            quantize(str(model), tmp_path / "place" / out, str(text), **options)
        assert not (tmp_path / "place").exists()
        return str(caught.value)

    monkeypatch.setattr(quantizing, "find_spec", lambda name: name)
    monkeypatch.setitem(
        sys.modules, "gptqmodel", SimpleNamespace(GPTQModel=None, QuantizeConfig=None, GPTAQConfig=None)
    )
    run.family = family = SimpleNamespace(module_tree=[])
    knows(family, LLAMA)
    models = SimpleNamespace(check_and_get_model_definition=lambda folder, trust_remote_code: family)
    monkeypatch.setitem(sys.modules, "gptqmodel.models.auto", models)
    return run


def knows(family, said):
    stacks, blocks = said
    family.extract_layers_node, family.simple_layer_modules = lambda: stacks, lambda config, quantize_config: blocks


@pytest.fixture
def saved(tmp_path):
    """A folder of a model with a tokenizer, its tensors changed by a function."""

    def save(model, change=None):
        model.save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        if change is not None:
            tensors = load_file(file := tmp_path / "model" / "model.safetensors")
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "model"

    return save


def llama(**config):
    return LlamaForCausalLM(LlamaConfig(**SMALL | config))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=1, n_head=4))


def test_places(refused, dense):
    assert "/proc is not writable" in refused(out="/proc/base")
    assert "which is the base's folder, or inside it" in refused(out=dense / "base")


def test_numbers(refused, monkeypatch):
    assert "samples is 0, expected 1 or more" in refused(samples=0)
    assert "length is 1, expected 2 or more" in refused(length=1)
    assert "a budget chooses bits itself" in refused(budget=4.0, bits=4)
    assert "group_size is 48, expected one of (32, 64, 128) beside a budget" in refused(budget=4.0, group_size=48)
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "find_spec", lambda name: None if name == "scipy" else name)
        assert "a budget takes scipy, which is not installed here" in refused(budget=4.0)
    for fisher in (True, False):
        assert "fisher weights the choices that a budget leaves" in refused(fisher=fisher)
    for budget in (float("nan"), float("inf"), 0.0, -1.0):
        assert f"budget is {budget}, expected bits a weight" in refused(budget=budget)
    for seed in (2**64, -(2**63) - 1):
        assert f"seed is {seed}, expected a number of 64 bits" in refused(seed=seed)


def test_a_disk_that_is_too_small(refused, saved, monkeypatch):
    """It was found after hours of work, of which nothing was kept."""
    model = llama(num_hidden_layers=2)
    folder, numbers = saved(model), sum(part.numel() for part in model.parameters())
    weights = sum(part.numel() for name, part in model.named_parameters() if "_proj" in name)
    asked = []
    monkeypatch.setattr(quantizing, "require_space", lambda place, needed: asked.append((place, needed)))
    monkeypatch.setattr(quantizing, "track", lambda *_: (_ for _ in ()).throw(QALoraError("went on")))
    for options, a_weight in (
        ({}, 4 + 20 / 32),
        ({"bits": 3, "group_size": -1}, 3),
        ({"budget": 3.5}, 3.5),
        ({"budget": 1e9}, 16),
    ):
        asked.clear()
        assert "went on" in refused(folder, **options)
        assert {needed for _, needed in asked} == {int(2 * (numbers - weights) + weights * a_weight / 8)}
        assert [place.name for place, _ in asked] == ["place", Path(tempfile.gettempdir()).name]


def test_what_can_be_known_of_a_hubs_model_is_asked_before_it_is_downloaded(refused, merged, monkeypatch):
    monkeypatch.setattr(dense_source, "fetch_config", lambda *_, **__: Path(merged) / "config.json")
    monkeypatch.setattr(dense_source, "resolve", lambda *_, **__: pytest.fail("downloaded"))
    assert "some/model is quantized itself (qalora)" in refused("some/model")
    assert "group size 24 is none that GPTQModel packs" in refused("some/model", group_size=24)
    assert "samples is 0" in refused("some/model", samples=0)
    assert "does not exist" in refused("some/model", text="/nowhere.txt")


def test_rounding_of_what_stays_is_told(caplog):
    for stated, computed, told in (
        (torch.float16, torch.bfloat16, "rounded from torch.float16 to torch.bfloat16; on a GPU they would not be"),
        (torch.float32, torch.bfloat16, "rounded from torch.float32 to torch.bfloat16."),
        (torch.bfloat16, torch.bfloat16, ""),
        (torch.float16, torch.float16, ""),
    ):
        caplog.clear()
        quantizing._tell_what_is_rounded(stated, computed)
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)


def test_models(refused, dense, merged, tmp_path):
    assert "is quantized itself (qalora)" in refused(merged)
    small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    assert "has no tokenizer that can be loaded" in refused(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    assert "is none of the 64 that" in refused(tmp_path / "small")


@pytest.mark.parametrize("budget", [None, 4.5])
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_model_that_lacks_a_tensor(refused, saved, name, budget):
    folder = saved(llama(), lambda tensors: tensors.pop(name))
    assert f"{folder} lacks {name} (1 tensors in all) of a LlamaForCausalLM" in refused(folder, budget=budget)


def test_what_a_folder_need_not_hold_is_not_missed(saved):
    """A head that is the embedding, and experts that are linears of their own on disk."""
    assert "lm_head.weight" not in load_file(saved(llama(tie_word_embeddings=True)) / "model.safetensors")
    assert empty_model(saved(llama(tie_word_embeddings=True))).get_output_embeddings().weight.is_meta
    folder = saved(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)))
    assert any(".experts.1.w2." in name for name in load_file(folder / "model.safetensors"))
    empty_model(folder)


def test_a_model_that_lacks_one_expert(refused, saved):
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    assert "gives model.layers.0.mlp.experts.down_proj as 1×64×128, but MixtralForCausalLM has 2×64×128" in refused(
        saved(model, lambda tensors: pop_one(tensors, ".experts.1.w2.weight"))
    )


def pop_one(tensors, end):
    del tensors[next(name for name in tensors if name.endswith(end))]


def test_a_tensor_of_another_shape(refused, saved):
    def shorten(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    assert "gives model.norm.weight as 32, but LlamaForCausalLM has 64 by config.json" in refused(
        saved(llama(), shorten)
    )


@pytest.mark.parametrize("budget", [None, 4.5])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_not_finite(refused, saved, name, value, budget):
    folder = saved(llama().half(), lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"{name} holds NaN or Inf" in refused(folder, budget=budget)


@pytest.mark.parametrize("group_size", [0, 3, 8, 24, -2, 2**31])
def test_group_sizes_that_nobody_packs(refused, dense, saved, group_size):
    said = f"group size {group_size} is none that GPTQModel packs. Use one of [16, 32, 64, 128, 256, 512, 1024], or -1"
    assert said in refused(group_size=group_size)
    knows(refused.family, GPT2)
    assert said in refused(saved(gpt2()), group_size=group_size)


@pytest.mark.parametrize(
    ("model", "said", "group_size", "named"),
    [
        (lambda: llama(head_dim=12), LLAMA, 32, "48 inputs of model.layers.0.self_attn.o_proj"),
        (lambda: llama(intermediate_size=80), LLAMA, 32, "80 inputs of model.layers.0.mlp.down_proj"),
        (gpt2, GPT2, 128, "64 inputs of transformer.h.0.attn.c_attn"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**SMALL | {"intermediate_size": 48}, num_local_experts=2)),
            MIXTRAL, 32, "48 inputs of model.layers.0.mlp.experts.down_proj",
        ),
    ],
)  # fmt: skip
def test_inputs_that_groups_do_not_divide(refused, saved, model, said, group_size, named):
    knows(refused.family, said)
    reason = refused(saved(model()), group_size=group_size)
    assert f"group size {group_size} does not divide the {named}" in reason
    assert "Use one of [16" in reason


def test_codes_that_do_not_fill_words(refused, saved):
    """GPTQModel packs them some other way, or ends the process."""
    said = "k_proj has 64 inputs and 24 outputs, and codes of 3 bits fill whole words 32 at a time"
    assert said in refused(
        saved(llama(num_attention_heads=8, head_dim=12, num_key_value_heads=2)), bits=3, group_size=16
    )


def test_only_what_is_quantized_counts(saved):
    """A head, an embedding, a linear in the layers that GPTQModel leaves dense."""
    model = empty_model(saved(llama(head_dim=12)))
    stacks, blocks = LLAMA
    leaves = {leaf for block in blocks for leaf in block} - {"self_attn.o_proj"}
    require_sizes(found := sizes_in_layers(model, stacks, leaves), 4, 64)
    assert {name.rpartition(".")[2] for name in found} == {leaf.rpartition(".")[2] for leaf in leaves}
    assert sizes_in_layers(model, [], leaves) == {}


def test_inputs_of_experts_cannot_be_paired(refused, saved):
    """Of Mixtral and of any family that GPTQModel does not know."""
    folder = saved(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)))
    assert "router sends tokens to other experts. Leave it out" in refused(folder, gptaq=True)
    refused.family.module_tree = None
    assert "router sends tokens to other experts. Leave it out" in refused(folder, gptaq=True)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_no_sequence_is_longer_than_the_model(refused, saved, tmp_path, monkeypatch, family, caplog):
    opt = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=64, word_embed_proj_dim=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    folder = saved(gpt2() if family == "gpt2" else OPTForCausalLM(opt))
    (tmp_path / "text.txt").write_text("abc def ghi. " * 2000)
    seen = []

    def plan(folder, sequences, *_):
        seen.extend(sequences)
        plan_for(folder, sequences[:2], 5.0, False)
        raise QALoraError("planned")

    monkeypatch.setattr(quantizing, "plan_for", plan)
    with caplog.at_level(logging.WARNING):
        assert "planned" in refused(folder, text=tmp_path / "text.txt", samples=8, length=1024, budget=5.0)
    assert max(map(len, seen)) == 64
    assert "sequences of 64 tokens, not 1024" in caplog.text


def test_a_config_that_transformers_cannot_build(refused, saved):
    folder = saved(llama())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "none such"}))
    assert "cannot be loaded as a 16-bit model" in refused(folder)
