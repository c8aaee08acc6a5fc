"""For the HF Trainer and TRL, without Axolotl: a callback that merges when training ends."""

import logging
from inspect import signature
from pathlib import Path
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainerControl, TrainerState, TrainingArguments

from qalora_plugin.checkpoint.places import absolute, is_inside, require_outside, require_place
from qalora_plugin.conversion.added import merged_spec
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_optimizer_of_fsdp2, refuse_parallelism, refuse_vllm
from qalora_plugin.eval.proof import prove
from qalora_plugin.eval.tokens import sample_dataset
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import AUTO, require_offset_dtype, require_offset_form
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.peft.binding import require_own_embeddings
from qalora_plugin.integrations.peft.ranks import require_one_adapter, require_one_base
from qalora_plugin.integrations.peft.resuming import unwrapped
from qalora_plugin.integrations.peft.sharded import make_shardable, refuse_fsdp1
from qalora_plugin.integrations.peft.sharded_checkpoints import full_adapter
from qalora_plugin.integrations.transformers.averaged_weights import AveragedWeights
from qalora_plugin.integrations.transformers.launched import is_launched_with, is_to_be_sharded
from qalora_plugin.layers.summary import training_dtype, training_summary

logger = logging.getLogger(__name__)


def _require_alone(model: Any) -> None:
    """Refuse to train anything but the adapter that is merged."""
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    if list(active) != ["default"]:
        raise QALoraError(
            f"the active adapter is {', '.join(map(repr, active)) or 'none'}, but what is merged is 'default', which "
            "would not be trained, or not alone. Call model.set_adapter('default'), or save and merge yourself "
            "(qalora_plugin.merge)."
        )


def _require_mergeable(model: Any, config: Any) -> None:
    """Refuse to train what no merge could hold, which PEFT and transformers allow after the adapter was made."""
    if config.modules_to_save:
        raise QALoraError(
            f"the adapter would save {', '.join(config.modules_to_save)} beside itself, and no merge could hold that. "
            "Take the model as add_adapter(load_base(…), …) makes it."
        )
    trained = [name for name, part in model.named_parameters() if part.requires_grad and "lora_" not in name]
    if trained:
        raise QALoraError(
            f"{len(trained)} parameters train beside the adapter ({trained[0]} …), and a merge keeps the base's. "
            "Freeze them: requires_grad_(False)."
        )
    if not is_to_be_sharded() and hasattr(model, "get_base_model"):
        base = model.get_base_model()
        require_own_embeddings(base, base.hf_quantizer.checkpoint)


def _adapted(model: Any) -> set[str]:
    """The adapted linears, by their names on disk."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantizer: Any = base.hf_quantizer
    layers = (name for name, module in base.named_modules() if isinstance(module, QALoraLayer))
    return {quantizer.names[unwrapped(name)] for name in layers}


class QALoraMergeCallback(AveragedWeights):
    """Save adapter and tokenizer to ``args.output_dir`` and merge them into ``out`` at the end of training.

    Args:
        base: the base, as given to ``load_base``.
        out: folder of the merged checkpoint; default ``<output_dir>/merged``. Must not exist.
        verify: then compare base + adapter with the merged checkpoint, on ``verify_tokens`` tokens of the evaluation
            or else training data, report, and write the figures into its card. Loads both models, one after the other,
            beside the trainer's: ``qalora verify`` does the same later.
        merge_kwargs: passed to :func:`qalora_plugin.merge` (``offset_dtype``, ``copy``, ``revision``).
    """

    def __init__(
        self,
        base: str | Path,
        out: str | Path | None = None,
        verify: bool = False,
        verify_tokens: int = 2048,
        **merge_kwargs: Any,
    ):
        signature(merge).bind(base, "adapter", "out", **merge_kwargs)  # a wrong name: now, not after training
        require_offset_dtype(merge_kwargs.get("offset_dtype"))
        require_offset_form(merge_kwargs.get("offsets", AUTO))
        if type(verify_tokens) is not int or verify_tokens < 2:
            raise QALoraError(f"verify_tokens is {verify_tokens!r}, expected a whole number of at least 2. Correct it.")
        self.base, self.out, self.merge_kwargs = base, out, merge_kwargs
        self.verify, self.verify_tokens = verify, verify_tokens

    def _target(self, args: TrainingArguments) -> Path:
        return absolute(self.out or Path(str(args.output_dir)) / "merged")

    def _require_places(self, args: TrainingArguments) -> None:
        output_dir = absolute(str(args.output_dir))
        require_outside(output_dir, self.base, "output_dir")
        target = self._target(args)
        if is_inside(output_dir, target):
            raise QALoraError(
                f"the merge's folder is {target}, where output_dir ({output_dir}) puts the run's own files. Leave "
                "`out` out (it is then `merged` inside output_dir), or choose a folder elsewhere."
            )
        require_place(target, self.base, "the merge's folder")

    def _require_base(self, config: Any, model: Any) -> None:
        trained_on = config.qalora["base_fingerprint"]
        source = QuantizedCheckpoint.open(self.base, self.merge_kwargs.get("revision"))
        if reason := source.why_not_servable():
            logger.warning("%s: %s", self.base, reason)
        if (found := source.fingerprint(trained_on)) != trained_on:
            raise QALoraError(
                f"the trainer's model was loaded from another base: its adapter records {trained_on}, {self.base} is "
                f"{found}. Give QALoraMergeCallback the base (and the revision) that load_base was given."
            )
        form = self.merge_kwargs.get("offsets", AUTO)
        for stored in _adapted(model) & source.specs.keys():
            merged_spec(source.specs[stored], config.r, "float32", form, bool(config.qalora.get("scales")))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Only now is it known everywhere that the Trainer's own arguments ask for FSDP."""
        model = kwargs["model"]
        if args.fsdp and isinstance(args.fsdp_config, dict) and str(args.fsdp_config.get("version", 2)) != "2":
            refuse_fsdp1()
        refuse_vllm(args)
        launched = is_launched_with("ACCELERATE_USE_PARALLELISM_CONFIG")  # then accelerate's own comes from there, too
        refuse_parallelism(args.parallelism_config or (ParallelismConfig() if launched else None))
        if args.fsdp:
            refuse_optimizer_of_fsdp2(str(getattr(args.optim, "value", args.optim)), "optim")
        config: Any = getattr(model, "peft_config", {}).get("default")
        if (bound := getattr(config, "qalora", None)) is not None:
            require_one_base(bound["base_fingerprint"])
            require_one_adapter(config)
        if is_to_be_sharded() and hasattr(model, "get_base_model"):
            make_shardable(model.get_base_model())
            self._say_how(model, args, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse before training what could not be merged after it."""
        model = kwargs["model"]
        config: Any = getattr(model, "peft_config", {}).get("default")
        if getattr(config, "qalora", None) is None:
            if others := [name for name, one in getattr(model, "peft_config", {}).items() if hasattr(one, "qalora")]:
                raise QALoraError(
                    f"the trainer's model has no adapter named default, which is what is merged, but {others[0]!r}. "
                    "Name it default, as add_adapter does."
                )
            raise QALoraError(
                f"the trainer's model ({type(model).__name__}) has no QA-LoRA adapter. "
                "Pass the model that add_adapter(load_base(…)) returns; or, to a trainer of TRL, load_base(…) and "
                "peft_config=LoraConfig(…)."
            )
        _require_alone(model)
        _require_mergeable(model, config)
        require_one_base(config.qalora["base_fingerprint"])
        self._require_places(args)
        self._require_base(config, model)
        if not is_to_be_sharded():  # else it is by now, and was said before
            self._say_how(model, args, state)

    def _say_how(self, model: Any, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            for line in training_summary(model, training_dtype(model, args.bf16, args.fp16)):
                print(f"qalora: {line}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        super().on_train_end(args, state, control, **kwargs)
        # Where ranks share the weights, all of them give their parts.
        whole = {"state_dict": full_adapter(model)} if is_to_be_sharded() else {}
        if state.is_world_process_zero:
            model.save_pretrained(args.output_dir, **whole)
            if (processing := kwargs.get("processing_class")) is not None:
                processing.save_pretrained(args.output_dir)
            merged = merge(self.base, str(args.output_dir), self._target(args), **self.merge_kwargs).folder
            if self.verify:
                prove(
                    self.base,
                    str(args.output_dir),
                    merged,
                    sequences=self._samples(kwargs),
                    max_tokens=self.verify_tokens,
                    revision=self.merge_kwargs.get("revision"),
                )

    def _samples(self, loaders: dict[str, Any]) -> list[list[int]] | None:
        """Token sequences of the run's data; None if it holds no ids, as before TRL's GRPO generates."""
        given = (loaders.get(name) for name in ("eval_dataloader", "train_dataloader"))
        loader = next((one for one in given if one is not None), None)  # streams have no length to be true by
        return sample_dataset(getattr(loader, "dataset", None), self.verify_tokens) or None
