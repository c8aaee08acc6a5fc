"""``adapter_config.json`` of an adapter: what it must say, and what a merge could not read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.patterns import check_patterns, matching_pattern
from qalora_plugin.core.errors import QALoraError

ADAPTER_FORMAT, SCALES_FORMAT = 1, 2  # the second with trained scales
WISHES = ("scales", "scales_lr_ratio")  # of `qalora` in the config, what users may ask for
_BINDS = {"format_version", "pooling", "group_size", "base_fingerprint", "model_class", "names"}
OFFSETS_LR_RATIO, SCALES_LR_RATIO = 3.0, 1.0  # where both train; the second is settable
_LARGEST_RATIO = 1e6
POOLING = "sum"
_LARGEST_ALPHA = 1e9


class Ratios(NamedTuple):
    """How many times as fast as a LoRA's the factors of the offsets (A, B) and of the scales (D, C) learn.

    What is stored of each is divided by its ratio.
    """

    offsets: float
    scales: float

    @classmethod
    def of(cls, qalora: dict[str, Any]) -> "Ratios":
        """Of an adapter's ``qalora``; without trained scales nothing is divided. Older ones name one ratio for all."""
        if not qalora.get("scales"):
            return cls(1.0, 1.0)
        scales = float(qalora["scales_lr_ratio"])
        return cls(float(qalora.get("offsets_lr_ratio", scales)), scales)

    def of_factor(self, part: str) -> float:
        """part: ``"A"``, ``"B"``, ``"C"`` or ``"D"``."""
        return self.offsets if part in "AB" else self.scales


def is_bound(qalora: Any) -> bool:
    """Whether ``QALoraConfig.qalora`` ties the adapter to a base, and is not only what the user asks for."""
    return bool(qalora) and not set(qalora).isdisjoint(_BINDS)


def check_pooling(qalora: dict, what: str) -> None:
    """Refuse an adapter that this version would scale wrongly."""
    if not qalora:
        raise QALoraError(f"{what} does not say how it pools (its config has no `qalora`). Save it again with qalora.")
    version = qalora.get("format_version")
    if version not in (ADAPTER_FORMAT, SCALES_FORMAT) or isinstance(version, bool):
        raise QALoraError(
            f"{what} has format_version {short(version)}, this version of qalora reads "
            f"{ADAPTER_FORMAT} and {SCALES_FORMAT}. Update qalora, or train it with this version."
        )
    check_wishes(qalora, what)
    check_ratio(qalora.get("offsets_lr_ratio"), f"{what} has offsets_lr_ratio")
    if bool(qalora.get("scales")) != (version == SCALES_FORMAT) or (
        qalora.get("scales") and len(set(WISHES) & set(qalora)) < 2
    ):
        raise QALoraError(
            f"{what} has format_version {version}, but qalora.scales is {short(qalora.get('scales'))}, with the ratio "
            f"{short(qalora.get('scales_lr_ratio'))}. The config was edited: save the adapter again."
        )
    if qalora.get("pooling") != POOLING:
        raise QALoraError(
            f"{what} has pooling {short(qalora.get('pooling'))}, expected {POOLING!r}: it would be scaled wrongly. "
            "Train it with this version of qalora."
        )


def check_wishes(qalora: dict, what: str) -> None:
    """Refuse ``scales`` that are no boolean, and a ratio that is no positive number, or of nothing; of a config that
    names no base, anything else."""
    if not is_bound(qalora) and (unknown := sorted(map(str, set(qalora) - set(WISHES)))):
        raise QALoraError(
            f"{what} has qalora: {{{unknown[0]}: …}}, which is not an option there, expected {' or '.join(WISHES)}. "
            "Remove or correct it."
        )
    scales, ratio = qalora.get("scales"), qalora.get("scales_lr_ratio")
    if not isinstance(scales, bool | None):
        raise QALoraError(f"{what} has scales: {short(scales)}, expected true or false. Correct it.")
    if ratio is None:
        return
    if not scales:
        raise QALoraError(
            f"{what} has scales_lr_ratio {short(ratio)}, but scales is not true: nothing would learn faster. Set "
            "scales: true, or remove scales_lr_ratio."
        )
    check_ratio(ratio, f"{what} has scales_lr_ratio")


def check_ratio(ratio: Any, what: str) -> None:
    """Refuse what is no positive number; None is none."""
    if ratio is None:
        return
    if type(ratio) not in (int, float) or not 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO:
        raise QALoraError(f"{what} {short(ratio)}, expected a positive number, as 1. Correct it.")


def check_config(config: dict, path: Path) -> None:
    """Refuse what no PEFT adapter has in its config where a merge reads it."""

    remedy = "Save the adapter again"
    check_kinds(config, path, remedy)
    recorded = (config.get("qalora") or {}).get("base_fingerprint")
    _require(isinstance(recorded, str | None), path, "qalora.base_fingerprint", recorded, "a string", remedy)
    check_numbers(config, path, remedy)


def check_kinds(config: dict, what: object, remedy: str) -> None:
    """Refuse values of another kind than PEFT's fields have: of a ``LoraConfig`` or a stored one."""
    for name, kind, expected in (
        ("qalora", dict, "an object"),
        ("rank_pattern", dict, "an object"),
        ("alpha_pattern", dict, "an object"),
        ("use_rslora", bool, "a boolean"),
        ("base_model_name_or_path", str, "a string"),
    ):
        _require(isinstance(config.get(name), kind | None), what, name, config.get(name), expected, remedy)
    listed = (
        ("target_modules", str, "names"),
        ("exclude_modules", str, "names"),
        ("layers_to_transform", int, "numbers"),
    )
    for name, item, expected in listed:
        found = config.get(name)
        parts = found if isinstance(found, list | set | tuple) else () if found is None else (found,)
        _require(all(isinstance(part, item) for part in parts), what, name, found, expected, remedy)


def check_numbers(config: dict, what: object, remedy: str) -> None:
    """Refuse ranks and alphas that are no numbers, or with which nothing would be trained: of a ``LoraConfig`` or a
    stored one. (An ``alpha_pattern`` of 0 may switch a layer off.)"""
    for name, rank in {"r": config.get("r"), **_named("rank_pattern", config)}.items():
        _require(type(rank) is int and rank > 0, what, name, rank, "a positive integer", remedy)
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **_named("alpha_pattern", config)}.items():
        is_finite = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < _LARGEST_ALPHA
        right = is_finite and (alpha != 0 or name != "lora_alpha")
        _require(right, what, name, alpha, "a finite number other than 0", remedy)
    dropout = config.get("lora_dropout") or 0.0
    right = isinstance(dropout, int | float) and 0 <= dropout < 1
    _require(right, what, "lora_dropout", dropout, "at least 0 and below 1", remedy)


def _require(right: bool, what: object, name: str, value: Any, expected: str, remedy: str) -> None:
    if not right:
        raise QALoraError(f"{what}: {name} is {short(value)}, expected {expected}. {remedy}.")


def _named(field: str, config: dict) -> dict[str, Any]:
    return {f"{field}[{key!r}]": value for key, value in (config.get(field) or {}).items()}


def check_config_patterns(config: dict, modules: list[str], what: object) -> None:
    """Refuse patterns that PEFT, loading this config, could match for ever; see :mod:`.patterns`."""
    for name in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        found = config.get(name) or ()
        patterns = [found] if isinstance(found, str) else found
        if isinstance(patterns, int | float) or not all(isinstance(pattern, str) for pattern in patterns):
            raise QALoraError(f"{what}: {name} is {short(found)}, expected names. Save the adapter again.")
        check_patterns(patterns, modules, f"{what}: {name}")


def rank_of(config: dict[str, Any], name: str) -> int:
    """R of a linear, by its name in the model, by PEFT's rules."""
    return _patterned(config, "rank_pattern", name, config["r"])


def scaling_of(config: dict[str, Any], name: str) -> float:
    """``α/R`` of a linear, by its name in the model (``α/√R`` with rsLoRA), by PEFT's rules."""
    rank, alpha = rank_of(config, name), _patterned(config, "alpha_pattern", name, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _patterned(config: dict[str, Any], field: str, name: str, default: Any) -> Any:
    patterns = config.get(field) or {}
    key = matching_pattern(patterns, name)
    return default if key is None else patterns[key]


@contextmanager
def naming(adapter: object | None, instead: str) -> Iterator[None]:
    """While the base is opened that an adapter names: an error says so. Its path may be relative, of another folder.

    Args:
        adapter: None: a user names the base. instead: what a user may pass.
    """
    try:
        yield
    except QALoraError as error:
        if adapter is None:
            raise
        raise QALoraError(f"{error} (The adapter {adapter} names this base; {instead} names another.)") from error


def require_base(config: dict[str, Any], folder: Path, fingerprint: str, base: str | Path) -> None:
    """Refuse a base other than the one that the adapter in ``folder`` was trained on.

    Raises:
        QALoraError: names both.
    """
    recorded = config["qalora"].get("base_fingerprint")
    if not recorded:
        raise QALoraError(
            f"the adapter {folder} does not record its base (its config has no base_fingerprint), so nothing "
            "says whether this is the one. Save it again with the version of qalora that trained it."
        )
    if recorded != fingerprint:
        trained_on = config.get("base_model_name_or_path")
        raise QALoraError(
            f"the adapter {folder} was trained on another base: it records {recorded}, {base} is "
            f"{fingerprint}. Use the base it was trained on{f' ({trained_on})' if trained_on else ''}."
        )
