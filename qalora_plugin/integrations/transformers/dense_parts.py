"""What transformers does to a model around its packed linears while loading, and what it must not do."""

from typing import TYPE_CHECKING, Any

import torch

from qalora_plugin.core.errors import QALoraError
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


def refuse_missing(model: "PreTrainedModel", folder: object) -> None:
    """Have the loader of ``model`` stop where the checkpoint lacks a tensor: it would fill it at random (a router, all
    experts of a layer), each rank for itself, and only report it. (The head of a class that is not the checkpoint's,
    for classification say, is new, and transformers says so.)"""
    adjust = model._adjust_missing_and_unexpected_keys
    is_its_own = type(model).__name__ in (model.config.architectures or ())
    expected = "" if is_its_own else f"{model.base_model_prefix}."

    def require_none(loading_info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        adjust(loading_info)  # without what is tied, and what the class expects to be missing
        if missing := sorted(name for name in loading_info.missing_keys if name.startswith(expected)):
            raise QALoraError(
                f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, {missing[0]} first, neither "
                "quantised nor dense: they would be made up at random. Download or copy the checkpoint again; if it is "
                "whole, its config.json is another model's."
            )

    model._adjust_missing_and_unexpected_keys = require_none  # type: ignore[method-assign]  # for one load


def dense_shapes(model: "PreTrainedModel") -> dict[str, torch.Size]:
    """The shape of every dense tensor of a model, by name, but of what is tied to another, as whose the class need not
    make it (Ovis2's head). Call while the model is built."""
    tied = model.all_tied_weights_keys
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def require_shapes(model: "PreTrainedModel", shapes: dict[str, torch.Size], folder: object) -> None:
    """:func:`require_shape` of every dense tensor of a model that is loaded."""
    for name, tensor in model.state_dict().items():
        require_shape(model, name, tensor.shape, shapes.get(name, tensor.shape), folder)


def require_shape(
    model: "PreTrainedModel", name: str, stored: tuple[int, ...], wanted: tuple[int, ...], folder: object
) -> None:
    """Refuse a dense tensor of another shape than the model has: of a quantised model transformers takes any.

    Raises:
        QALoraError: a router of fewer experts, say, would never route to the others.
    """
    if tuple(stored) != tuple(wanted):
        found, expected = ("×".join(map(str, shape)) for shape in (stored, wanted))
        raise QALoraError(
            f"{folder} holds {name} as {found}, but {type(model).__name__} has {expected} by config.json. They do not "
            "belong together: download or copy the checkpoint again."
        )
