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

    from vllm_ext import compat
    from vllm_ext.raw_adapters import refuse_raw_adapters

    refuse_raw_adapters()
    if problem := compat.problem(vllm.__version__):
        compat.register_refusal(problem)
        return
    from vllm_ext import config  # noqa: F401 (importing it registers it)

    compat.silence_unpacked_zeros()
