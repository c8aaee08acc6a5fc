"""``fsdp_config`` and ``deepspeed`` of an Axolotl config: what would share nothing out, or destroy packed words."""

import os
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.json_files import read_json, short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_deepspeed, refuse_optimizer_of_fsdp2

WRAPPED_BY_TRL = ("dpo", "ipo", "kto")  # Axolotl 0.19, loaders/model.py: hands TRL a config, not an adapter
_DTYPES = ("bf16", "fp16")


def loaded_for(cfg: dict[str, Any]) -> str | None:
    """The dtype that Axolotl 0.19 loads the base in (``resolve_dtype``), as ``bf16``, ``fp16`` or ``fp32``; None where
    the machine decides: ``bf16`` is ``auto``, or not given, which is the same."""
    bf16, fp16 = cfg.get("bf16", "auto"), cfg.get("fp16")
    if cfg.get("bfloat16") or (bf16 and bf16 != "auto"):
        return "bf16"
    if bf16 == "auto":
        return "fp16" if fp16 else None
    return "fp16" if fp16 or cfg.get("float16") else "fp32"


def check_fsdp(cfg: dict[str, Any]) -> None:
    """FSDP2 alone, and in the dtype that packed weights are seen in; the rest of ``fsdp_config`` is Axolotl's to check.

    Raises:
        QALoraError: names the key, why it is refused, and what to do.
    """
    fsdp = cfg.get("fsdp_config")
    if not cfg.get("merge_lora"):
        _refuse_launchers_engine(cfg)
    if not fsdp:
        if cfg.get("fsdp_version") and not cfg.get("merge_lora"):  # a merge by Axolotl's command drops the block alone
            raise QALoraError(
                f"fsdp_version is {short(cfg['fsdp_version'])}, but there is no fsdp_config, without which Axolotl "
                "shares nothing out: every rank would hold the whole base. Add fsdp_config (docs/sharding.md), or "
                "remove fsdp_version."
            )
        return
    if not isinstance(fsdp, dict):
        raise QALoraError(f"fsdp_config is {short(fsdp)}, expected a block of keys. Correct it (docs/sharding.md).")
    if cfg.get("deepspeed"):
        raise QALoraError(
            f"both fsdp_config and deepspeed ({short(cfg['deepspeed'])}) are set, but one of them alone shares out a "
            "model. Remove one."
        )
    if cfg.get("rl") in WRAPPED_BY_TRL:
        raise QALoraError(
            f"rl: {cfg['rl']} cannot be combined with fsdp_config: Axolotl would save the adapter by names that are "
            "not an adapter's, and the merge would fail after training. Use DeepSpeed instead (deepspeed: zero3.json)."
        )
    versions = (cfg.get("fsdp_version"), fsdp.get("fsdp_version"), fsdp.get("version"))  # where Axolotl looks, in order
    version = next((found for found in versions if found), 1)
    if str(version) != "2":
        raise QALoraError(
            f"fsdp_config is for FSDP{version} (fsdp_version: {cfg.get('fsdp_version')}), which flattens what "
            "trains together with what does not, and saves where the merge goes. Set fsdp_version: 2."
        )
    if "SIZE_BASED_WRAP" in (fsdp.get("auto_wrap_policy"), fsdp.get("fsdp_auto_wrap_policy")):
        raise QALoraError(
            "fsdp_config.auto_wrap_policy is SIZE_BASED_WRAP, which would also wrap the containers that PEFT keeps an "
            "adapter in, and FSDP2 cannot. Set TRANSFORMER_BASED_WRAP and transformer_layer_cls_to_wrap."
        )
    refuse_optimizer_of_fsdp2(str(cfg.get("optimizer")), "optimizer")
    policy = fsdp.get("mixed_precision_policy") or fsdp.get("fsdp_mixed_precision_policy")
    if policy and (dtype := loaded_for(cfg)) not in (None, policy):
        raise QALoraError(
            f"fsdp_config.mixed_precision_policy is {policy}, but the base is loaded for {dtype}: FSDP would cast the "
            f"packed weights. Remove mixed_precision_policy, or set it to {dtype}."
        )


def _refuse_launchers_engine(cfg: dict[str, Any]) -> None:
    """An engine that accelerate's launcher, or its default config, asks for alone: Axolotl trains with it, and then
    looks for its settings to save by. (It sets these variables itself, from its config.)"""
    for engine, key in (("FSDP", "fsdp_config"), ("DEEPSPEED", "deepspeed")):
        variable = f"ACCELERATE_USE_{engine}"
        if os.environ.get(variable, "").lower() in ("1", "true") and not cfg.get(key):
            raise QALoraError(
                f"accelerate's launcher, or its default config, asks for {engine} ({variable} is set), but there is no "
                f"{key}, without which Axolotl cannot save the adapter. Add {key} (docs/sharding.md), or launch "
                "without it: by torchrun, or accelerate launch --multi_gpu."
            )


def check_deepspeed(cfg: dict[str, Any]) -> None:
    """What of a DeepSpeed config would quantize, cast or split packed words.

    Raises:
        QALoraError: names the key, why it is refused, and what to do; or the file cannot be read.
    """
    given = cfg.get("deepspeed")
    if not given:
        return
    if isinstance(given, str) and not Path(given).is_file():
        raise QALoraError(f"deepspeed: there is no file {given}. Give the path of a DeepSpeed config (zero3.json).")
    settings = read_json(Path(given)) if isinstance(given, str) else given
    if not isinstance(settings, dict):
        raise QALoraError(f"deepspeed is {short(given)}, expected the path of a DeepSpeed config. Correct it.")
    where = given if isinstance(given, str) else "deepspeed"
    refuse_deepspeed(settings, where)
    for dtype in _DTYPES:
        block = settings.get(dtype)
        if isinstance(block, dict) and block.get("enabled") is True and loaded_for(cfg) not in (None, dtype):
            raise QALoraError(
                f"{where}: {dtype}.enabled is true, but the base is loaded for {loaded_for(cfg)}: DeepSpeed would cast "
                f'the packed weights. Set it to "auto", or set {dtype}: true beside it.'
            )
