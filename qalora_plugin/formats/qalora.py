"""Checkpoints of ours: GPTQ's tensors plus ``<module>.offsets`` [G, N], in weight units, and ``<module>.scales_delta``.

    w' = (scales + scales_delta)·(q − zeros) + offsets          the sum of scales in float32

A merge writes one, and so does an import of a format whose groups have float offsets. ``scales_delta`` [G, N] is what
training changed the base's scales by: a difference and no factor, so that of several merges it is simply the sum. A
checkpoint that holds any is of ``format_version`` 2, which older versions refuse; others remain 1.

Without this package transformers would initialise at random what it cannot read, so ``config.json`` names the file of
weights by a key that only we take out again.
"""

from typing import Any

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import Headers
from qalora_plugin.formats.gptq import Gptq

FORMAT_VERSION, SCALES_VERSION = 1, 2
SCALES = ("scales", "scales_delta")  # what those to multiply by are the sum of
MERGED_PARTS = (".offsets", ".scales_delta")  # ends of the names of what a merge writes
OFFSET_DTYPES = ("float16", "float32")
# In config.json: transformers loads the file that this key names, so that without this package it stops at a file that
# is not there.
WEIGHTS_KEY = "transformers_weights"
NEEDS_QALORA = "this-model-needs-the-qalora-package-installed.safetensors"


class QALora(Gptq):
    """A :class:`~.base.CheckpointFormat`."""

    method = "qalora"
    holds_offsets = True

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        version = self.quantization.get("format_version")
        if version not in (FORMAT_VERSION, SCALES_VERSION) or isinstance(version, bool):
            raise QALoraError(
                f"{where}: format_version is {short(version)}, this version of qalora reads {FORMAT_VERSION} and "
                f"{SCALES_VERSION}. Update qalora, or merge again."
            )
        changed = next((name for name in tensors if name.endswith(".scales_delta")), None)
        if (changed is not None) != (version == SCALES_VERSION):
            raise QALoraError(
                f"{where}: format_version is {version}, but it holds {changed or 'no .scales_delta tensor'}; expected "
                f"both in version {SCALES_VERSION}, neither in {FORMAT_VERSION}. Download the folder again, or merge "
                "again."
            )
        return super().specs(tensors, where)


def as_config(config: dict[str, Any], quantization: dict[str, Any], has_scales: bool = False) -> dict[str, Any]:
    """``config.json`` of a checkpoint of ours, from that of the model it is made of.

    Args:
        has_scales: it holds ``scales_delta`` of some linear.
    """
    version = SCALES_VERSION if has_scales else FORMAT_VERSION
    stated = {"quant_method": QALora.method, **quantization, "format_version": version}
    return {**config, "quantization_config": stated, WEIGHTS_KEY: NEEDS_QALORA}


def require_offset_dtype(name: str | None) -> None:
    """Refuse what offsets cannot be stored as; None leaves the choice to the merge."""
    if name not in (None, *OFFSET_DTYPES):
        raise QALoraError(f"offset_dtype is {name!r}, expected one of {', '.join(OFFSET_DTYPES)}.")
