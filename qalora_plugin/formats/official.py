"""QA-LoRA's own repository (github.com/yuhuixu1993/qa-lora): its adapters, and what its ``merge.py`` writes.

**Adapters** pool by ``AvgPool1d(group_size)``, the mean over p columns, so the sum times 1/p (``peft_utils.py``). p is
a constant of that file, 32, stored nowhere: A's columns tell it. ``merge.py`` scales by a constant 16/64 of its own,
whatever was trained; α/R of the config is what was.

**Merged checkpoints** are AutoGPTQ's, v0.3, with ``qzeros`` unpacked to floats ``[G, N]`` (else ``merge.py`` cannot
run): ``qzeros -= (B·A)ᵀ·16/64/group_size/scales``. What the floats mean is said nowhere and depends on how they were
unpacked, so it has to be told from the weights (:func:`tell_reading`):

    zeros         w = s·(q − z)        the paper; a forward that adds nothing
    zeros − 1     w = s·(q − z − 1)    unpacked as AutoGPTQ packs them, its forward adds 1
    minima        w = s·q + z          github.com/xxw11/AutoGPTQ_QALoRA, the fork that its maintainers point to
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.tensors import all_finite
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.core.words import SUPPORTED_BITS
from qalora_plugin.formats.base import Headers
from qalora_plugin.formats.gptq import Gptq, is_act_order
from qalora_plugin.formats.gptq_zeros import V2
from qalora_plugin.formats.lora_folder import PooledLora

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ZEROS, ZEROS_MINUS_1, MINIMA = READINGS = ("zeros", "zeros − 1", "minima")
_FLOATS = ("F16", "BF16", "F32")
_NEAR, _CLEAR = 0.25, 0.5  # steps: how near the right reading must come (or a tenth of the next), how much nearer it is


def _check(config: dict, path: Path) -> None:
    if config.get("use_qalora"):
        raise QALoraError(f"{path}: use_qalora is set: this is PEFT's own pooling. Use qalora import peft.")


OFFICIAL = PooledLora(
    name="the official repository",
    factor=lambda in_features, pooled: 1 / pooled,
    check=_check,
    pooled=lambda config: None,
)


class OfficialMerge:
    """Reads a merged checkpoint. (Nothing writes this format, so it is no ``CheckpointFormat``.)

    Attributes:
        specs: the quantized linears by name. Bits are the config's: unlike with packed zeros no shape tells them.
    """

    def __init__(self, quantization: dict[str, Any], tensors: Headers, where: object):
        """
        Raises:
            QALoraError: ``qzeros`` are packed or missing, bits are not given, shapes are at odds.
        """
        bits = quantization.get("bits")
        if bits not in SUPPORTED_BITS or isinstance(bits, bool):
            raise QALoraError(
                f"{where}: bits in its quantisation config is {short(bits)}, expected one of {SUPPORTED_BITS}: nothing "
                "else tells how the codes are packed. Copy the base's quantize_config.json there."
            )
        self._packed = Gptq(quantization | {"checkpoint_format": V2}, where)
        self.specs = self._packed.specs(_as_if_packed(tensors, bits, where), where)

    def check_values(self, load: "Callable[[str], np.ndarray]", where: object) -> None:
        """Refuse NaN and Inf, and columns out of order: the repository pools neighbours, so no merge has them."""
        for spec in self.specs.values():
            self._packed.check_values(spec, load, where)
            if not all_finite(load(f"{spec.name}.qzeros")):
                raise QALoraError(
                    f"{where}: {spec.name}.qzeros holds NaN or Inf, as packed words do that were cast to float16. "
                    "Unpack them, and merge again."
                )
            if is_act_order(spec, load):
                raise QALoraError(
                    f"{where}: {spec.name} is in act-order, but the official repository pools neighbouring columns: "
                    "such a merge is none. Quantise without act-order and train again."
                )

    def read(
        self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]", reading: str, zeros: "Tensor | None" = None
    ) -> GroupwiseWeight:
        """One weight: codes and scales as stored, offsets in float32.

        ``s·(q − zeros) + offsets`` is the stored weight but for the rounding of ``offsets``, 6e-8 of them.

        Args:
            zeros: the base's, uint8 ``[G, N]``; default: the nearest that b bits hold.
        """
        import torch

        weight = self._packed.read(spec, self._without_zeros(spec, load))
        scales, floats = weight.scales.double(), load(f"{spec.name}.qzeros").double()
        shift = {ZEROS: -scales * floats, ZEROS_MINUS_1: -scales * (floats + 1), MINIMA: floats}[reading]
        if zeros is None:
            exact = torch.where(scales == 0, 0, -shift / scales)
            zeros = exact.round().clamp(0, 2**spec.bits - 1).to(torch.uint8)
        return weight._replace(zeros=zeros, offsets=(shift + scales * zeros).float())

    def distances(
        self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]", zeros: "Tensor | None" = None
    ) -> dict[str, float]:
        """How far each reading puts the mean weight of a linear from 0, or from the base's, in steps.

        Trained weights average 0 to a small part of a step, and an adapter moves that by less; a wrong reading is off
        by one step, or by half the range of the codes.

        Args:
            zeros: the base's, uint8 ``[G, N]``, which decide where they are known.
        """
        import torch

        from qalora_plugin.core.packing import unpack_rows

        scales, floats = load(f"{spec.name}.scales").double(), load(f"{spec.name}.qzeros").double()
        if zeros is None:
            codes = unpack_rows(load(f"{spec.name}.qweight"), spec.bits)
            sums = codes.view(spec.groups, spec.group_size, -1).sum(1, dtype=torch.int32)
            middle = sums.double() / spec.group_size
        else:
            middle = zeros.double()
        steps = torch.where(scales == 0, 0, floats / scales)
        means = {ZEROS: middle - floats, ZEROS_MINUS_1: middle - floats - 1, MINIMA: middle + steps}
        return {reading: float(mean.mean()) for reading, mean in means.items()}

    def _without_zeros(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> "Callable[[str], Tensor]":
        import torch

        zeros = torch.zeros(spec.groups, spec.out_features * spec.bits // 32, dtype=torch.int32)
        return lambda name: zeros if name == f"{spec.name}.qzeros" else load(name)


def tell_reading(distances: Iterable[dict[str, float]], where: object) -> str:
    """What the float ``qzeros`` of a checkpoint mean, by the :meth:`OfficialMerge.distances` of some of its linears.

    Raises:
        QALoraError: no reading fits, or more than one.
    """
    found = list(distances)
    mean = {reading: abs(sum(one[reading] for one in found) / len(found)) for reading in READINGS}
    best, second = sorted(READINGS, key=mean.__getitem__)[:2]
    if not (mean[best] <= max(_NEAR, mean[second] / 10) and mean[second] >= mean[best] + _CLEAR):
        listed = ", ".join(f"{mean[reading]:.2f} steps if they are {reading}" for reading in READINGS)
        raise QALoraError(
            f"{where}: what its float qzeros mean cannot be told: the mean weight is off by {listed}. Pass the GPTQ "
            "base that it was merged from: --base BASE."
        )
    return best


def _as_if_packed(tensors: Headers, bits: int, where: object) -> Headers:
    """Headers as a GPTQ checkpoint would have them, so that its own checks can run."""
    headers = dict(tensors)
    for name, info in tensors.items():
        if not name.endswith(".qzeros"):
            continue
        scales = tensors.get(f"{name.removesuffix('.qzeros')}.scales")
        if info.dtype not in _FLOATS or scales is None or info.shape != scales.shape or len(info.shape) != 2:
            raise QALoraError(
                f"{where}: {name} is {info.dtype} {info.shape}, expected floats of the shape of scales "
                f"({scales and scales.shape}), as merge.py writes them. An ordinary GPTQ checkpoint needs no import."
            )
        groups, out_features = info.shape
        headers[name] = replace(info, dtype="I32", shape=(groups, out_features * bits // 32))
    return headers
