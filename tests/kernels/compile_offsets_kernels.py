"""Compile the Triton kernels of ``P(x)`` and the offsets' term for NVIDIA GPUs; fails where one does not compile or is
slow by construction. Run by ``test_offsets_triton.py`` in a process without Triton's interpreter.
"""

from support.nvidia_machine_code import instructions, spills, widths

from qalora_plugin.kernels.triton import pooling
from vllm_ext.kernels import offsets_triton

TURING, AMPERE, HOPPER, BLACKWELL = 75, 80, 90, 120
SIZES = dict.fromkeys(("M", "N", "G", "g", "stride_y", "stride_x"), "i32") | {"divisor": "fp32"}
POOL_SIZES = dict.fromkeys(("rows", "groups", "g", "stride"), "i32") | {"divisor": "fp32"}


def check(capability, kernel, pointers, sizes, blocks):
    names = instructions(kernel, pointers | sizes, blocks, capability)
    assert not spills(names), (capability, blocks)
    assert 128 in widths(names, "LDG"), (capability, blocks)


for capability, rows, group_size in ((TURING, 1, 32), (AMPERE, 1, 128), (HOPPER, 1, 32), (HOPPER, 4, 128)):
    pointers = {"y_ptr": "*bf16", "x_ptr": "*bf16", "offsets_ptr": "*bf16"}
    blocks = offsets_triton.blocks_of_few(rows, group_size)
    check(capability, offsets_triton.few_kernel, pointers, SIZES, blocks)

for capability, rows, rank in ((TURING, 1, 16), (AMPERE, 1, 48), (HOPPER, 1, 16), (HOPPER, 4, 48), (BLACKWELL, 1, 64)):
    pointers = {"y_ptr": "*bf16", "x_ptr": "*bf16", "a_ptr": "*fp32", "b_ptr": "*bf16"}
    blocks = offsets_triton.blocks_of_factors(rows, rank, 32)
    sizes = {name: kind for name, kind in SIZES.items() if name != "divisor"} | {"R": "i32"}
    check(capability, offsets_triton.few_factored_kernel, pointers, sizes, blocks)

for capability in (TURING, AMPERE, HOPPER, BLACKWELL):
    pointers = {"x": "*bf16", "pooled": "*bf16"}
    check(capability, pooling.pool_kernel, pointers, POOL_SIZES, pooling.pool_blocks(32))

for capability in (AMPERE, HOPPER, BLACKWELL):
    pointers = {"y_ptr": "*bf16", "pooled_ptr": "*fp32", "offsets_ptr": "*fp32"}
    sizes = {name: SIZES[name] for name in ("M", "N", "G", "stride_y")}
    check(capability, offsets_triton.add_kernel, pointers, sizes, offsets_triton.BLOCKS_OF_POOLED)
