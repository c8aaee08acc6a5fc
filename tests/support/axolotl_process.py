"""One of the processes of ``axolotl train CONFIG`` on a CPU, which no launcher of Axolotl's or accelerate's starts.

accelerate takes several processes without a GPU for its own launcher's and picks a backend by what the machine has:
what it finds out is replaced here. Started by :mod:`two_processes`.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path


def use_gloo(sharded: bool) -> None:
    """For the rest of this process; ``sharded``: with FSDP or DeepSpeed, which accelerate has for GPUs alone."""
    import torch
    from accelerate import PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    kind = DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: ("gloo", kind)

    def set_device(self):
        self.device = torch.device("cpu")

    PartialState.set_device = set_device
    PartialState(cpu=not sharded)
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type=None: build(self, "cpu")


def _without_compiled_ops() -> None:
    """DeepSpeed compiles one, for shared memory; the lock in its folder survives a process that is killed."""
    import_module("deepspeed")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *args, **kwargs: None


def _report_to(folder: Path) -> None:
    import torch
    from transformers import TrainerCallback

    from qalora_plugin.integrations.axolotl.plugin import QALoraPlugin

    class Report(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            packed, here = 0, 0
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith((".words", ".qweight", ".zeros", ".scales")):
                    packed += getattr(tensor, "ds_numel", tensor.numel()) * tensor.itemsize
                    here += getattr(tensor, "ds_tensor", getattr(tensor, "_local_tensor", tensor)).nbytes
            found = {
                "mode": args.parallel_mode.name,
                "backend": torch.distributed.get_backend(),
                "world": torch.distributed.get_world_size(),
                "model": type(model).__name__,
                "packed": packed,
                "here": here,
            }
            (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))

    QALoraPlugin.add_callbacks_post_trainer = lambda self, cfg, trainer: [Report()]


def _main(config: Path) -> None:
    import torch
    import yaml

    torch.set_num_threads(1)
    settings = yaml.safe_load(config.read_text())
    if settings.get("deepspeed"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        _without_compiled_ops()
    use_gloo(bool(settings.get("fsdp_config") or settings.get("deepspeed")))
    _report_to(config.parent)
    from axolotl.cli.train import do_cli

    do_cli(str(config))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
