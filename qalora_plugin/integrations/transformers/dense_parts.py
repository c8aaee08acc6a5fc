"""What transformers does to a model around its packed linears while loading, and what it must not do."""

from typing import TYPE_CHECKING, Any

import torch

from qalora_plugin.layers.linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense_dtypes(model: "PreTrainedModel") -> dict[str, torch.dtype]:
    """The float dtype that every dense tensor of a model on the meta device is to be loaded in, by name.

    Call while the model is built, when torch's default dtype is the one that the model was asked for in.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(torch.get_default_dtype())  # layers that a class keeps in float32
    kept, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
    dtypes = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            match = kept.search(name) if kept else None
            dtypes[name] = plan[by_group[match.lastgroup or ""]] if match else tensor.dtype
    return dtypes


def restore_dtypes(model: "PreTrainedModel", dtypes: dict[str, torch.dtype]) -> None:
    """Cast dense tensors to ``dtypes``: transformers leaves what it renames in a quantised model in the file's."""
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            wanted = dtypes.get(f"{prefix}.{name}" if prefix else name)
            if tensor is not None and wanted and tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)


def add_stand_in(linear: QuantLinear) -> None:
    """A ``weight`` without memory, for parents that initialise their linears' (``init.zeros_(self.out_proj.weight)``).

    Flagged as loaded, it is left alone; the parent's own missing tensors, masks above all, are still made.
    """
    stand_in: Any = torch.empty(linear.out_features, linear.in_features, device="meta")
    stand_in._is_hf_initialized = True
    linear.weight = stand_in


def remove_stand_in(linear: QuantLinear) -> None:
    del linear.weight
