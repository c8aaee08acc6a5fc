"""vLLM plugin: serves merged QA-LoRA checkpoints (``quant_method: qalora``) and, on request, their GPTQ bases.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Importing this package imports
nothing of vLLM.
"""


def register() -> None:
    """Make vLLM know ``quantization="qalora"``. vLLM calls this in every process, sometimes more than once.

    Under a vLLM that is too old, every other model is served as before and a qalora model is refused with the reason.
    Unmerged adapters are refused under every vLLM.
    """
    import vllm

    from . import versions
    from .raw_adapters import refuse_raw_adapters

    refuse_raw_adapters()
    if problem := versions.problem(vllm.__version__):
        versions.register_refusal(problem)
        return
    from . import config  # noqa: F401 (importing it registers it)

    versions.silence_unpacked_zeros()
