"""GGUF, the file format of llama.cpp and Ollama: one file with metadata, vocabulary and tensors in blocks.

Nothing here trains, merges or serves: ``qalora import gguf`` turns such a file into a folder, ``qalora export gguf`` a
folder into such a file (:mod:`qalora_plugin.conversion`). Rows lie the other way round than in GPTQ: a GGUF tensor of a
linear is ``[N, K]``, its blocks along K.

- :mod:`.header`, :mod:`.reading`: a file, opened and checked.
- :mod:`.blocks`, :mod:`.groupwise`: blocks ↔ codes, scales, minima ↔
  :class:`~qalora_plugin.core.weight.GroupwiseWeight`.
- :mod:`.architectures`: which models, how their tensors are named, and which rows llama.cpp has in another order.
- :mod:`.config`, :mod:`.metadata`: metadata → ``config.json`` and back.
- :mod:`.tokenizer`, :mod:`.vocabulary`, :mod:`.pretokenizers`: the vocabulary → a tokenizer and back.
"""

from types import ModuleType

from qalora_plugin.core.errors import QALoraError


def require_gguf() -> ModuleType:
    """The ``gguf`` package, imported when first needed."""
    try:
        import gguf
    except ImportError as error:
        raise QALoraError('GGUF files need the package gguf: pip install "qalora[gguf]".') from error
    return gguf
