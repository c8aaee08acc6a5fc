"""The pooled adapter: a LoRA whose input is summed over each quantisation group, held and saved by PEFT.

On disk it is a PEFT adapter folder whose ``peft_type`` is ``QALORA``. Stock PEFT does not know that type and refuses it
(``KeyError: 'QALORA'``) instead of loading it as a LoRA, or as its own ``use_qalora``, which pools by ``sum·K/g²`` and
would scale it wrongly. In memory the type is ``LORA``, so everything that PEFT does for LoRA works.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, cast

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qalora_plugin.checkpoint.adapter_config import (
    Ratios,
    check_kinds,
    check_numbers,
    check_pooling,
    check_wishes,
    is_bound,
)
from qalora_plugin.checkpoint.adapter_folder import PEFT_TYPE
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_peft_fields
from qalora_plugin.integrations.peft.conversion import leave_alone
from qalora_plugin.integrations.peft.scales import new_factors, scale_delta, stretched
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.layers.experts import QuantExpertLinear
from qalora_plugin.layers.linear import QuantLinear


@dataclass
class QALoraConfig(LoraConfig):
    """``LoraConfig`` plus what ties an adapter to its base.

    Attributes:
        qalora: ``format_version``, ``pooling`` (``"sum"``), ``group_size`` (None if it differs between layers) and
            ``base_fingerprint``; ``model_class`` that was trained and, where it names its layers other than the
            checkpoint does, ``names``: prefixes in the model → prefixes on disk. Filled by :func:`bind_config`. Given
            by the user, if at all: ``scales`` (train step sizes, too) and ``scales_lr_ratio`` (:mod:`.scales`).
        shared_a: one A for all experts of a mixture-of-experts layer, instead of one each. Saves memory.
        linears: how many modules have the adapter (experts of a layer are one a projection). Filled in.
    """

    qalora: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the adapter was trained on: pooling, group size, base fingerprint."}
    )
    shared_a: bool = field(default=False, metadata={"help": "One A for all experts of a layer, instead of one each."})
    linears: int | None = field(default=None, metadata={"help": "How many modules have the adapter. Filled in."})

    def __post_init__(self) -> None:
        if not isinstance(self.qalora, Mapping | None):
            raise QALoraError(f"qalora is {short(self.qalora)}, expected an object, as {{'scales': True}}. Correct it.")
        if self.qalora is not None:
            self.qalora = dict(self.qalora)  # often another adapter's
            self.use_qalora = False  # set in what is saved, see to_dict
        check_kinds(vars(self), "the adapter's config", "Correct it")
        if self.lora_dropout is None:
            self.lora_dropout = 0.0
        super().__post_init__()
        refuse_peft_fields(self)
        if isinstance(self.r, Integral) and not isinstance(self.r, bool):
            self.r = int(self.r)  # numpy's, too, which no JSON holds
        check_numbers(vars(self), "the adapter's config", "Correct it")
        if self.qalora is not None and not is_bound(self.qalora):
            check_wishes(self.qalora, "this adapter")
        elif self.qalora is not None:
            check_pooling(self.qalora, "this adapter")
        from qalora_plugin.integrations.peft.experts import QALoraExpertsLayer  # a subclass of the layer below

        self._register_custom_module({QuantExpertLinear: QALoraExpertsLayer, QuantLinear: QALoraLayer})

    def to_dict(self) -> dict:
        """As saved: ``peft_type`` is ``QALORA``.

        ``use_qalora`` is for vLLM, which reads no ``peft_type`` and would serve the adapter as a LoRA whose A is
        ``[R, K]``, without an error; that key it refuses.
        """
        return {**super().to_dict(), "peft_type": PEFT_TYPE, "use_qalora": True}


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = QALoraConfig  # type: ignore[index]  # PEFT looks types up as strings
leave_alone(QALoraConfig)


class QALoraLayer(nn.Module, LoraLayer):
    """``y = base(x) + α/R · P(x)·Aᵀ·Bᵀ`` over a :class:`QuantLinear`; A is ``[R, G]``, B ``[N, R]``.

    One active adapter without dropout runs folded into the base's GEMM; otherwise each adapter adds a second path.
    With ``scales`` the base's own are ``scales ⊙ (1 + ΣD·C)`` meanwhile, on every path (dropout is the offsets' alone),
    and offsets are ``scales ⊙ α/R·(B·A)ᵀ``.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_D", "lora_C")
    other_param_names = (*LoraLayer.other_param_names, "ratios")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: QALoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_D, self.lora_C = nn.ModuleDict(), nn.ModuleDict()
        self.ratios: dict[str, Ratios] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    lora_A: Any  # ModuleDicts of linears, which torch types as of any module
    lora_B: Any
    lora_C: Any
    lora_D: Any

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """What A reads is the pooled input: G numbers, not K."""
        linear = cast(QuantLinear, module)
        return linear.groups, linear.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        base = cast(QuantLinear, self.get_base_layer())
        config = require_bound(adapter_name, config, bool(base.base_fingerprint))
        trained_on, fingerprint = ((config.qalora or {}).get(key) for key in ("group_size", "base_fingerprint"))
        if trained_on not in (None, base.group_size):
            raise QALoraError(
                f"the adapter was trained with group size {trained_on}, {kwargs.get('target_name')} of this base has "
                f"{base.group_size}. Load it on the base it was trained on."
            )
        if base.base_fingerprint and base.base_fingerprint(fingerprint) != fingerprint:
            raise QALoraError(
                f"adapter {adapter_name!r} belongs to another base: its config records {fingerprint}, this base is "
                f"{base.base_fingerprint(fingerprint)}. Load it on the base it was trained on; make new ones with "
                "add_adapter."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.ratios[adapter_name] = ratios = Ratios.of(config.qalora or {})
        if config.qalora and config.qalora.get("scales"):
            self.lora_D[adapter_name], self.lora_C[adapter_name] = new_factors(
                base.groups, base.out_features, r, config.init_lora_weights
            )
            for part in "ABCD":
                getattr(self, f"lora_{part}")[adapter_name].weight.data /= ratios.of_factor(part)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., K] → [..., N]``."""
        if kwargs.get("adapter_names") is not None:
            raise QALoraError(
                "adapter_names: one batch runs through one adapter. Choose it with model.set_adapter(name)."
            )
        base = cast(QuantLinear, self.get_base_layer())
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return base(x)
        scales = self._scale_delta(active)
        if len(active) == 1 and not self._drops(active[0]):
            return base(x, self._delta(active[0]), scales)
        y, weight = base(x, None, scales), base.quantized
        for name in active:
            pooled = pool(self.lora_dropout[name](x), weight)
            y = y + beside(pooled, self._delta(name), weight.scales if name in self.lora_D else None).to(y.dtype)
        return y

    def _delta(self, name: str) -> OffsetDelta:
        ratio, scaling = self.ratios[name].offsets, self.scaling[name]
        a, b = stretched(self.lora_A[name], ratio), stretched(self.lora_B[name], ratio)
        if isinstance(scaling, Tensor):  # of PEFT's prepare_model_for_compiled_hotswap
            return OffsetDelta(a, b * scaling.to(b), 1.0)
        return OffsetDelta(a, b, scaling)

    def _scale_delta(self, names: list[str]) -> ScaleDelta | None:
        """What the adapters together make of the scales; PEFT's ``set_scale`` and the like hold for it, too."""
        strengths = {name: self._strength(name) for name in names if name in self.lora_D}
        return scale_delta(self.lora_D, self.lora_C, self.ratios, strengths, self.training)

    def _strength(self, name: str) -> float:
        """1 for an adapter as it was trained, whatever its alpha: even 0, which leaves nothing of its offsets."""
        rank = self.r[name]
        initial = self.lora_alpha[name] / (math.sqrt(rank) if self.use_rslora.get(name) else rank)
        return self.scaling[name] / initial if initial else 1.0

    def _drops(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """In-memory merging would lose the link to the base's files; merging is done checkpoint to checkpoint."""
        raise QALoraError(
            "a QA-LoRA adapter is merged on disk, without loading the model: save it, then call "
            "qalora_plugin.merge(base, adapter, out) or run `qalora merge`."
        )

    def unmerge(self) -> None:
        raise QALoraError("nothing was merged in memory: a QA-LoRA adapter is merged on disk (`qalora merge`).")

    def __repr__(self) -> str:
        return "qalora." + super().__repr__()


def beside(pooled: Tensor, delta: OffsetDelta, unit: Tensor | None) -> Tensor:
    """What an adapter adds where it is not folded into the weight: P(x) ``[..., G]`` → ``[..., N]``.

    Args:
        unit: the scales ``[G, N]`` that it is in units of; None: 1.
    """
    lora_a, lora_b, scaling = delta
    pooled = pooled.to(lora_a.dtype)
    if unit is not None:
        return pooled @ (delta.materialize() * unit).to(pooled.dtype)
    return nn.functional.linear(nn.functional.linear(pooled, lora_a), lora_b) * scaling


def require_bound(name: str, config: Any, has_base: bool = True) -> QALoraConfig:
    """Refuse an adapter beside the first whose config does not name the base. ``has_base``: it comes from files."""
    if not isinstance(config, QALoraConfig) or (has_base and not is_bound(config.qalora)):
        raise QALoraError(
            f"adapter {name!r} has a {type(config).__name__} that says nothing of its base. Give it the first one's: "
            'QALoraConfig(..., qalora=model.peft_config["default"].qalora).'
        )
    return config


def require_adapters(model: nn.Module, wanted: set[str]) -> None:
    """Refuse a base model whose adapter is not on exactly the linears ``wanted``, by their names in it."""
    found = {name for name, module in model.named_modules() if isinstance(module, QALoraLayer)}
    if different := sorted(found ^ wanted):
        raise QALoraError(
            f"PEFT put the adapter on {len(found)} linears, expected {len(wanted)}; {different[0]} differs. This "
            "version of PEFT changes which layers an adapter is for: use one that is listed in the README."
        )
