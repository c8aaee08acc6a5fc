"""The ``quantization_config`` of a GPTQ folder, as GPTQModel, transformers and vLLM read it.

They take bits and group size from it, not from the tensors, and every linear for quantized that it does not exclude.
``dynamic`` says both, by patterns matched from the start of a module's name: ``+:`` other settings, ``-:`` left dense.
(GPTQModel ``quantization/config.py``, ``dynamic_get``.) vLLM asks by its own names of the layers that it fuses.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.fusion import served_names
from qalora_plugin.formats.provenance import provenance


def gptq_config(
    files: Checkpoint,
    specs: Mapping[str, GroupwiseSpec],
    checkpoint_format: str,
    symmetric: bool,
    act_order: bool = False,
) -> dict[str, Any]:
    """``quantization_config`` of these linears.

    Args:
        files: what they are made of, for the modules that stay dense, and who quantized it.
        specs: bits and groups as they will be.
    """
    kinds = {name: (spec.bits, -1 if spec.groups == 1 else spec.group_size) for name, spec in specs.items()}
    (bits, group_size), _ = Counter(kinds.values()).most_common(1)[0]
    special: dict[tuple[int, int], list[str]] = {}
    for name, kind in kinds.items():
        if kind != (bits, group_size) and (kind[0] != bits or specs[name].group_size != group_size):
            special.setdefault(kind, []).append(name)
    dynamic = patterns(special, specs, _dense_linears(files, specs))
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": checkpoint_format,
        "lm_head": any(name.split(".")[-1] == "lm_head" for name in specs),
        **({"dynamic": dynamic} if dynamic else {}),
        **provenance(files.quantization),
    }


def patterns(
    special: Mapping[tuple[int, int], list[str]], quantized: Iterable[str], dense: Iterable[str]
) -> dict[str, dict[str, int]]:
    """``dynamic``.

    Args:
        special: linears by bits and group size, where these are not the usual ones. quantized: all that are.
        dense: linears that are not.
    """
    quantized, dense = set(quantized), list(dense)
    everything = {*quantized, *served_names(quantized), *dense, *served_names(dense)}
    found: dict[str, dict[str, int]] = {}
    for (bits, group_size), names in special.items():
        names = [*names, *served_names(names)]
        settings = {"bits": bits, "group_size": group_size}
        found |= {f"+:{pattern}": settings for pattern in _patterns(names, everything - set(names))}
    dense = [*dense, *served_names(dense)]
    return found | {f"-:{pattern}": {} for pattern in _patterns(dense, everything - set(dense))}


def _dense_linears(files: Checkpoint, specs: Mapping[str, GroupwiseSpec]) -> list[str]:
    """Modules with a dense matrix, but for the embeddings and the head, which readers do not quantize unasked."""
    rows = files.config.get("vocab_size")
    return [
        name.removesuffix(".weight")
        for name, info in files.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.shape[0] != rows
        and name.removesuffix(".weight") not in specs
    ]  # fmt: skip


def _patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Patterns that match all ``names`` and none of ``others``; one for all layers where that is so."""
    others, patterns = list(others), []
    for name in names:
        general = _general(name)
        exact = re.escape(name) + "$"
        patterns.append(exact if any(re.match(general, other) for other in others) else general)
    return list(dict.fromkeys(patterns))


def _general(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")) + "$"
