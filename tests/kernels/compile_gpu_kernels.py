"""Compile the Triton kernels of training for several NVIDIA GPUs; fails where one does not compile or is slow by
construction. Run by ``test_gpu.py`` in a process without Triton's interpreter.
"""

from nvidia_machine_code import instructions, spills, widths

from qalora_plugin.kernels import gpu

PACKED = {"qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "offsets": "*fp32"}
SIZES = {"K": "i32", "N": "i32", "group_size": "i32", "zero_shift": "i32"}
TURING, AMPERE, HOPPER, BLACKWELL = 75, 80, 90, 100


def compile_fill(capability, dtype, bits, config=gpu.FILL_CONFIGS[0], act_order=False, offsets=True):
    constants = {"HAS_OFFSETS": offsets, "ACT_ORDER": act_order} | config.kwargs
    arguments = PACKED | {"g_idx": "*i32", "out": dtype} | SIZES
    return instructions(
        gpu.fill_kernel, arguments, constants | gpu.layout_constants(bits), capability, config.num_warps
    )


def compile_matmul(capability, dtype, bits, tokens):
    blocks = {"HAS_OFFSETS": True, "TOKENS": tokens, "ROWS": 32, "COLUMNS": gpu.MATMUL_COLUMNS}
    arguments = {"x": dtype} | PACKED | {"partial": "*fp32", "T": "i32"} | SIZES | {"groups_each": "i32"}
    return instructions(gpu.matmul_kernel, arguments, blocks | gpu.layout_constants(bits), capability)


for capability, bits in ((TURING, 4), (AMPERE, 4), (BLACKWELL, 4), (HOPPER, 2), (HOPPER, 3), (HOPPER, 4), (HOPPER, 8)):
    assert compile_fill(capability, "*bf16", bits, act_order=True, offsets=False)
    assert compile_matmul(capability, "*fp16", bits, tokens=64)

for dtype in ("*fp16", "*fp32"):
    assert compile_fill(HOPPER, dtype, 4)
    assert compile_matmul(HOPPER, dtype, 4, tokens=16)

for config in gpu.FILL_CONFIGS:
    names = compile_fill(HOPPER, "*bf16", 4, config)
    assert not spills(names), config
    assert widths(names, "STG") == {128}, config
    assert 128 in widths(names, "LDG"), config
