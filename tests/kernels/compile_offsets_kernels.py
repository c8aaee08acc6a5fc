"""Compile the Triton kernels of serving for NVIDIA GPUs; fails where one does not compile or is slow by construction.
Run by ``test_offsets_triton.py`` in a process without Triton's interpreter.
"""

from nvidia_machine_code import instructions, spills, widths

from vllm_ext import offsets_triton

SIZES = dict.fromkeys(("M", "N", "G", "g", "stride_y", "stride_x"), "i32")


def check(capability, kernel, pointers, sizes, blocks):
    names = instructions(kernel, pointers | sizes, blocks, capability)
    assert not spills(names), (capability, blocks)
    assert 128 in widths(names, "LDG"), (capability, blocks)


def check_few(capability, rows, group_size, x, offsets):
    exact = "*fp32" in (x, offsets)
    blocks = offsets_triton.blocks_of_few(rows, group_size, exact)
    check(capability, offsets_triton.add_kernel, {"y_ptr": "*bf16", "x_ptr": x, "offsets_ptr": offsets}, SIZES, blocks)


for capability, rows, group_size in ((80, 1, 128), (90, 1, 32), (90, 1, 128), (90, 2, 32), (90, 4, 128)):
    check_few(capability, rows, group_size, "*bf16", "*fp16")

for capability in (80, 90):
    check_few(capability, 16, 128, "*fp16", "*fp16")
    check_few(capability, 16, 128, "*bf16", "*fp32")

    pointers = {"y_ptr": "*bf16", "x_ptr": "*fp32", "offsets_ptr": "*fp16"}
    check(capability, offsets_triton.add_kernel, pointers, SIZES, offsets_triton.blocks_of_pooled(exact=False))
    sizes = {name: SIZES[name] for name in ("M", "G", "g", "stride_x")}
    pointers = {"pooled_ptr": "*fp32", "x_ptr": "*bf16"}
    check(capability, offsets_triton.pool_kernel, pointers, sizes, offsets_triton.pool_blocks(128))
