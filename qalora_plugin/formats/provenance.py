"""Which tools quantized a checkpoint: for some families that says what the names on disk mean."""

from typing import Any


def quantizers(quantization: dict[str, Any]) -> list[str]:
    """The tools that a ``quantization_config`` says it was quantized by: ``["gptqmodel:7.6.0"]``."""
    meta = quantization.get("meta")
    found = meta.get("quantizer") if isinstance(meta, dict) else None
    return [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str)]


def provenance(quantization: dict[str, Any]) -> dict[str, Any]:
    """What of a ``quantization_config`` says by whom, for that of a checkpoint made of this one: it tells what gate and
    up of some families' experts mean."""
    found = quantizers(quantization)
    return {"meta": {"quantizer": found}} if found else {}
