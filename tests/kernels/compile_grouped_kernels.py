"""Compile the Triton kernels of stacked experts for NVIDIA GPUs; fails where one does not compile, does not multiply on
tensor cores, or is slow by construction. Run by ``test_grouped.py`` in a process without Triton's interpreter.
"""

from support.nvidia_machine_code import instructions, spills

from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.triton import grouped, grouped_kernels
from qalora_plugin.kernels.triton.dequantize import layout_constants

TILES = {"slots": "*i32", "experts": "*i32", "used": "*i32"}
PACKED = {"qweight": "*i32", "zeros": "*u8", "scales": "*fp16", "offsets": "*fp32", "g_idx": "*i32"}
TURING, AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 75, 80, 89, 90, 100, 120


def sizes(*names):
    return dict.fromkeys(names, "i32")


def unpacking(transposed, capability, bits, rows, dtype="*bf16", act_order=False):
    constants = {"ROWS": rows, "COLUMNS": grouped.COLUMNS, "PERIODS": grouped.DEPTH // codes_per_period(bits)}
    constants |= {"HAS_OFFSETS": True, "ALIGNED": not act_order, "ACT_ORDER": act_order} | layout_constants(bits)
    kernel = grouped_kernels.multiply_t_kernel if transposed else grouped_kernels.multiply_kernel
    more = sizes("count", *(() if transposed else ("per_row",)), "K", "N", "group_size")
    arguments = {"dy" if transposed else "x": dtype, "out": dtype} | TILES | PACKED | more
    return instructions(kernel, arguments, constants, capability, grouped.warps(rows))


def factors(capability, rows, depth):
    blocks = {"ROWS": rows, "DEPTH": depth, "COLUMNS": grouped.COLUMNS}
    strides = sizes("count", "per_row", "INNER", "N", "stride_e", "stride_i", "stride_n")
    arguments = {"x": "*bf16", "m": "*fp32", "out": "*bf16"} | TILES | strides
    yield instructions(grouped_kernels.product_kernel, arguments, blocks, capability, grouped.warps(rows))
    arguments = {"x": "*bf16", "dy": "*bf16", "out": "*fp32", "slots": "*i32", "ends": "*i64"}
    arguments |= sizes("count", "per_row", "INNER", "N")
    yield instructions(grouped_kernels.outer_kernel, arguments, blocks, capability, grouped.warps(rows))


def check(names, *kind):
    assert not spills(names), kind
    assert any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in names), kind


assert not spills(unpacking(False, TURING, 4, grouped.FEWEST, "*fp16"))  # whose tensor cores Triton does not know
for capability in (AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL):
    check(unpacking(False, capability, 4, grouped.FEWEST, "*fp16"), capability)

for transposed in (False, True):
    for rows in (grouped.FEWEST, grouped.MOST):
        for bits in (2, 3, 4, 8):
            check(unpacking(transposed, HOPPER, bits, rows), transposed, rows, bits)
        names = unpacking(transposed, AMPERE, 4, rows)
        check(names, transposed, rows)
        assert any(name.startswith("LDGSTS") for name in names), (
            rows
        )  # the next step is loaded while this one multiplies
    unpacking(transposed, HOPPER, 4, 64, "*fp32")  # no tensor cores multiply float32 exactly
    check(unpacking(transposed, HOPPER, 4, 64, act_order=True), transposed)

for rows, depth in ((grouped.FEWEST, 16), (grouped.MOST, grouped.DEPTH)):
    for names in factors(HOPPER, rows, depth):
        check(names, rows, depth)

pool = sizes("count", "per_row", "K", "groups", "g")
assert instructions(
    grouped_kernels.pool_kernel, {"x": "*bf16", "out": "*bf16"} | TILES | {"order": "*i64"} | pool,
    {"ROWS": 64, "GROUPS": grouped.GROUPS_OF_POOL}, HOPPER,
)  # fmt: skip
