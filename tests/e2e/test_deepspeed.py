"""``axolotl train`` with ZeRO as two processes trains what data parallel trains. Run by ``make test-deepspeed``."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.two_processes import assert_same_training, report, train_as_two

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed"),
]

ZERO3 = json.loads((Path(__file__).parents[2] / "example_configs" / "zero3.json").read_text())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_what_data_parallel_does(configured, data_parallel, stage):
    zero = ZERO3["zero_optimization"] if stage == 3 else {"stage": stage, "contiguous_gradients": True}
    settings = data_parallel.parent.parent / f"zero{stage}.json"
    settings.write_text(json.dumps(ZERO3 | {"zero_optimization": zero}))
    verify = {"verify": stage == 3, "verify_tokens": 256}
    config = configured(f"zero{stage}", deepspeed=str(settings), qalora=verify)
    output = train_as_two(config)
    assert ("qalora verify: PASSED" in output) == (stage == 3)
    assert_same_training(config, data_parallel)
    for rank in (0, 1):
        found = report(config, rank)
        assert (found["mode"], found["backend"], found["world"]) == ("DISTRIBUTED", "gloo", 2)
        assert found["here"] == found["packed"] / (2 if stage == 3 else 1)
    assert load_file(config.parent / "out" / "merged" / "offsets.safetensors").keys()
    if stage == 3:
        checkpoint = str(config.parent / "out" / "checkpoint-2")
        other = {"lora_model_dir": None, "lora_r": 8, "lora_alpha": 64, "resume_from_checkpoint": checkpoint}
        output = train_as_two(configured("other", deepspeed=str(settings), **other), code=1)
        assert output.count("at rank 8 and alpha/rank 2, this run has rank 8 and 8. Resume with the settings") >= 2
