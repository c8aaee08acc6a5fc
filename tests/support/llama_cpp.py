"""llama.cpp's own logits and tokens, through the library inside ``xllamacpp``.

``xllamacpp``'s Python has a server that gives sampled text; logits of every position only llama.h has. Its parameter
structs are passed by value and grow with versions, so they are held as opaque memory, larger than any of them (the C
calling convention of x86-64 and aarch64 Linux allows that for the last argument); only their first fields are set.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

_MEMORY = 1024


class _Parameters(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_uint32 * (_MEMORY // 4))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    pointer = ctypes.c_void_p
    signatures = {
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_batch_get_one": (_Batch, [pointer, ctypes.c_int32]),
        "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_tokenize": (
            ctypes.c_int32,
            [pointer, ctypes.c_char_p, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_set_n_threads": (None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_backend_init": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    library.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
    library.llama_log_set(ctypes.cast(library.quiet, pointer), None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU. ``with LlamaCpp(path) as model: …``"""

    def __init__(self, path: Path, context: int = 1024, threads: int = 2):
        self.library = _library()
        self.model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        parameters = self.library.llama_context_default_params()
        parameters.memory[0:3] = [context, context, context]  # n_ctx, n_batch, n_ubatch
        self.context = self.library.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp makes no context for {path}"
        self.library.llama_set_n_threads(self.context, threads, threads)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def logits(self, ids: list[int]) -> np.ndarray:
        """After every token, float32 ``[T, V]``; once for a model."""
        count = len(ids)
        tokens, wanted = (ctypes.c_int32 * count)(*ids), (ctypes.c_int8 * count)(*[1] * count)
        batch = self.library.llama_batch_get_one(ctypes.cast(tokens, ctypes.c_void_p), count)
        batch.logits = ctypes.cast(wanted, ctypes.c_void_p)
        assert self.library.llama_decode(self.context, batch) == 0
        size = self.library.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (count, size)).copy()

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """``special``: with BOS where the file says so, and special tokens in the text read as such."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self.library.llama_tokenize(
            self.vocabulary, data, len(data), ctypes.cast(ids, ctypes.c_void_p), len(ids), special, special
        )
        assert count >= 0
        return list(ids[:count])


def log_probabilities(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Of each next token, float64 ``[T − 1]``."""
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(1))
