"""Trains with the HF Trainer; run alone or by ``torch.distributed.run``.

Arguments: base, output folder, batch size; and ``fsdp`` for FSDP2, ``one-reader`` for it with rank 0 alone reading.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base

base, out, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
one_reader = "one-reader" in sys.argv
sharded = one_reader or "fsdp" in sys.argv
options = {}
if sharded:
    from support.axolotl_process import use_gloo

    use_gloo(sharded=True)
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"fsdp": True, "fsdp_config": fsdp | {"cpu_ram_efficient_loading": one_reader}}
    if one_reader:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` has it
rows = [{"input_ids": list(range(4 + i, 40 + i)), "labels": list(range(4 + i, 40 + i))} for i in range(32)]
torch.manual_seed(0)
arguments = TrainingArguments(
    out, max_steps=4, per_device_train_batch_size=batch_size, learning_rate=0.1, optim="sgd", report_to=[],
    use_cpu=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, **options,
)  # fmt: skip
model = load_base(base, dtype=torch.float32)
if one_reader:
    read = [not tensor.is_meta for tensor in (*model.parameters(), *model.buffers())]
    assert all(read) if dist.get_rank() == 0 else not any(read)
model = add_adapter(model, r=4, target_modules="all-linear")
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[QALoraMergeCallback(base)])
trainer.train()
if sharded:
    words = [parameter for name, parameter in model.named_parameters() if name.endswith(".words")]
    assert words
    assert all(parameter.to_local().numel() * 2 == parameter.numel() for parameter in words)
elif dist.is_initialized():
    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, DistributedDataParallel)
    sent = sum(buffer.nbytes for buffer in wrapped.modules_buffers)
    packed = sum(buffer.nbytes for name, buffer in model.named_buffers() if "qweight" in name)
    assert sent < packed / 10, f"DDP would broadcast {sent} bytes of buffers at every forward"
