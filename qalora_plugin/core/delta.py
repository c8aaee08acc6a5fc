"""What an adapter adds to a weight, and the one place where its factors are multiplied.

offsets[γ,n] += α/R·(B·A)ᵀ                     A [R, G], B [N, R]   (QA-LoRA, arXiv 2309.14717, eq. 4)

Where step sizes train, too, both changes are in units of them, which differ between layers by orders of magnitude:

offsets[γ,n] += scales[γ,n]·α/R·(B·A)ᵀ
scales[γ,n]  *= 1 + (D·C)[γ,n]                 D [G, R], C [R, N]
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class OffsetDelta(NamedTuple):
    """A pooled low-rank adapter on one linear.

    Attributes:
        lora_a: ``[R, G]``. lora_b: ``[N, R]``. scaling: α/R.
    """

    lora_a: "Tensor"
    lora_b: "Tensor"
    scaling: float

    def materialize(self, offsets: "Tensor | None" = None) -> "Tensor":
        """``offsets + scaling·(B·A)ᵀ`` ``[G, N]``, float32 or better, in one product."""
        import torch

        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        a, b = self.lora_a.to(dtype).t(), self.lora_b.to(dtype).t()
        if offsets is None:
            return scaled_product(a, b, self.scaling)
        return torch.addmm(offsets.to(dtype), a, b, alpha=self.scaling)

    def gradients(self, gradient: "Tensor") -> "tuple[Tensor, Tensor]":
        """dA ``[R, G]`` and dB ``[N, R]`` of the gradient of the offsets, ``[G, N]``."""
        a, b = self.lora_a.to(gradient.dtype), self.lora_b.to(gradient.dtype)
        return scaled_product(b.t(), gradient.t(), self.scaling), scaled_product(gradient.t(), a.t(), self.scaling)


class ScaleDelta(NamedTuple):
    """A low-rank change of the step sizes of one linear, in parts of what they are.

    Attributes:
        d: ``[*E, G, R]``. c: ``[*E, R, N]``; with an axis of experts in front where weights are stacked.
        every: their gradient is taken from one token in so many, and stands for that of all; 1 where nothing trains,
            for a forward pass draws which ones.
    """

    d: "Tensor"
    c: "Tensor"
    every: int = 1

    def materialize(self, scales: "Tensor") -> "Tensor":
        """``scales ⊙ (1 + D·C)`` ``[*E, G, N]``, float32 or better."""
        import torch

        dtype = torch.promote_types(self.d.dtype, torch.float32)
        return (self.d.to(dtype) @ self.c.to(dtype) + 1) * scales  # the product as it is: checkpointing may hold it

    def gradients(self, gradient: "Tensor") -> "tuple[Tensor, Tensor]":
        """dD ``[*E, G, R]`` and dC ``[*E, R, N]`` of the gradient of ``D·C``, ``[*E, G, N]``."""
        d, c = self.d.to(gradient.dtype), self.c.to(gradient.dtype)
        return gradient @ c.mT, d.mT @ gradient


def factored_offsets(a: "Tensor", b: "Tensor") -> "Tensor":
    """``a·b`` ``[*E, G, N]``, float32: the offsets of a checkpoint that keeps them as factors, ``[*E, G, r]`` and
    ``[*E, r, N]``."""
    import torch

    if a.is_meta:  # which autocast does not know
        return a.float() @ b.float()
    with torch.autocast(a.device.type, enabled=False):  # which would multiply in 16 bits
        return a.float() @ b.float()


def scaled_product(a: "Tensor", b: "Tensor", scaling: float) -> "Tensor":
    """``scaling·(a·b)`` in one kernel."""
    import torch

    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scaling)  # beta = 0: what is added is not even read
