"""PEFT's LoRA on packed linears is our adapter: ``get_peft_model(load_base(…), LoraConfig(…))``, and so TRL's
``SFTTrainer(load_base(…), peft_config=LoraConfig(…))``, train what :func:`.adapter.add_adapter` would.

Importing this puts :class:`QALoraModel` where PEFT looks up what a LoRA is; the loader of packed models imports it.
Every other model gets PEFT's own.
"""

from copy import copy
from typing import Any, cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import hotswap
from torch import nn
from transformers import PreTrainedModel

from qalora_plugin.checkpoint.adapter_config import is_bound
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer, require_adapters, require_bound
from qalora_plugin.integrations.peft.binding import aim, bind_config
from qalora_plugin.integrations.peft.experts import QALoraExpertsLayer
from qalora_plugin.integrations.peft.hotswapping import require_one_kind, swap
from qalora_plugin.integrations.peft.sharded import make_shardable
from qalora_plugin.integrations.transformers.launched import is_to_be_sharded
from qalora_plugin.layers.linear import QuantLinear


class QALoraModel(LoraModel):
    """A ``LoraModel`` that ties a new adapter on packed linears to their base."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        is_first = not any(isinstance(module, QALoraLayer) for module in model.modules())
        if layers:
            config = self.peft_config[adapter_name]
            if is_first and not (isinstance(config, QALoraConfig) and is_bound(config.qalora)):
                config = self._prepare_adapter_config(copy(config), self.get_model_config(model))  # default targets
                self.peft_config[adapter_name] = bind_config(cast(PreTrainedModel, model), config)
            elif not is_first:  # PEFT makes an empty one of "all-linear" here, for no linear of torch's is left
                bound = require_bound(adapter_name, config, any(layer.base_fingerprint for layer in layers.values()))
                if bound.linears is None and not bound.inference_mode and hasattr(model, "hf_quantizer"):  # a new one
                    aim(cast(PreTrainedModel, model), bound)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if layers and is_first:
            config = self.peft_config[adapter_name]
            require_adapters(model, {name for name in layers if check_target_module_exists(config, name)})
        if isinstance(config := self.peft_config[adapter_name], QALoraConfig):
            adapted = (module for module in model.modules() if isinstance(module, QALoraLayer))
            config.linears = sum(adapter_name in layer.lora_A for layer in adapted)
        if layers and is_to_be_sharded():
            make_shardable(cast(PreTrainedModel, model))
        # DDP broadcasts every buffer at every forward, but the packed weights never change. It looks for this on what
        # it wraps, the PeftModel, which asks here.
        self._ddp_params_and_buffers_to_ignore = [
            f"base_model.{name}.{buffer}"
            for name, module in self.named_modules()
            if isinstance(module, QuantLinear)
            for buffer, _ in module.named_buffers()
        ]

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """PEFT's, which knows A and B alone, of linears."""
        together = "Activate the adapters together instead (set_adapter of their names)"
        self._require_no_scales(adapters, f"the sum. {together}")
        layers = [module for module in self.modules() if isinstance(module, QALoraLayer)]
        if layers and "svd" in combination_type:
            raise QALoraError(
                f"combination_type {combination_type!r} takes dense changes apart, and adapters of packed layers make "
                "none. Choose 'cat', which is exact, or 'linear'."
            )
        if combination_type == "cat" and any(isinstance(layer, QALoraExpertsLayer) for layer in layers):
            raise QALoraError(f"combination_type 'cat' would join experts, not their ranks. {together}.")
        if layers:
            self._require_one_strength_and_place(adapters, together)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, *args, **kwargs)

    def _require_one_strength_and_place(self, adapters: list[str], together: str) -> None:
        """Of the first adapter PEFT takes over what the sum's strength and place are, weights apart."""
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if scaled := next((name for name, one in zip(adapters, configs, strict=True) if one.use_rslora), None):
            raise QALoraError(
                f"adapter {scaled!r} has use_rslora, and PEFT would make the sum √rank times as strong. {together}."
            )
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            found = {str(getattr(one, field, None)) for one in configs}
            if len(found) > 1:
                raise QALoraError(
                    f"the adapters differ in {field} ({', '.join(sorted(found))}), and PEFT would leave out of the sum "
                    f"what one of them has. {together}."
                )

    def subtract_mutated_init(self, output_state_dict: dict, adapter_name: str, kwargs: Any = None) -> dict:
        """PEFT's, which knows A and B alone: of ``save_pretrained(…, path_initial_model_for_weight_conversion=…)``."""
        self._require_no_scales(list(self.peft_config), "the conversion. Save it without")
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)

    def _require_no_scales(self, adapters: list[str], out_of: str) -> None:
        for name in adapters:
            if (getattr(self.peft_config[name], "qalora", None) or {}).get("scales"):
                raise QALoraError(f"adapter {name!r} has trained scales, which PEFT would leave out of {out_of}.")


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QALoraModel
hotswap.check_hotswap_configs_compatible = require_one_kind
hotswap.hotswap_adapter_from_state_dict = swap
