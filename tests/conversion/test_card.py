"""The README.md of a merge: what it says of the model, and files of others in its place."""

import logging
from types import SimpleNamespace

import pytest
from transformers.models.auto import modeling_auto

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.conversion.card import add_exactness, auto_class_name, model_card
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.served_bits import SizeReport

QUANTIZATION = {
    "base_model": "owner/x", "base_fingerprint": "f", "adapter": "a", "bits": 4, "group_size": 32, "sym": True,
    "desc_act": False, "offset_dtype": "float16",
}  # fmt: skip
FOUR = [GroupwiseSpec("model.layers.0.up_proj", 256, 64, 4, 32)] * 6
EIGHT = [GroupwiseSpec("model.layers.0.down_proj", 256, 64, 8, 64)]


def card(adapter, specs, config=None):
    return model_card("out", config or {}, QUANTIZATION, AdapterFolder.open(adapter), 1, 2, specs, SizeReport(0), 0)


def test_all_linears_alike(adapter):
    found = card(adapter, FOUR)
    assert "tags: [qalora, gptq, 4-bit]" in found
    assert "act-order | 4 · 32 · True · False |" in found


def test_linears_of_several_bits(adapter):
    """As ``quantize --budget`` makes them."""
    found = card(adapter, FOUR + EIGHT)
    assert "tags: [qalora, gptq, mixed-bit]" in found
    assert "into its mixed-bit GPTQ base" in found
    assert "act-order | 6 × 4 bit, g 32; 1 × 8 bit, g 64 · True · False |" in found


SEEING = [
    ("Qwen2_5_VLForConditionalGeneration", "AutoModelForImageTextToText"),
    ("LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
    ("Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
    ("Gemma3ForCausalLM", "AutoModelForCausalLM"),
    ("LlamaForCausalLM", "AutoModelForCausalLM"),
]


@pytest.mark.parametrize(("architecture", "expected"), SEEING)
def test_the_class_that_loads_it(adapter, architecture, expected):
    vision = {"vision_config": {}} if architecture.endswith("ForConditionalGeneration") else {}
    config = {"architectures": [architecture], **vision}
    assert auto_class_name(config) == expected
    assert f"    model = {expected}.from_pretrained(" in card(adapter, FOUR, config)
    names = {
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    assert architecture in names[expected].values()
    assert auto_class_name({}) == "AutoModelForCausalLM"


def test_a_card_that_is_no_utf_8(tmp_path, caplog):
    (tmp_path / "README.md").write_bytes("| exactness | é".encode("latin-1"))
    figures = dict.fromkeys(
        ("tensors_identical", "tensors", "offset_error", "weight_error_relative", "tokens", "logit_error",
         "logit_difference", "kl_mean", "top1_agreement"), 1,
    )  # fmt: skip
    report = SimpleNamespace(passed=True, failures=[], offset_dtype="float16", dtype="float32", **figures)
    with caplog.at_level(logging.WARNING):
        add_exactness(tmp_path, report)
    assert "cannot be written into" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == "| exactness | é".encode("latin-1")
