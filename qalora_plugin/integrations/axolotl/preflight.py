"""What Axolotl's config can be checked for before any long work: keys, base, and the place where the merge will go."""

import logging
from pathlib import Path
from typing import Any

import torch

from qalora_plugin.checkpoint import autogptq
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.atomic import require_absent
from qalora_plugin.checkpoint.folder import stated_quantization
from qalora_plugin.checkpoint.hub import expanded, fetch_config, is_hub_id, is_local, resolve
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.module_names import is_expert
from qalora_plugin.checkpoint.places import absolute, is_inside, require_outside, require_writable
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.opened import QuantizedCheckpoint, base_format
from qalora_plugin.integrations.axolotl.args import QALoraBlock, read_block, refuse_unmergeable
from qalora_plugin.integrations.axolotl.calibrated_start import check_init, check_inputs
from qalora_plugin.integrations.axolotl.sharding import check_deepspeed
from qalora_plugin.integrations.axolotl.targets import NARROWING, check_targets, targeted
from qalora_plugin.integrations.peft.target_names import LinearNames
from qalora_plugin.integrations.transformers.loading import config_overrides, trainable
from qalora_plugin.integrations.transformers.outline import outline
from qalora_plugin.integrations.transformers.placing_experts import has_experts
from qalora_plugin.kernels.hardware import emulates

LOG = logging.getLogger("axolotl.qalora")
AXOLOTLS_OUTPUT_DIR = "./model-out"
_EXPERTS_KERNELS = ("expert_backend", "experts_implementation", "use_scattermoe", "use_sonicmoe")
_KEPT = {  # of an adapter that is trained on: by Axolotl's key what its config has
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern", "lora_dropout": "lora_dropout", "peft_use_rslora": "use_rslora",
}  # fmt: skip
_OF_MATRICES = ("muon", "dion")


@os_errors_in_one_line()
def check_axolotl(cfg: dict[str, Any], other_adapters: dict[str, list[str]] | None = None) -> None:
    """Check a raw Axolotl config: the keys, the base, and where things will go.

    Args:
        other_adapters: the other plugins of this config that bring adapters, with the names of these.

    Raises:
        QALoraError: with what was found, what was expected and what to do.
    """
    for plugin, names in (other_adapters or {}).items():
        raise QALoraError(
            f"plugins lists {plugin}, which brings adapter: {', '.join(names)}, but a run has one adapter and this "
            f"config says adapter: qalora. Remove {plugin}."
        )
    options = read_block(cfg.get("qalora"))
    refuse_unmergeable(cfg)
    check_deepspeed(cfg)
    _check_places(cfg, options)
    base = check_base(cfg["base_model"], cfg.get("revision_of_model"))
    modules = None if base is None else base.specs
    in_model = None if base is None else _names_in_model(base)
    if cfg.get("lora_model_dir"):
        adapter = AdapterFolder.open(cfg["lora_model_dir"])
        adapter.check_values()
        _require_same_scales(adapter, options)
        _tell_what_is_kept(cfg, adapter)
        if modules is not None:
            adapter.check_fits(modules)
    elif modules is not None:
        check_targets(cfg, modules, in_model)
    targets = () if modules is None or cfg.get("lora_model_dir") else targeted(cfg, modules, in_model)
    if options.init:
        check_init(cfg, targets)
    if cfg.get("optimizer") in _OF_MATRICES and any(map(is_expert, targets)):
        raise QALoraError(
            f"optimizer: {cfg['optimizer']} takes matrices alone, and the experts of a layer train as stacks of them. "
            "Choose another optimizer (adamw_torch), or exclude the experts (lora_exclude_modules)."
        )
    fused_loss = _fused_loss(cfg)
    if fused_loss and _quantises_head(cfg, modules):
        raise QALoraError(
            f"{fused_loss} multiplies by lm_head's dense weight itself, but {cfg['base_model']} quantises lm_head. "
            f"Set {fused_loss}: false, or use a base whose lm_head is dense (GPTQ's default)."
        )
    for key in _EXPERTS_KERNELS if in_model else ():
        if cfg.get(key):
            LOG.warning("%s has no effect on this base: its experts are packed, and have kernels of their own", key)
    if cfg.get("bf16") is True and not torch.accelerator.is_available() and emulates(torch.bfloat16):
        LOG.warning(
            "bf16: true, but this CPU only emulates bfloat16, up to 75 times slower than float32. Set bf16: false."
        )


def _check_places(cfg: dict[str, Any], options: QALoraBlock) -> None:
    """The run's own folder and the merge's: writable, and neither in the base nor in each other's way."""
    output_dir = absolute(cfg.get("output_dir") or AXOLOTLS_OUTPUT_DIR)
    require_outside(output_dir, cfg["base_model"], "output_dir")
    require_writable(output_dir, "output_dir")
    if options.merge and options.merge_dir:
        merged = absolute(options.merge_dir)
        require_outside(merged, cfg["base_model"], "qalora.merge_dir")
        require_writable(merged, "qalora.merge_dir")
        if is_inside(output_dir, merged):
            raise QALoraError(
                f"qalora.merge_dir is {merged}, where output_dir ({output_dir}) puts the run's own files, so it would "
                "exist when the merge begins. Leave merge_dir out (it is then `merged` inside output_dir), or choose "
                "a folder elsewhere."
            )


def _require_same_scales(adapter: AdapterFolder, options: QALoraBlock) -> None:
    """An adapter that is trained on keeps what it has."""
    if options.scales is not None and options.scales != adapter.has_scales:
        has = "was trained with scales" if adapter.has_scales else "has no scales"
        raise QALoraError(
            f"qalora.scales is {str(options.scales).lower()}, but lora_model_dir {adapter.folder} {has}. Leave "
            "qalora.scales out, or train a new adapter on the base (without lora_model_dir)."
        )
    ratio = adapter.config["qalora"].get("scales_lr_ratio")
    if options.scales_lr_ratio not in (None, ratio):
        raise QALoraError(
            f"qalora.scales_lr_ratio is {options.scales_lr_ratio:g}, but lora_model_dir {adapter.folder} was trained "
            f"with {ratio:g}, which its numbers are divided by. Leave it out, or train a new adapter on the base "
            "(without lora_model_dir)."
        )


def _tell_what_is_kept(cfg: dict[str, Any], adapter: AdapterFolder) -> None:
    """PEFT takes all that shapes an adapter from its folder, whatever else is asked for."""
    asked = {key: (cfg.get(key), adapter.config.get(name)) for key, name in _KEPT.items()}
    asked["qalora.shared_a"] = ((cfg.get("qalora") or {}).get("shared_a"), bool(adapter.config.get("shared_a")))
    for key, (wanted, kept) in asked.items():
        if wanted is not None and wanted != kept:
            LOG.warning("%s is %s, but lora_model_dir %s keeps its own: %s", key, wanted, adapter.folder, kept)
    if targets := [key for key in ("lora_target_modules", *NARROWING) if cfg.get(key)]:
        LOG.warning(
            "%s: not looked at, for lora_model_dir %s keeps its own %d linears",
            " and ".join(targets),
            adapter.folder,
            len(adapter.modules),
        )


def _fused_loss(cfg: dict[str, Any]) -> str | None:
    """The key of a loss that includes lm_head: Axolotl's Liger, CCE and distillation plugins have one, CCE's is on
    unless said; and TRL has Liger's."""
    plugins = " ".join(cfg.get("plugins") or ())
    block = cfg.get("trl")
    asked = {
        "liger_fused_linear_cross_entropy": ".liger." in plugins and cfg.get("liger_fused_linear_cross_entropy"),
        "cut_cross_entropy": ".cut_cross_entropy." in plugins and cfg.get("cut_cross_entropy", True),
        "kd_trainer": ".kd." in plugins and cfg.get("kd_trainer"),
        "dpo_use_liger_kernel": cfg.get("dpo_use_liger_kernel"),
        "trl.use_liger_loss": isinstance(block, dict) and block.get("use_liger_loss"),
    }
    return next((key for key, value in asked.items() if value), None)


def _quantises_head(cfg: dict[str, Any], modules: dict[str, GroupwiseSpec] | None) -> bool:
    if modules is None:  # a Hub id: only its config is here
        return bool(_hub_quantization(cfg["base_model"], cfg.get("revision_of_model")).get("lm_head"))
    return any(name.split(".")[-1] == "lm_head" for name in modules)


def check_start(cfg: Any) -> None:
    """What a run needs that begins now, and no later command: of a validated config."""

    def targets() -> dict[str, GroupwiseSpec]:
        if is_hub_id(cfg.base_model):
            return {}
        base = QuantizedCheckpoint.open(cfg.base_model)
        return targeted(cfg, base.specs, _names_in_model(base))

    check_inputs(cfg, targets)


def check_merge_dir(cfg: Any) -> None:
    """Before training: refuse to train towards a merge whose place is taken."""
    if cfg.qalora.merge:
        require_absent(
            merge_dir(cfg),
            "It is where this run's merge would go: remove it, set qalora.merge_dir, or set qalora.merge: false.",
        )


def merge_dir(cfg: Any) -> Path:
    """Where the merge at the end of training goes."""
    return absolute(cfg.qalora.merge_dir or Path(cfg.output_dir) / "merged")


def check_base(base: str, revision: str | None = None) -> QuantizedCheckpoint | None:
    """A local base in full (headers, shapes, values); of a Hub id only its config, without its weights.

    Returns:
        None for a Hub id.
    """
    if is_hub_id(base):
        found_there = _hub_quantization(base, revision)
        if base_format(found_there) is None:
            method = found_there.get("quant_method")
            found = f"has quant_method {method!r}" if method else "is dense, or names no quant_method"
            raise QALoraError(
                f"base_model {base} {found}; expected 'gptq'. "
                "Choose a GPTQ checkpoint, or make one: qalora quantize MODEL OUT."
            )
        return None
    source = QuantizedCheckpoint.open(base)
    source.check_values()
    source.check_dense_values()
    if reason := source.why_not_servable():
        LOG.warning("%s: %s", base, reason)
    return source


def _names_in_model(base: QuantizedCheckpoint) -> LinearNames | None:
    """Of a base with quantized experts, which are held against the model by the way; None for others."""
    outlined = outline(base) if has_experts(base) else None
    if outlined is None:
        return None
    model, stored = outlined
    return LinearNames(stored, (name for name, _ in model.named_modules()))


def overrides_of_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """What Axolotl must add to the model's config, as for :func:`qalora_plugin.load_base`.

    Of a Hub id that keeps its quantisation beside the config, the weights' names are needed: it is downloaded, if it
    was not.
    """
    if is_local(base):
        return config_overrides(expanded(base))
    if found := stated_quantization(read_json(fetch_config(base, revision)), base):
        return trainable(found)
    return config_overrides(resolve(base, revision))


def _hub_quantization(base: str, revision: str | None) -> dict[str, Any]:
    """``quantization_config`` of a Hub id, ``{}`` for a dense one."""
    if found := stated_quantization(read_json(fetch_config(base, revision)), base):
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        settings = hf_hub_download(base, autogptq.SETTINGS_NAME, revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return {}
    return autogptq.read_settings(Path(settings))
