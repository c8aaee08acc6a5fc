"""Compile the Triton kernels of training for several NVIDIA GPUs; fails where one does not compile or is slow by
construction. Run by ``test_gpu.py`` in a process without Triton's interpreter.
"""

from support.nvidia_machine_code import bits_moved, instructions, spills, widths

from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.triton import dequantize

PACKED = {"qweight": "*i32", "zeros": "*u8", "scales": "*fp16", "offsets": "*fp32"}
SIZES = {"N": "i32", "group_size": "i32"}
TURING, AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 75, 80, 89, 90, 100, 120


def compile_fill(capability, dtype, bits, periods=4, aligned=True, act_order=False, offsets=True, scales="*fp16"):
    constants = {"HAS_OFFSETS": offsets, "ALIGNED": aligned, "ACT_ORDER": act_order, "PERIODS": periods}
    constants |= {"COLUMNS": dequantize.FILL_COLUMNS} | dequantize.layout_constants(bits)
    arguments = PACKED | {"scales": scales, "g_idx": "*i32", "out": dtype} | SIZES
    return instructions(dequantize.fill_kernel, arguments, constants, capability, dequantize.FILL_WARPS)


def compile_matmul(capability, dtype, bits, tokens):
    blocks = {"HAS_OFFSETS": True} | dequantize.matmul_blocks(tokens, bits)
    sizes = {"T": "i32", "K": "i32"} | SIZES | {"steps_each": "i32"}
    arguments = {"x": dtype} | PACKED | {"partial": "*fp32"} | sizes
    return instructions(dequantize.matmul_kernel, arguments, blocks | dequantize.layout_constants(bits), capability)


for capability in (TURING, AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL):
    assert compile_fill(capability, "*bf16", 4, scales="*bf16")
    assert compile_matmul(capability, "*bf16", 4, tokens=1)

for bits in (2, 3, 4, 8):
    assert compile_fill(HOPPER, "*fp32", bits, periods=1, aligned=False, act_order=True, offsets=False)
    for tokens in (1, 4 if bits == 3 else 8):  # at 3 bits 8 tokens spill a little
        assert not spills(compile_matmul(HOPPER, "*bf16", bits, tokens)), (bits, tokens)

for bits, periods in ((2, 2), (3, 1), (4, 4), (4, 8), (8, 8)):
    names = compile_fill(HOPPER, "*bf16", bits, periods)
    columns = dequantize.FILL_COLUMNS // (32 * dequantize.FILL_WARPS)  # of a thread
    weights = columns * periods * codes_per_period(bits)
    assert not spills(names), bits
    assert not any(name.startswith(("LDS", "STS", "BAR")) for name in names), bits  # nothing goes between threads
    assert widths(names, "STG") == {128}, bits
    assert bits_moved(names, "STG") == 16 * weights, bits
    # Every packed word once; a column's scale (16 bits), zero-point (8) and offset (32).
    terms = columns * (16 + 8 + 32)
    assert bits_moved(names, "LDG") <= bits * weights + terms, bits
    assert len(names) <= 7 * weights, (
        bits
    )  # instructions; without a wide load or fused multiply-add there would be more
