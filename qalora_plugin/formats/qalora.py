"""Checkpoints of ours: GPTQ's tensors plus offsets, in weight units, and ``<module>.scales_delta``.

    w' = (scales + scales_delta)·(q − zeros) + offsets          the sum of scales in float32

A merge writes one, and so does an import of a format whose groups have float offsets. Offsets are stored in one of two
forms, of each linear the smaller one:

    <module>.offsets [G, N]                                       dense, float16 or float32
    <module>.offsets_a [G, r], <module>.offsets_b [r, N]          factored: offsets = offsets_a·offsets_b

``offsets_a`` is float32, and its columns are orthogonal; ``offsets_b``, the larger one, has the dtype that was asked
for. Of several merges r is the sum of their ranks. ``scales_delta`` [G, N] is what training changed the base's scales
by: a difference and no factor, so that of several merges it is simply the sum.

``format_version`` is 3 where offsets are factored, else 2 where scales are changed, else 1; versions of this package
that do not know one refuse it. Without this package transformers would initialise at random what it cannot read, so
``config.json`` names the file of weights by a key that only we take out again.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.delta import factored_offsets
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.base import Headers
from qalora_plugin.formats.gptq import FLOATS, MERGED, Gptq

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION, SCALES_VERSION, FACTORED_VERSION = 1, 2, 3
SCALES = ("scales", "scales_delta")  # what those to multiply by are the sum of
FACTORS = ("offsets_a", "offsets_b")  # what offsets are the product of, where they are factored
OFFSETS = ("offsets", *FACTORS)
MERGED_PARTS = tuple(f".{part}" for part in MERGED)  # ends of the names of what a merge writes
OFFSET_DTYPES = ("float16", "float32")
AUTO, FACTORED, _ = OFFSET_FORMS = ("auto", "factored", "dense")
# In config.json: transformers loads the file that this key names, so that without this package it stops at a file that
# is not there.
WEIGHTS_KEY = "transformers_weights"
NEEDS_QALORA = "this-model-needs-the-qalora-package-installed.safetensors"
_NEEDED = {SCALES_VERSION: ".scales_delta", FACTORED_VERSION: ".offsets_a"}
_LARGEST = float(np.finfo(np.float32).max)


class QALora(Gptq):
    """A :class:`~.base.CheckpointFormat`."""

    method = "qalora"
    holds_offsets = True

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        version = self.quantization.get("format_version")
        if version not in (FORMAT_VERSION, SCALES_VERSION, FACTORED_VERSION) or isinstance(version, bool):
            raise QALoraError(
                f"{where}: format_version is {short(version)}, this version of qalora reads {FORMAT_VERSION}, "
                f"{SCALES_VERSION} and {FACTORED_VERSION}. Update qalora, or merge again."
            )
        needed, example = _version_of(tensors)
        if needed != version:
            raise QALoraError(
                f"{where}: format_version is {version}, but it holds {example or f'no {_NEEDED[version]} tensor'}; "
                f"expected factored offsets in version {FACTORED_VERSION} alone, changed scales in {SCALES_VERSION} or "
                f"{FACTORED_VERSION}. Download the folder again, or merge again."
            )
        return super().specs(tensors, where)

    def parts(self, spec: GroupwiseSpec) -> tuple[str, ...]:
        if not spec.offset_rank:
            return super().parts(spec)
        return (*super().parts(replace(spec, offset_dtype=None)), *FACTORS)

    def read(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> GroupwiseWeight:
        if not spec.offset_rank:
            return super().read(spec, load)
        offsets = factored_offsets(*(load(f"{spec.name}.{part}") for part in FACTORS))
        return super().read(replace(spec, offset_dtype=None), load)._replace(offsets=offsets)

    def check_values(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray], where: object) -> None:
        super().check_values(spec, load, where)
        if spec.offset_rank:
            a, b = (float(np.abs(load(f"{spec.name}.{part}")).max()) for part in FACTORS)
            if spec.offset_rank * a * b > _LARGEST:
                raise QALoraError(
                    f"{where}: the product of {spec.name}.offsets_a and .offsets_b exceeds what float32 can hold. They "
                    "are not what a merge writes: merge or download the checkpoint again."
                )

    def _spec(self, tensors: Headers, name: str, where: object) -> GroupwiseSpec:
        spec = super()._spec(tensors, name, where)
        a, b = (tensors.get(f"{name}.{part}") for part in FACTORS)
        if a is None and b is None:
            return spec

        def fail(problem: str) -> QALoraError:
            return QALoraError(f"{where}: {name}: {problem} Download the folder again, or merge again.")

        if a is None or b is None:
            there, lacking = FACTORS if b is None else reversed(FACTORS)
            raise fail(f"{there} is there, but {lacking} is missing: offsets are the product of both.")
        if spec.offset_dtype is not None:
            raise fail("it has offsets as well as their factors offsets_a and offsets_b; expected one of the two.")
        if a.dtype != "F32" or b.dtype not in FLOATS:
            raise fail(f"offsets_a is {a.dtype} and offsets_b {b.dtype}, expected float32 and a float type.")
        rank = a.shape[1] if len(a.shape) == 2 else 0
        if not rank or a.shape != (spec.groups, rank) or b.shape != (rank, spec.out_features):
            raise fail(
                f"offsets_a has shape {a.shape} and offsets_b {b.shape}, expected ({spec.groups}, r) and "
                f"(r, {spec.out_features})."
            )
        return replace(spec, offset_dtype=FLOATS[b.dtype], offset_rank=rank)


def as_config(config: dict[str, Any], quantization: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint of ours, from that of the model it is made of.

    Args:
        names: of its tensors.
    """
    stated = {"quant_method": QALora.method, **quantization, "format_version": _version_of(names)[0]}
    return {**config, "quantization_config": stated, WEIGHTS_KEY: NEEDS_QALORA}


def _version_of(names: Iterable[str]) -> tuple[int, str]:
    """The ``format_version`` that these tensors need, and the name of one that needs it."""
    needed = {FORMAT_VERSION: ""}
    for name in names:
        if name.endswith(".scales_delta"):
            needed.setdefault(SCALES_VERSION, name)
        elif name.endswith((".offsets_a", ".offsets_b")):
            needed.setdefault(FACTORED_VERSION, name)
    return max(needed.items())


def require_offset_form(form: object) -> None:
    """Refuse a form of offsets that there is not."""
    if form not in OFFSET_FORMS:
        raise QALoraError(f"offsets is {form!r}, expected one of {', '.join(OFFSET_FORMS)}.")


def require_offset_dtype(name: str | None) -> None:
    """Refuse what offsets cannot be stored as; None leaves the choice to the merge."""
    if name not in (None, *OFFSET_DTYPES):
        raise QALoraError(f"offset_dtype is {name!r}, expected one of {', '.join(OFFSET_DTYPES)}.")
