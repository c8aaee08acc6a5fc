"""Trains with the HF Trainer; run alone or by ``torch.distributed.run``. Arguments: base, output folder, batch size."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base

base, out, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [{"input_ids": list(range(4 + i, 40 + i)), "labels": list(range(4 + i, 40 + i))} for i in range(32)]
torch.manual_seed(0)
arguments = TrainingArguments(
    out, max_steps=4, per_device_train_batch_size=batch_size, learning_rate=0.1, optim="sgd", report_to=[],
    use_cpu=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)  # fmt: skip
model = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[QALoraMergeCallback(base)])
trainer.train()
if dist.is_initialized():
    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, DistributedDataParallel)
    sent = sum(buffer.nbytes for buffer in wrapped.modules_buffers)
    packed = sum(buffer.nbytes for name, buffer in model.named_buffers() if "qweight" in name)
    assert sent < packed / 10, f"DDP would broadcast {sent} bytes of buffers at every forward"
