"""vLLM's log-probabilities of whole models, in process, against transformers in the same dtype."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import to_old_layout
from support.hardware import needs_kernel
from support.merged_checkpoints import make_merged
from support.scoring import MEAN_TOLERANCE, score, text_tokens
from support.vllm_scores import OPTIONS, difference, scores
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

pytestmark = pytest.mark.e2e
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V2_SYM = {"sym": True, "checkpoint_format": "gptq_v2"}

CASES = {
    "asym": (BF16, {"bias": True}),
    "asym-second-term": (BF16, {"bias": True}),
    "asym-fp16": (FP16, {"bias": True}),
    "asym-fp32": (FP32, {"bias": True}),
    "sym-v2-g128": (BF16, {**V2_SYM, "group_size": 128}),
    "sym-v2-one-group": (BF16, {**V2_SYM, "group_size": -1}),
    "act-order": (BF16, {"act_order": True}),
    "act-order-fp32": (FP32, {"act_order": True}),
    "only-q-and-v": (BF16, {"targets": ("q_proj", "v_proj")}),
    "down-proj-dense": (BF16, {"dense": ("down_proj",), "store_g_idx": False}),
    "head-quantised": (FP32, {"quantized_head": True}),
    "8-bit-fp32-offsets": (BF16, {"bits": 8, "offset_dtype": FP32}),
}
# Other paths than the one that a CPU takes by itself; float32 has no kernel.
FORCED = {"asym-second-term": "kernel+offsets"} | {case: "dense" for case, (dtype, _) in CASES.items() if dtype == FP32}


def vllm_scores(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, **kwargs) -> torch.Tensor:
    llm = LLM(str(folder), dtype=str(dtype).removeprefix("torch."), **{**OPTIONS, **kwargs})
    found = scores(llm, tokens)
    del llm
    cleanup_dist_env_and_memory()
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs_kernel if "second-term" in case else ()) for case in CASES]
)
def test_merged_checkpoint(tmp_path, case, monkeypatch):
    dtype, kwargs = CASES[case]
    if forced := FORCED.get(case):
        monkeypatch.setenv("QALORA_PATH", forced)
    folder, tokens = make_merged(tmp_path, **kwargs), text_tokens(6, 100)
    wanted, base = (score(folder, tokens, dtype, with_offsets) for with_offsets in (True, False))
    assert difference(wanted, base) > 4 * MEAN_TOLERANCE[dtype]  # or the test would not see the offsets
    assert difference(vllm_scores(folder, tokens, dtype), wanted) <= MEAN_TOLERANCE[dtype]


def test_plain_gptq_base(tmp_path):
    base, tokens = make_merged(tmp_path).parent / "base", text_tokens(6, 100)
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        found = vllm_scores(base, tokens, BF16, quantization="qalora")
    finally:
        logger.removeHandler(handler)
    assert not [message for message in warned if "_proj" in message or "qalora" in message]  # none a layer
    assert difference(found, score(base, tokens, BF16)) <= MEAN_TOLERANCE[BF16]


@pytest.mark.parametrize("settings_in_config", [False, True])
def test_old_autogptq_folder(tmp_path, settings_in_config):
    base, tokens = make_merged(tmp_path).parent / "base", text_tokens(6, 100)
    wanted = score(base, tokens, BF16)
    found = vllm_scores(to_old_layout(base, settings_in_config), tokens, BF16, quantization="qalora")
    assert difference(found, wanted) <= MEAN_TOLERANCE[BF16]


def test_reloaded_weights(tmp_path):
    """From a merge of an untrained adapter, all zeros, to a trained one; k, o and the MLP have none."""
    folder, tokens = make_merged(tmp_path, targets=("q_proj", "v_proj"), act_order=True), text_tokens(6, 100)
    untrained = shutil.copytree(folder, tmp_path / "untrained_merged")
    offsets = {name: torch.zeros_like(value) for name, value in load_file(folder / "offsets.safetensors").items()}
    (untrained / "offsets.safetensors").unlink()
    save_file(offsets, untrained / "offsets.safetensors", metadata={"format": "pt"})
    llm = LLM(str(untrained), dtype="bfloat16", **OPTIONS)
    assert difference(scores(llm, tokens), score(untrained, tokens, BF16)) <= MEAN_TOLERANCE[BF16]
    rubbish = [torch.full((1 << 16,), 7, dtype=torch.float16) for _ in range(400)]
    del rubbish  # so that vLLM's new, uninitialised parameters are not zero by luck
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    found = scores(llm, tokens)
    del llm
    cleanup_dist_env_and_memory()
    wanted = score(folder, tokens, BF16)
    assert difference(wanted, score(untrained, tokens, BF16)) > 4 * MEAN_TOLERANCE[BF16]
    assert difference(found, wanted) <= MEAN_TOLERANCE[BF16]
