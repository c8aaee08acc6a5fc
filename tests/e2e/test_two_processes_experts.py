"""``axolotl train`` on quantized experts as two processes: FSDP2 trains what data parallel does, on half the words."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from families.architectures import build
from families.bases import make_base_of
from safetensors.torch import load_file
from support.two_processes import FSDP2, assert_halved, assert_same_training, fsdp2, report, same_training, train_as_two

pytestmark = pytest.mark.e2e

LAYER = "Qwen3MoeDecoderLayer"


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    base = make_base_of(build("qwen3_moe"), folder / "made", quantize_experts=True).folder
    return same_training(folder, base, target_modules="all-linear")


@pytest.mark.parametrize("kind", FSDP2)
def test_fsdp2_trains_what_data_parallel_does(configured, data_parallel, kind):
    """In two runs, of which the second resumes the first."""
    options = fsdp2(kind, LAYER)
    train_as_two(configured(kind, max_steps=2, qalora={"merge": False}, **options))
    checkpoint = configured(kind).parent / "out" / "checkpoint-2"
    verify = {"verify": kind == "full", "verify_tokens": 256}
    resumed = configured(kind, resume_from_checkpoint=str(checkpoint), qalora=verify, **options)
    output = train_as_two(resumed)
    assert_same_training(resumed, data_parallel)
    assert_halved(resumed)
    merged = load_file(resumed.parent / "out" / "merged" / "offsets.safetensors")
    assert any(".experts." in name for name in merged)
    assert output.count("merged into") == 1
    if kind == "full":
        assert "qalora verify: PASSED" in output


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed")
def test_deepspeed_zero3_trains_what_data_parallel_does(configured, data_parallel):
    settings = Path(__file__).parents[2] / "example_configs" / "zero3.json"
    config = configured("zero3", deepspeed=str(settings))
    train_as_two(config)
    assert_same_training(config, data_parallel)
    for rank in (0, 1):
        found = report(config, rank)
        assert found["here"] == found["packed"] / 2
    assert json.loads((config.parent / "out" / "merged" / "config.json").read_text())["quantization_config"]
