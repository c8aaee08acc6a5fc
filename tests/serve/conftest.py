"""Run in the serving environment, from the repository root: `.venv-serve/bin/python -m pytest tests/serve`."""

import os

import pytest
import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # LLM() in this process: no start-up of another, and errors arrive as raised
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

import vllm  # fails here, once, in any other environment

# With AMX vLLM's kernel would quantize activations, too: what is compared here is not that. Of this process alone.
vllm.envs.environment_variables["VLLM_CPU_INT4_W4A8"] = lambda: False


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Compiled models of these tests stay out of the user's cache, and the user's out of the tests."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm_cache"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """vLLM's process groups for a world of one, which its linear layers need."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    threads = torch.get_num_threads()
    with set_current_vllm_config(VllmConfig()):
        meeting_point = f"file://{tmp_path_factory.mktemp('dist')}/store"
        init_distributed_environment(1, 0, meeting_point, local_rank=0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def registered():
    """What vLLM does through the entry point."""
    import vllm_ext

    vllm_ext.register()


@pytest.fixture
def act_as(monkeypatch):
    """Make vLLM's layers believe to be ``rank`` of ``ranks``."""

    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def change(rank, ranks):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)

    return change
