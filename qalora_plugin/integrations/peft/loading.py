"""New adapters on a loaded base, and saved ones."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, require_adapters
from qalora_plugin.integrations.peft.binding import bind_config, require_new_base, require_own_embeddings

logger = logging.getLogger(__name__)


def add_adapter(
    model: PreTrainedModel,
    config: LoraConfig | None = None,
    scales: bool | None = None,
    scales_lr_ratio: float | None = None,
    **lora_kwargs: Any,
) -> PeftModel:
    """Wrap a model loaded by :func:`load_base` with a trainable pooled adapter.

    Args:
        model: from :func:`load_base`.
        config: a ``LoraConfig`` (or :class:`QALoraConfig`); or pass its fields as ``lora_kwargs``
            (``r``, ``lora_alpha``, ``target_modules="all-linear"`` …).
        scales: train step sizes beside the offsets, ``scales ⊙ (1 + D·C)``; an eighth more to compute, and
            more accurate. (To a trainer of TRL: ``peft_config=QALoraConfig(qalora={"scales": True}, …)``.)
        scales_lr_ratio: how many times as fast scales then learn as a LoRA would; default 1.

    Raises:
        QALoraError: an option that cannot be merged, or targets that are not quantised.
    """
    if config is not None and lora_kwargs:
        raise QALoraError(f"add_adapter was given a config, and {', '.join(lora_kwargs)}. Put these into the config.")
    config = config or QALoraConfig(**{"task_type": "CAUSAL_LM", **lora_kwargs})
    _warn_of_upcasting(model)
    bound = bind_config(model, config, scales, scales_lr_ratio)
    return cast(PeftModel, get_peft_model(model, bound))  # not a mixed one


def _warn_of_upcasting(model: PreTrainedModel) -> None:
    """PEFT's ``prepare_model_for_kbit_training`` knows no base of ours, and makes float32 of all that is not packed."""
    loaded, embeddings = getattr(model.config, "dtype", None), model.get_input_embeddings()
    found = getattr(getattr(embeddings, "weight", None), "dtype", None)
    if found == torch.float32 and loaded in (torch.bfloat16, torch.float16):
        logger.warning(
            "the model was loaded in %s and its embeddings are float32 now, so that it computes in float32 where no "
            "autocast is on. Leave prepare_model_for_kbit_training out: packed linears need nothing of it (for "
            "checkpointing: gradient_checkpointing=True).",
            str(loaded).removeprefix("torch."),
        )


def load_adapter(model: PreTrainedModel, folder: str | Path, is_trainable: bool = False, **kwargs: Any) -> PeftModel:
    """Put a saved adapter on a model loaded by :func:`load_base`.

    Raises:
        QALoraError: no adapter of ours, or one of another base.
    """
    adapter = AdapterFolder.open(Path(folder, kwargs.get("subfolder") or ""))
    require_new_base(model)
    quantizer: Any = model.hf_quantizer
    found = quantizer.base_fingerprint(adapter.base_fingerprint)
    adapter.require_base(found, str(quantizer.checkpoint.folder))
    if is_trainable:
        require_own_embeddings(model, quantizer.checkpoint)
    wanted = set(adapter.keys.values())
    if missing := sorted(wanted - set(quantizer.names)):
        raise QALoraError(
            f"the adapter {folder} was trained on a {adapter.model_class or 'model of another class'}, whose "
            f"{missing[0]} this {type(model).__name__} does not have. Load the base as that class."
        )
    peft_model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, **kwargs)
    require_adapters(peft_model.get_base_model(), wanted)
    return peft_model
