"""vLLM plugin: serves merged QA-LoRA checkpoints (``quant_method: qalora``) and, on request, their GPTQ bases.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Importing this package imports
nothing of vLLM.
"""


def register() -> None:
    """Make vLLM know ``quantization="qalora"``. vLLM calls this in every process, sometimes more than once."""
    from . import config, ops  # noqa: F401 (importing config registers it)

    ops.register()
