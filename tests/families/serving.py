"""Rows of the serving table: a merged base in vLLM, in this process, against transformers."""

import gc
from pathlib import Path

import torch
from families.architectures import EXPERTS, QUANTIZED_EXPERTS, VISION_LANGUAGE, build
from families.bases import make_base_of
from serve.test_offline import OPTIONS, scores
from support.merged_checkpoints import add_offsets
from support.scoring import text_tokens
from transformers import PreTrainedModel
from vllm import LLM, ModelRegistry
from vllm.distributed import cleanup_dist_env_and_memory

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.loading import load_base, load_model

# Sizes that vLLM's classes count on; else as in the training table.
CHANGES = {"falcon": {"ffn_hidden_size": 256}}
NAMES = [
    *"""
    falcon falcon_h1 gemma2 gemma3_text glm4 gpt2 gpt_bigcode gpt_neox gptj granite llama mamba2 mixtral olmo2
    opt phi phi3 qwen2 qwen3 qwen3_moe stablelm starcoder2 idefics3 smolvlm bloom minicpm3
    """.split(),  # noqa: SIM905
    *(
        name + EXPERTS
        for name in QUANTIZED_EXPERTS
        if name in ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
    ),
]
COLUMNS = ("model type", "class", "vLLM", "transformers", "offsets", "outcome")
TOLERANCE = 2.0  # times what bfloat16 does to transformers' own log-probabilities


def row(name: str, work: Path) -> tuple[str, ...]:
    architecture = name.removesuffix(EXPERTS)
    model = build(architecture, **CHANGES.get(architecture, {}))
    base = make_base_of(model, work, quantize_experts=name.endswith(EXPERTS))
    merged, tokens = add_offsets(base.folder, work / "merged", targets=("",)), text_tokens(4, 60)
    # Before vLLM, which changes some of transformers' classes to run them.
    wanted, rounded, before = (
        score(folder, tokens, dtype)
        for folder, dtype in ((merged, torch.float32), (merged, torch.bfloat16), (base.folder, torch.float32))
    )
    try:
        found = vllm_scores(merged, model, tokens)
    except Exception as error:  # vLLM wraps what a quantisation config raises in errors of its own
        if (reason := _refusal(error)) is None:
            raise
        return (name, type(model).__name__, "", "", "", f"refused: {reason.replace(str(merged), 'the checkpoint')}")
    ours, theirs, moved = ((a - wanted).abs().mean().item() for a in (found, rounded, before))
    assert moved > 4 * ours, (moved, ours)  # or the offsets could be missing
    assert ours <= TOLERANCE * theirs, (ours, theirs)
    return (name, type(model).__name__, f"{ours:.0e}", f"{theirs:.0e}", f"{moved:.0e}", "works")


def vllm_scores(folder: Path, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    architecture = type(model).__name__
    if hasattr(lazy := ModelRegistry.models[architecture], "load_model_cls"):
        # Registered as a class, it is looked at here; vLLM would start a process for it, which takes 20 seconds.
        ModelRegistry.register_model(architecture, lazy.load_model_cls())
    vision = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if model.config.model_type in VISION_LANGUAGE else {}
    llm = LLM(str(folder), dtype="bfloat16", **OPTIONS, **vision)
    try:
        return scores(llm, tokens)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.no_grad()
def score(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of each token given those before it, by transformers, ``[B, T] → [B, T − 1]``."""
    model = (load_model if folder.name == "merged" else load_base)(folder, dtype=dtype).eval()
    logprobs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
    return logprobs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _refusal(error: BaseException) -> str | None:
    """The QALoraError's text inside an error of vLLM's or pydantic's; None if there is none."""
    if isinstance(error, QALoraError):
        return str(error)
    for inner in getattr(error, "errors", list)() or []:
        if isinstance(cause := inner.get("ctx", {}).get("error"), QALoraError):
            return str(cause)
    return _refusal(error.__cause__) if error.__cause__ else None
