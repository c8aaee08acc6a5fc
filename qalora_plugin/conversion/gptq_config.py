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
    usual = usual_of(kinds)  # of which a linear of one group may be, too
    kinds = {
        name: usual if (specs[name].bits, specs[name].group_size) == usual else kind for name, kind in kinds.items()
    }
    return {
        "quant_method": "gptq",
        **settings_of(kinds, _dense_linears(files, specs)),
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": checkpoint_format,
        "lm_head": any(name.split(".")[-1] == "lm_head" for name in specs),
        **provenance(files.quantization),
    }


def usual_of(kinds: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The bits and group size of most linears."""
    return Counter(kinds.values()).most_common(1)[0][0]


def settings_of(kinds: Mapping[str, tuple[int, int]], dense: Iterable[str] = ()) -> dict[str, Any]:
    """``bits`` and ``group_size`` of most linears, and ``dynamic`` of the others, where there are any.

    Args:
        kinds: bits and group size by the names of the quantized linears. dense: the other linears.
    """
    usual, names = usual_of(kinds), dict[tuple[int, int], list[str]]()
    for name, kind in kinds.items():
        names.setdefault(kind, []).append(name)
    dense = list(dense)
    dense += served_names(dense)
    everything = {*kinds, *served_names(kinds), *dense}
    dynamic: dict[str, dict[str, int]] = {}
    for (bits, group_size), found in names.items():
        if (bits, group_size) != usual:
            found = [*found, *served_names(found)]
            settings = {"bits": bits, "group_size": group_size}
            dynamic |= {f"+:{pattern}": settings for pattern in _patterns(found, everything - set(found))}
    dynamic |= {f"-:{pattern}": {} for pattern in _patterns(dense, everything - set(dense))}
    return {"bits": usual[0], "group_size": usual[1], **({"dynamic": dynamic} if dynamic else {})}


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
