"""The YAML keys. Axolotl mixes :class:`QALoraArgs` into its own config model, so its validator sees every key."""

import difflib
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qalora_plugin.checkpoint.adapter_config import check_wishes
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_axolotl_keys
from qalora_plugin.integrations.axolotl.sharding import WRAPPED_BY_TRL, check_fsdp

ADAPTER = "qalora"

_REQUIRED = ("base_model", "lora_r", "lora_alpha")
_STRINGS = ("base_model", "revision_of_model", "lora_model_dir", "output_dir", "rl")  # read before Axolotl checks them
_NAMES = ("plugins", "lora_target_modules", "lora_exclude_modules")


class QALoraBlock(BaseModel):
    """The ``qalora:`` block. The group size is not here: it is the base's."""

    model_config = ConfigDict(extra="forbid")

    merge: bool = Field(default=True, description="Merge into an INT4 checkpoint at the end of training.")
    merge_dir: str | None = Field(
        default=None, description="Where the merged checkpoint goes; default: `merged` inside output_dir."
    )
    offset_dtype: Literal["float16", "float32"] | None = Field(
        default=None,
        description="How the merged offsets are stored: float16 (exact to 0.03 % of the adapter) or float32; default: "
        "float16, and float32 where the base has offsets already, or the adapter is too small for float16.",
    )
    copy_base: bool = Field(
        default=False, description="Copy the base's shards into the merged checkpoint even where a hard link would do."
    )
    shared_a: bool = Field(
        default=False, description="One A for all experts of a mixture-of-experts layer, instead of one each."
    )
    verify: bool = Field(
        default=True, description="After merging, compare base + adapter with the merged checkpoint and report."
    )
    scales: bool | None = Field(
        default=None,
        description="Train step sizes, too: scales ⊙ (1 + D·C), of the adapter's rank. More accurate, above all at 2 "
        "and 3 bits, and an eighth slower. Merges as exactly. Default: false, and with lora_model_dir what that "
        "adapter has.",
    )
    scales_lr_ratio: float | None = Field(
        default=None,
        description="How many times as fast scales learn as a LoRA would, with every optimizer; default 1. (Offsets "
        "learn three times as fast beside them.)",
    )
    init: Literal["calibrated"] | None = Field(
        default=None,
        description="What a new adapter starts from: calibrated, with values that bring base + adapter as close to the "
        "16-bit model as its rank allows, on calibration text; default: at zero. Needs init_model and init_dataset.",
    )
    init_model: str | None = Field(
        default=None, description="Folder or Hub id of the 16-bit model that the base was quantized from."
    )
    init_dataset: str | None = Field(
        default=None, description="Calibration text: a .txt or .jsonl file, or a dataset id of the Hub."
    )
    init_samples: int | None = Field(
        default=None, gt=0, description="How many sequences of 512 tokens of it to calibrate on; default 128."
    )
    verify_tokens: int = Field(default=2048, ge=2, description="How many tokens of real data that comparison uses.")

    @field_validator("scales_lr_ratio", "init_samples", "verify_tokens", mode="before")
    @classmethod
    def a_number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 1 or 0
            raise ValueError("expected a number")
        return value

    @model_validator(mode="after")
    def ratio_of_something(self) -> "QALoraBlock":
        check_wishes({"scales": self.scales, "scales_lr_ratio": self.scales_lr_ratio}, "qalora:")
        return self

    @model_validator(mode="after")
    def whole_init(self) -> "QALoraBlock":
        inputs = {"init_model": self.init_model, "init_dataset": self.init_dataset}
        missing = [key for key, value in inputs.items() if not value]
        if self.init and missing:
            raise QALoraError(
                f"qalora.init is {self.init}, but {' and '.join(missing)} is missing: it needs the 16-bit model that "
                "the base was quantized from, and text to calibrate on. Set both, or remove init."
            )
        given = [key for key in (*inputs, "init_samples") if getattr(self, key) is not None]
        if given and not self.init:
            raise QALoraError(f"qalora.{given[0]} is set, but init is not. Set init: calibrated, or remove {given[0]}.")
        return self

    @model_validator(mode="before")
    @classmethod
    def name_the_nearest_key(cls, data: Any) -> Any:
        known = ", ".join(cls.model_fields)
        if not isinstance(data, dict):
            raise QALoraError(
                f"qalora: is {short(data)}, expected a block of keys ({known}), or nothing. Write `adapter: qalora` to "
                "switch QA-LoRA on."
            )
        for key in map(str, data):
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise QALoraError(f"unknown key {key!r} in qalora:.{hint} Known keys: {known}.")
        return data


def read_block(value: Any) -> QALoraBlock:
    """The ``qalora:`` block of a raw config.

    Raises:
        QALoraError: no block, an unknown key, or a value of the wrong kind.
    """
    try:
        return QALoraBlock.model_validate({} if value is None else value)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), QALoraError):
            raise cause from None
        raise QALoraError(
            f"qalora.{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}. Correct it, or leave it "
            "out."
        ) from None


class QALoraArgs(BaseModel):
    """What the plugin adds to Axolotl's config."""

    qalora: QALoraBlock | None = Field(default=None, description="Options of `adapter: qalora`.")
    lora_exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Linears that get no adapter, as names or a pattern. Axolotl 0.19 reads this key but drops it from "
        "the YAML unless a plugin declares it.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_qalora(cls, data: Any) -> Any:
        if data.get("adapter") != ADAPTER:
            if data.get("qalora"):
                raise QALoraError(
                    f"there is a qalora: block, but adapter is {data.get('adapter')!r}. Set `adapter: qalora`."
                )
            return data
        refuse_unmergeable(data)
        if data.get("qalora") is None:
            data["qalora"] = {}
        return data


def refuse_unmergeable(cfg: dict) -> None:
    """Refuse keys that would train something a merge cannot hold, values out of range, and missing keys.

    Raises:
        QALoraError: names the key, why it is refused, and what to do.
    """
    _check_types(cfg)
    refuse_axolotl_keys(cfg)
    check_fsdp(cfg)
    if cfg.get("lora_model_dir") and cfg.get("rl") in WRAPPED_BY_TRL and not cfg.get("merge_lora"):
        raise QALoraError(
            f"rl: {cfg['rl']} with lora_model_dir: Axolotl starts a new adapter there and ignores the given one. "
            "Remove lora_model_dir, and train on the base alone."
        )
    missing = [key for key in _REQUIRED if cfg.get(key) is None]
    if missing and not cfg.get("lora_model_dir"):
        raise QALoraError(f"adapter: qalora needs {', '.join(missing)}. Set them as for a LoRA.")
    _check_ranges(cfg)
    if not (cfg.get("lora_target_linear") or cfg.get("lora_target_modules") or cfg.get("lora_model_dir")):
        raise QALoraError("adapter: qalora needs lora_target_linear: true or a list of lora_target_modules.")


def _check_types(cfg: dict) -> None:
    """Of keys that are looked at before Axolotl validates them."""
    if not cfg.get("base_model"):
        raise QALoraError("adapter: qalora needs base_model. Set it as for a LoRA.")
    for key in _STRINGS:
        if not isinstance(cfg.get(key), str | None):
            raise QALoraError(f"{key} is {short(cfg[key])}, expected a string. Correct it.")
    for key in _NAMES:
        found = cfg.get(key)
        if found is None or (isinstance(found, str) and key != "plugins"):
            continue
        if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
            raise QALoraError(f"{key} is {short(found)}, expected a list of names. Correct it.")


def _check_ranges(cfg: dict) -> None:
    """Numbers that Axolotl takes and PEFT refuses much later, if at all. (Other types are Axolotl's to refuse.)"""
    for key, is_good, expected in (
        ("lora_r", lambda value: value > 0, "a whole number above 0, as 16"),
        ("lora_alpha", lambda value: value > 0, "a number above 0, as 32"),
        ("lora_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1, as 0.05 or 0"),
    ):
        value = cfg.get(key)
        if isinstance(value, int | float) and (isinstance(value, bool) or value == math.inf or not is_good(value)):
            raise QALoraError(f"{key} is {short(value)}, expected {expected}. Correct it.")
