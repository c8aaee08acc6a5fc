"""The adapter on packed experts: one A and B for each, held by PEFT as two stacked parameters a projection.

They are saved as ``…experts.gate_proj.lora_A.weight`` ``[E, R, G]`` and ``lora_B.weight`` ``[E, N, R]``; where scales
train, too, ``lora_D.weight`` ``[E, G, R]`` and ``lora_C.weight`` ``[E, R, N]``.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer, beside
from qalora_plugin.integrations.peft.scales import new_factors
from qalora_plugin.kernels import grouped
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.layers.experts import QuantExpertLinear, routed, unstacked
from qalora_plugin.layers.sharding import StackedFactors

if TYPE_CHECKING:
    from qalora_plugin.kernels.triton.grouped import Tiles


class QALoraExpertsLayer(QALoraLayer):
    """:class:`QALoraLayer` over a :class:`~qalora_plugin.layers.experts.QuantExpertLinear`: A ``[E, R, G]`` (``[R, G]``
    with ``shared_a``), B ``[E, N, R]``."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        assert isinstance(config, QALoraConfig)  # the layer it extends refuses others
        held = {part: getattr(self, f"lora_{part}") for part in "ABDC" if adapter_name in getattr(self, f"lora_{part}")}
        ratios, init = self.ratios[adapter_name], config.init_lora_weights
        base = cast(QuantExpertLinear, self.get_base_layer())
        initial: dict[str, list[Tensor]] = {part: [] for part in held}
        for _ in range(base.experts):  # each as PEFT initializes one
            if init is False:
                held["A"][adapter_name].reset_parameters()
                held["B"][adapter_name].reset_parameters()
            else:
                self.reset_lora_parameters(adapter_name, init)
            if "D" in held:
                held["D"][adapter_name], held["C"][adapter_name] = new_factors(base.groups, base.out_features, r, init)
            for part, of_adapters in held.items():
                initial[part].append(of_adapters[adapter_name].weight.detach() / ratios.of_factor(part))
        for part, of_adapters in held.items():
            one_for_all = part == "A" and config.shared_a
            stacked = initial[part][0] if one_for_all else torch.stack(initial[part])
            of_adapters[adapter_name] = StackedFactors(stacked)
        if "D" in held:
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # what requires a gradient

    @property
    def one_by_one(self) -> bool:
        """Whether experts have to run one after another: their scales change, and groups are not columns in order."""
        changes = not self.disable_adapters and any(name in self.lora_D for name in self.active_adapters)
        return changes and not cast(QuantExpertLinear, self.get_base_layer()).has_whole_groups

    def forward(self, x: Tensor, rows: "list[int] | Tiles") -> Tensor:
        """``[S, K] → [S, N]``, as :meth:`QuantExpertLinear.forward` takes them."""
        base = cast(QuantExpertLinear, self.get_base_layer())
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return base(x, rows)
        scales = self._scale_delta(active)
        if len(active) == 1 and not self._drops(active[0]):
            return base(x, rows, self._delta(active[0]), scales)
        y = base(x, rows, None, scales)
        for name in active:
            dropped, delta = self.lora_dropout[name](x), self._delta(name)
            if isinstance(rows, list):
                parts = list(self._added(dropped, rows, delta, in_steps=name in self.lora_D))
                added = torch.cat(parts) if parts else torch.zeros_like(y)
            else:
                added = grouped.adapter(dropped, base.held()[0], rows, delta, in_steps=name in self.lora_D)
            y = y + added.to(y.dtype)
        return y

    def _added(self, x: Tensor, rows: list[int], delta: OffsetDelta, in_steps: bool) -> Iterator[Tensor]:
        """What an adapter adds by itself, expert by expert; ``in_steps``: its offsets are in units of the scales."""
        base, by_expert = cast(QuantExpertLinear, self.get_base_layer()), list(unstacked(delta))
        for i, part in routed(x, rows):
            weight = base.expert(i)
            yield beside(pool(part, weight), by_expert[i], weight.scales if in_steps else None)
