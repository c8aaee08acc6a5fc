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


def check_add(capability, rows, group_size, x, offsets, precision):
    """Few rows: x is pooled inside."""
    groups = offsets_triton.groups_a_step(group_size, rows)
    columns = offsets_triton.columns_a_step(group_size, rows * groups)
    blocks = {"BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_G": groups, "BLOCK_I": columns, "PRECISION": precision}
    pointers = {"y_ptr": "*bf16", "x_ptr": x, "offsets_ptr": offsets}
    check(capability, offsets_triton.add_kernel, pointers, SIZES, blocks)


for capability, rows, group_size in ((80, 1, 128), (90, 1, 32), (90, 1, 128), (90, 2, 32), (90, 4, 128)):
    check_add(capability, rows, group_size, "*bf16", "*fp16", "fma")

for capability in (80, 90):
    check_add(capability, 16, 128, "*fp16", "*fp16", "tf32")
    check_add(capability, 16, 128, "*bf16", "*fp32", "tf32x3")

    many = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_G": 32, "BLOCK_I": 1, "PRECISION": "tf32"}
    pointers = {"y_ptr": "*bf16", "x_ptr": "*fp32", "offsets_ptr": "*fp16"}
    check(capability, offsets_triton.add_kernel, pointers, SIZES, many)
    pool = {"BLOCK_M": 4, "BLOCK_G": 16, "BLOCK_I": offsets_triton.columns_a_step(128, 4 * 16)}
    sizes = {name: SIZES[name] for name in ("M", "G", "g", "stride_x")}
    check(capability, offsets_triton.pool_kernel, {"pooled_ptr": "*fp32", "x_ptr": "*bf16"}, sizes, pool)
