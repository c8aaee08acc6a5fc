"""Axolotl's hooks, in the order in which Axolotl calls them. Each is one line or a call.

Nothing but this file knows Axolotl. Imports are inside the hooks: Axolotl swallows an ImportError of a plugin module
and then only says that the adapter is "not registered", so the module itself must import under all circumstances.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin, PluginManager

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.axolotl.args import ADAPTER

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOG = logging.getLogger("axolotl.qalora")
_FOLDERS = ("base_model", "output_dir", "lora_model_dir")


class QALoraPlugin(BasePlugin):
    """``plugins: [qalora_plugin.QALoraPlugin]`` with ``adapter: qalora``."""

    def __init__(self) -> None:
        super().__init__()
        self._samples: list[list[int]] = []

    def register(self, cfg: dict) -> None:
        """First look at the raw YAML: refuse bad keys or a bad base before datasets are prepared."""
        if cfg.get("adapter") != ADAPTER:
            return
        try:
            from qalora_plugin.conversion import merging
            from qalora_plugin.integrations.axolotl import preflight
            from qalora_plugin.integrations.peft import loading
        except ImportError as error:  # as an ImportError it would be swallowed
            raise QALoraError(
                f"qalora_plugin cannot be imported: {error}. Install the package into this environment: pip install ."
            ) from error
        del loading, merging
        if cfg.get("merge_lora"):
            cfg["merge_method"] = "legacy"  # the only path of `axolotl merge-lora` that asks the model itself
        for key in _FOLDERS:
            if str(cfg.get(key)).startswith("~"):  # Axolotl would make a folder of that name
                cfg[key] = os.path.expanduser(cfg[key])
        preflight.check_axolotl(cfg, self._other_adapters(cfg))
        cfg.pop("gptq", None)  # has Axolotl hand the base to optimum, which needs no telling that it is ours
        if overrides := preflight.overrides_of_config(cfg["base_model"], cfg.get("revision_of_model")):
            cfg["overrides_of_model_config"] = overrides | (cfg.get("overrides_of_model_config") or {})

    def _other_adapters(self, cfg: dict) -> dict[str, list[str]]:
        """Plugins of this config that bring adapters of their own, with these adapters' names."""
        others = {
            name: [adapter.name for adapter in plugin.get_adapter_capabilities()]
            for name, plugin in PluginManager.get_instance().plugins.items()
            if name in cfg.get("plugins", ()) and not isinstance(plugin, QALoraPlugin)
        }
        return {name: adapters for name, adapters in others.items() if adapters}

    def get_input_args(self) -> str:
        return "qalora_plugin.QALoraArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook that only ``preprocess`` and ``train`` call; loading stays with Axolotl."""
        if cfg.adapter == ADAPTER:
            from qalora_plugin.integrations.axolotl.preflight import check_merge_dir, check_start

            check_start(cfg)
            if not preprocess:
                check_merge_dir(cfg)

    def load_adapter(
        self, model: "PreTrainedModel", cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple | None:
        if cfg.adapter != ADAPTER:
            return None
        from axolotl.loaders.adapter import _build_peft_lora_config  # maps every lora_* and peft_* key
        from peft import get_peft_model

        from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
        from qalora_plugin.integrations.peft.binding import bind_config
        from qalora_plugin.integrations.peft.loading import load_adapter
        from qalora_plugin.integrations.peft.ranks import require_one_adapter, require_one_base

        quantizer: Any = model.hf_quantizer
        require_one_base(quantizer.base_fingerprint())
        autocast = cfg.peft_autocast_adapter_dtype
        dtype = {} if autocast is None else {"autocast_adapter_dtype": autocast}
        if cfg.lora_model_dir and not config_only:
            peft_model: Any = load_adapter(model, cfg.lora_model_dir, is_trainable=not inference, **dtype)
            config = peft_model.peft_config["default"]
            require_one_adapter(config, AdapterFolder.open(cfg.lora_model_dir).digest())
        else:
            wanted = _build_peft_lora_config(model, cfg)
            if cfg.lora_target_linear and not cfg.lora_target_modules:
                wanted.target_modules = "all-linear"  # Axolotl takes every class with Linear in its name for one
            config = bind_config(model, wanted, cfg.qalora.scales, cfg.qalora.scales_lr_ratio)
            config.shared_a = cfg.qalora.shared_a
            require_one_adapter(config)
            if config_only:
                return None, config
            peft_model = get_peft_model(model, config, **dtype)
            if cfg.qalora.init and not inference:
                from qalora_plugin.integrations.axolotl.calibrated_start import start_calibrated

                start_calibrated(peft_model, cfg)
        peft_model.print_trainable_parameters()
        if cfg.merge_lora:
            peft_model.merge_and_unload = lambda **_: _MergedOnSave(peft_model, cfg)
        return peft_model, config

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Without an accelerator, say so: the Trainer then allows ``bf16``, which Axolotl has no key for on a CPU."""
        import torch

        return {} if cfg.adapter != ADAPTER or torch.accelerator.is_available() else {"use_cpu": True}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Say once what training runs on, and keep a few token sequences for the verification after the merge."""
        if cfg.adapter != ADAPTER:
            return
        from qalora_plugin.integrations.transformers.averaged_weights import AveragedWeights
        from qalora_plugin.layers.summary import training_dtype, training_summary

        for line in training_summary(
            trainer.model, training_dtype(trainer.model, trainer.args.bf16, trainer.args.fp16)
        ):
            LOG.info("qalora: %s", line)
        trainer.add_callback(AveragedWeights())
        if cfg.rl:
            # TRL wraps the base in the adapter itself, and Axolotl then saves both: let the base save the adapter.
            trainer.model.get_base_model().save_pretrained = trainer.model.save_pretrained
        if cfg.qalora.merge and cfg.qalora.verify:
            from qalora_plugin.eval.tokens import sample_dataset

            self._samples = sample_dataset(trainer.eval_dataset or trainer.train_dataset, cfg.qalora.verify_tokens)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Called before the adapter is saved (and after it, too)."""
        if cfg.adapter == ADAPTER and cfg.fsdp_config:
            from qalora_plugin.integrations.peft.sharded_checkpoints import remove_checkpointing

            remove_checkpointing(model)

    def post_train_unload(self, cfg: Any) -> None:
        """After the adapter is saved and the model gone; called once, where ``post_train`` is called twice."""
        if cfg.adapter == ADAPTER and cfg.qalora.merge and int(os.environ.get("RANK", "0")) == 0:
            from qalora_plugin.integrations.axolotl.preflight import merge_dir

            merged = _merge(cfg, cfg.output_dir, merge_dir(cfg))
            if cfg.qalora.verify:
                from qalora_plugin.eval.proof import prove

                prove(
                    cfg.base_model,
                    cfg.output_dir,
                    merged,
                    sequences=self._samples or None,
                    max_tokens=cfg.qalora.verify_tokens,
                    revision=cfg.revision_of_model,
                )


class _MergedOnSave:
    """What ``merge_and_unload`` gives to ``axolotl merge-lora``: saving it merges checkpoint to checkpoint."""

    def __init__(self, model: "PeftModel", cfg: Any):
        self.config, self.generation_config, self._cfg = model.config, model.generation_config, cfg

    def to(self, *args: Any, **kwargs: Any) -> "_MergedOnSave":
        """The merged tensors keep the base's dtypes."""
        return self

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        if self._cfg.qalora.merge_dir:
            LOG.warning("qalora.merge_dir is where training merges; axolotl merge-lora always writes %s", folder)
        _merge(self._cfg, self._cfg.lora_model_dir, folder)


def _merge(cfg: Any, adapter: str, out: str | Path) -> Path:
    from qalora_plugin.conversion.merging import is_merge_of, merge

    options = cfg.qalora
    if is_merge_of(out, cfg.base_model, adapter, options.offset_dtype, cfg.revision_of_model):
        LOG.info("%s is already the merge of this adapter into this base: nothing to do", out)
        return Path(out)
    result = merge(
        cfg.base_model, adapter, out, options.offset_dtype, copy=options.copy_base, revision=cfg.revision_of_model
    )
    LOG.info("merged into %s: %d linears, %.1f MB new", result.folder, result.modules, result.new_bytes / 1e6)
    return result.folder
