"""One of two ranks that train bases under torch's FSDP2, wrapped as Axolotl wraps them. Arguments: bases, results file.

What a rank gets must be what the same model gives unsharded, on this rank's part of the batch, averaged over the ranks.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qalora_plugin import add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.peft.ranks import require_one_adapter, require_one_base
from qalora_plugin.integrations.peft.sharded import make_shardable
from qalora_plugin.integrations.peft.sharded_checkpoints import full_adapter

CASES = {
    "4 bits": ("plain", {}),
    "3 bits": ("three", {}),
    "act-order and biases": ("ordered", {}),
    "experts with biases": ("experts", {}),
    "dropout": ("ordered", {"lora_dropout": 0.3}),
    "checkpointing": ("plain", {"checkpointing": True}),
    "bfloat16": ("plain", {"dtype": torch.bfloat16}),
}


def build(base: Path, dtype=torch.float32, checkpointing=False, **lora):
    model = add_adapter(load_base(base, dtype=dtype), r=4, lora_alpha=8, target_modules="all-linear", **lora).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def shard(model, param_dtype=None):
    make_shardable(model.get_base_model())
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None)
    options = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": policy, "reshard_after_forward": True}
    for module in model.modules():
        if isinstance(module, QALoraLayer):
            for factors in (module.lora_A, module.lora_B):
                fully_shard(factors["default"], **options)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def step(model, rank: int):
    ids = torch.randint(4, 99, (2, 24), generator=torch.Generator().manual_seed(2 + rank))
    torch.manual_seed(3 + rank)  # of dropout
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(found, wanted) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def compare(base: Path, options: dict, rank: int) -> dict:
    plain = build(base, **options)
    if "dtype" in options:  # as mixed precision computes: in the dtype of the packed words, adapters too
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(options["dtype"])
    wanted_loss, wanted = step(plain, rank)
    for gradient in wanted.values():
        dist.all_reduce(gradient)
        gradient /= 2
    model = build(base, **options)
    full = sum(parameter.nbytes for name, parameter in build_flat(base).items())
    model = shard(model, options.get("dtype"))
    here = sum(p.to_local().nbytes for name, p in model.named_parameters() if name.endswith(".words"))
    loss, gradients = step(model, rank)
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    start = {name: tensor for name, tensor in build(base, **options).named_parameters() if "lora_" in name}
    return {
        "loss": abs(loss - wanted_loss),
        "same": whole.keys() == wanted.keys() and len(whole) > 0,
        "gradients": max(relative(whole[name], wanted[name].float()) for name in wanted),
        "share": here / full,
        "saved": max((full_adapter(model)[name] - tensor).abs().max().item() for name, tensor in start.items()),
    }


def build_flat(base: Path) -> dict:
    model = build(base)
    make_shardable(model.get_base_model())
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".words")}


def refusal(run) -> str:
    try:
        run()
    except QALoraError as error:
        return str(error)
    return "none"


def main(bases: Path, results: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: compare(bases / base, options, rank) for name, (base, options) in CASES.items()}
    cast = shard(build(bases / "plain"), torch.bfloat16)
    found["cast"] = refusal(lambda: step(cast, rank))
    own = load_base(bases / ("three" if rank else "plain")).hf_quantizer.base_fingerprint()
    found["other base"] = refusal(lambda: require_one_base(own))
    config = build(bases / "plain").peft_config["default"]
    found["same adapter"] = refusal(lambda: require_one_adapter(config, "digest"))
    found["other saved adapter"] = refusal(lambda: require_one_adapter(config, f"digest {rank}"))
    config.r += rank
    found["other adapter"] = refusal(lambda: require_one_adapter(config))
    sharded = shard(build(bases / "plain"))
    found["read while sharded"] = refusal(lambda: next(m for m in sharded.modules() if hasattr(m, "held")).quantized)
    dist.barrier()
    if rank == 0:  # the other one ends
        found["alone"] = refusal(lambda: require_one_base(own))
    (results / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
