"""vLLM plugin: serves merged QA-LoRA checkpoints (``quant_method: qalora``) and, on request, their GPTQ bases.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Importing this package imports
nothing of vLLM.
"""


def register() -> None:
    """Make vLLM know ``quantization="qalora"``. vLLM calls this in every process, sometimes more than once.

    Under a vLLM that is too old, or so new that something has moved, every other model is served as before and a qalora
    model is refused with the reason. Unmerged adapters are refused under every vLLM.
    """
    import logging

    import vllm

    from vllm_ext import compat

    problem = compat.problem(vllm.__version__)
    try:
        from vllm_ext.raw_adapters import refuse_raw_adapters

        refuse_raw_adapters()
        if problem is None:
            from vllm_ext import config  # noqa: F401 (importing it registers it)

            compat.silence_unpacked_zeros()
    except Exception as error:  # whatever a module of vLLM that has moved leads to: it would stop every server
        problem = (
            f"qalora does not run under vLLM {vllm.__version__} ({type(error).__name__}: {error}). Update qalora, or "
            "install a vLLM that it was tested with: docs/versions.md."
        )
        logging.getLogger("vllm.qalora").warning(problem)
    if problem is not None:
        compat.register_refusal(problem)
