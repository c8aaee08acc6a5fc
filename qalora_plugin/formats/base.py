"""What a format of quantized checkpoints is: how to find its weights, read them and write them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.tensors import TensorInfo
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight

if TYPE_CHECKING:
    from torch import Tensor

Headers = Mapping[str, TensorInfo]


class Unsupported(QALoraError):
    """A format cannot hold this weight; the message says why, and what to use instead."""

    def __init__(self, reason: str, alternatives: str):
        super().__init__(f"{reason} {alternatives}")
        self.reason, self.alternatives = reason, alternatives


def refuse_changed_activations(quantization: Mapping[str, Any], where: object, otherwise: str) -> None:
    """Refuse a checkpoint whose weights are for inputs that are rotated, or quantized: nothing here does that to them.

    Args:
        otherwise: what to do instead.

    Raises:
        Unsupported: by GPTQModel's ``rotation``, or AutoRound's ``rotation_config`` or ``act_bits``.
    """
    for key in ("rotation", "rotation_config"):
        if quantization.get(key):
            raise Unsupported(f"{where} rotates activations ({key} {short(quantization[key])}).", otherwise)
    bits = quantization.get("act_bits")
    if bits is not None and not (isinstance(bits, int) and bits >= 16):
        raise Unsupported(f"{where} quantizes activations (act_bits {short(bits)}).", otherwise)


class CheckpointFormat(Protocol):
    """One way to store quantized linears in safetensors files; an instance knows the ``quantization_config`` it reads.

    Attributes:
        method: ``quant_method`` of the format.
        reading: what the config adds to the tensors' meaning; part of a base's fingerprint.
    """

    method: str
    reading: str

    @classmethod
    def detect(cls, quantization: dict[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        """Every quantized linear by name, in checkpoint order, from headers alone.

        Args:
            where: the folder, for messages.

        Raises:
            QALoraError: none, tensors missing, of wrong shapes, or at odds with the config.
        """

    def parts(self, spec: GroupwiseSpec) -> tuple[str, ...]:
        """What is stored of one linear, its bias included: the last parts of the tensors' names."""

    def read(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> GroupwiseWeight:
        """One weight. ``load`` gives a tensor of the checkpoint by its name."""

    def write(self, name: str, weight: GroupwiseWeight, g_idx: bool = True) -> "dict[str, Tensor]":
        """The tensors of one linear but its bias, by their names on disk.

        Args:
            g_idx: store the group of every column, where the format has a place for it, even if they are in order.

        Raises:
            Unsupported: the format cannot hold it.
        """

    def check_values(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray], where: object) -> None:
        """Refuse NaN, Inf, and an act-order index that is none. Reads 1/g of the weight."""

    def is_symmetric(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
        """Whether every zero-point is 2^(b−1): read off the zeros, since configs are known to be wrong about it."""
