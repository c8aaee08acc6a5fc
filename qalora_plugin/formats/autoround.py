"""AutoRound's own checkpoints (``quant_method: auto-round``) whose linears lie in GPTQ's layout.

``packing_format`` says how zero-points are stored: ``auto_round:auto_gptq`` (or ``:gptq``) less 1, as GPTQ v1 does;
``auto_round:gptqmodel``, and ``auto_round`` alone, as they are, like v2. Settings of single linears are in
``extra_config``. (AutoRound ``export/export_to_autoround/export.py``, ``dynamic_import_quant_linear_for_packing``.)
What AutoRound exports as ``gptq`` is plain GPTQ v1, and its ``auto_round:auto_awq`` is AWQ, which is imported.
"""

from typing import Any

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.words import SUPPORTED_BITS
from qalora_plugin.formats.base import Unsupported, refuse_changed_activations
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.gptq_zeros import V1, V2

_OTHERWISE = (
    "Export it from AutoRound with format auto_gptq, or make a GPTQ checkpoint of the original 16-bit model: "
    "qalora quantize MODEL OUT."
)
_PREFIX = "auto_round"


class AutoRound(Gptq):
    """A :class:`~.base.CheckpointFormat`, read only: a merge writes ours, an import writes GPTQ."""

    method = "auto-round"

    def __init__(self, quantization: dict[str, Any], where: object = "quantization_config"):
        """
        Raises:
            Unsupported: activations are quantized or rotated, or the linears are packed in another way.
        """
        refuse_changed_activations(quantization, where, _OTHERWISE)
        if (bits := quantization.get("bits")) not in (None, *SUPPORTED_BITS):
            raise Unsupported(f"{where} has {short(bits)}-bit codes, expected 2, 3, 4 or 8 bits.", _OTHERWISE)
        extra = quantization.get("extra_config")
        super().__init__(
            {**quantization, "dynamic": extra or None, "checkpoint_format": _reading(quantization, where)}, where
        )


def _reading(quantization: dict[str, Any], where: object) -> str:
    packing = quantization.get("packing_format", f"{_PREFIX}:auto_gptq")
    name, _, kind = packing.partition(":") if isinstance(packing, str) else ("", "", "")
    if name == _PREFIX and kind in ("auto_gptq", "gptq"):
        return V1
    if name == _PREFIX and kind in ("", "gptqmodel"):
        return V2
    if name == _PREFIX and "awq" in kind:
        raise Unsupported(
            f"{where} is AutoRound's in AWQ's layout.", "Convert it, no code is changed: qalora import awq SRC OUT."
        )
    raise Unsupported(
        f"{where} is AutoRound's with packing_format {short(packing)}, expected {_PREFIX}:auto_gptq or another of "
        "GPTQ's.",
        _OTHERWISE,
    )
