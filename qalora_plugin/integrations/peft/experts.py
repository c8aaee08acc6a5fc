"""The adapter on packed experts: one A and B for each, held by PEFT as two stacked parameters a projection.

They are saved as ``…experts.gate_proj.lora_A.weight`` ``[E, R, G]`` and ``lora_B.weight`` ``[E, N, R]``.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer
from qalora_plugin.kernels import grouped
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.layers.experts import QuantExpertLinear, routed, unstacked
from qalora_plugin.layers.sharding import StackedFactors, factor

if TYPE_CHECKING:
    from qalora_plugin.kernels.triton.grouped import Tiles


class QALoraExpertsLayer(QALoraLayer):
    """:class:`QALoraLayer` over a :class:`~qalora_plugin.layers.experts.QuantExpertLinear`: A ``[E, R, G]`` (``[R, G]``
    with ``shared_a``), B ``[E, N, R]``."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        assert isinstance(config, QALoraConfig)  # the layer it extends refuses others
        one_a, one_b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        initial_a, initial_b = [], []
        base = cast(QuantExpertLinear, self.get_base_layer())
        for _ in range(base.experts):  # each as PEFT initializes one
            if config.init_lora_weights is False:
                one_a.reset_parameters()
                one_b.reset_parameters()
            else:
                self.reset_lora_parameters(adapter_name, config.init_lora_weights)
            initial_a.append(one_a.weight.detach().clone())
            initial_b.append(one_b.weight.detach().clone())
        shared = config.shared_a
        self.lora_A[adapter_name] = StackedFactors(initial_a[0] if shared else torch.stack(initial_a))
        self.lora_B[adapter_name] = StackedFactors(torch.stack(initial_b))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # what requires a gradient

    def forward(self, x: Tensor, rows: "list[int] | Tiles") -> Tensor:
        """``[S, K] → [S, N]``, as :meth:`QuantExpertLinear.forward` takes them."""
        base = cast(QuantExpertLinear, self.get_base_layer())
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        deltas = [
            OffsetDelta(factor(self.lora_A[name]), factor(self.lora_B[name]), self.scaling[name]) for name in active
        ]
        if not active:
            return base(x, rows)
        if len(active) == 1 and not self._drops(active[0]):
            return base(x, rows, deltas[0])
        y = base(x, rows)
        for name, delta in zip(active, deltas, strict=True):
            dropped = self.lora_dropout[name](x)
            if not isinstance(rows, list):
                y = y + grouped.adapter(dropped, base.stacked(), rows, delta).to(y.dtype)
                continue
            by_expert, parts = list(unstacked(delta)), []
            for i, part in routed(dropped, rows):
                lora_a, lora_b, _ = by_expert[i]
                pooled = pool(part, base.expert(i)).to(lora_a.dtype)
                parts.append(nn.functional.linear(nn.functional.linear(pooled, lora_a), lora_b))
            if parts:
                y = y + (torch.cat(parts) * delta.scaling).to(y.dtype)
        return y
