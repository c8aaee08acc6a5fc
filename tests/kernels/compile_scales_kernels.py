"""Compile the Triton kernel of trained scales for NVIDIA GPUs; fails where it does not compile, does not multiply on
tensor cores, or is slow by construction. Run by ``test_scales_triton.py`` in a process without Triton's interpreter.
"""

from support.nvidia_machine_code import instructions, shared_kilobytes, spills

from qalora_plugin.kernels.triton import grouped, scales

OF_CONSUMERS = 99  # KiB of shared memory that a program may take, from compute capability 8.6 on
AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 80, 89, 90, 100, 120
PACKED = {"qweight": "*i32", "zeros": "*u8", "scales": "*fp16", "offsets": "*fp16", "g_idx": "*i32"}


def compiled(capability, bits=4, group_size=32, dtype="*bf16", stacked=False, tokens=None, asked=instructions):
    tokens = tokens or scales.tokens_of(2 if dtype == "*bf16" else 4)
    constants = {"STACKED": stacked, "TOKENS": tokens} | scales.constants(bits, group_size)
    arguments = {"x": dtype, "dy": dtype, "out": "*fp32", "slots": "*i32", "ends": "*i64"} | PACKED
    arguments |= dict.fromkeys(("count", "K", "N", "group_size"), "i32")
    return asked(scales.factor_gradient_kernel, arguments, constants, capability, scales.WARPS)


def check(names, *kind):
    assert not spills(names), kind
    assert any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in names), kind


for capability in (AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL):
    check(compiled(capability), capability)
    check(compiled(capability, stacked=True, tokens=grouped.FEWEST), capability)
for bits in (2, 3, 4, 8):
    for group_size in (32, 128):
        names = compiled(HOPPER, bits, group_size)
        check(names, bits, group_size)
        assert not any(name.startswith("RED") or name.startswith("ATOM") for name in names)  # sums in a fixed order
assert any(name.startswith("LDGSTS") for name in compiled(AMPERE))  # the next step is loaded while this one multiplies
for capability in (ADA, CONSUMER_BLACKWELL):
    for dtype in ("*bf16", "*fp32"):
        for stacked in (False, True):
            shared = compiled(capability, dtype=dtype, stacked=stacked, asked=shared_kilobytes)
            assert shared <= OF_CONSUMERS, (capability, dtype, stacked, shared)
