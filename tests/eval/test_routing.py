"""Flips of routers: counted and followed, and no cover for a wrong weight."""

import pytest
import torch
from families.architectures import build
from families.bases import make_base_of
from safetensors.torch import load_file, save_file

from qalora_plugin import load_base, merge, verify
from qalora_plugin.eval.routing import recorded, replayed

IDS = torch.arange(4, 68).view(2, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = make_base_of(build("qwen3_moe"), tmp_path_factory.mktemp("base"), quantize_experts=True)
    return load_base(base.folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_flipped_token_follows_and_is_counted(model):
    with recorded(model) as routing:
        wanted = model(IDS).logits
    assert routing.choices == 2 * IDS.numel()
    gate = model.model.layers[0].mlp.gate
    kept = gate.weight.clone()
    gate.weight[[0, 1]] = kept[[1, 0]]  # experts 0 and 1 change places: most tokens flip
    try:
        with replayed(model, routing) as flips:
            found = model(IDS).logits
        astray = model(IDS).logits
    finally:
        gate.weight.copy_(kept)
    assert flips.count > 10
    assert (astray - wanted).abs().max() > 0.01 * wanted.abs().max()
    # Only those tokens whose choice, as a set, is the same have their own, exchanged weights.
    assert (found - wanted).abs().max() < (astray - wanted).abs().max()


@torch.no_grad()
def test_equal_models_do_not_flip(model):
    with recorded(model) as routing:
        wanted = model(IDS).logits
    with replayed(model, routing) as flips:
        assert torch.equal(model(IDS).logits, wanted)
    assert flips.count == 0


def test_a_wrong_experts_weight_is_seen(model, tmp_path):
    from qalora_plugin import add_adapter

    base = model.hf_quantizer.opened.folder
    peft_model = add_adapter(load_base(base, dtype=torch.float32), r=2, target_modules="all-linear")
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
    peft_model.save_pretrained(tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", progress=False).folder
    (file,) = merged.glob("offsets*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.3.up_proj.offsets"][0, 0] += 0.01
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify(base, tmp_path / "adapter", merged, sequences=IDS.tolist(), device="cpu", progress=False)
    assert "offsets are off" in report.failures[0]
    assert report.router_choices == 2 * IDS.numel()
