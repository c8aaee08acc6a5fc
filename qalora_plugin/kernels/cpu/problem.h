// What the CPU kernels are given, and the part of a weight that all rows of a group share:
//
//     w'[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n] + scaling·Σ_r A[r,γ]·B[n,r]
//             = scale[n]·q[k,n] + shift[n]
//
// A plain C interface, called through ctypes: without torch's headers this compiles in seconds.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

struct Problem {  // the tensors of a GroupwiseWeight, all contiguous; __init__.py mirrors this struct
    const int32_t* qweight;
    const uint8_t* zeros;  // [G, N]
    const void* scales;    // [G, N] float16 or float32
    const float* offsets;  // [G, N] or null
    const float* lora_a;   // [R, G]
    const float* lora_b;   // [N, R]
    int64_t rank, groups, group_size, n;
    float scaling;
    int32_t bits, half_scales, threads;
};

// B as [R, N]: along N, as everything else.
inline std::vector<float> transposed_b(const Problem& p) {
    std::vector<float> b(p.rank * p.n);
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t i = 0; i < p.n; ++i) {
        for (int64_t r = 0; r < p.rank; ++r) b[r * p.n + i] = p.lora_b[i * p.rank + r];
    }
    return b;
}

#ifdef __FLT16_MANT_DIG__
using Half = _Float16;
#else
// Where the compiler knows no such number in C++ (GCC before 12): its bits, and what they say. The exponent's bias goes
// from 15 to 127 by a product, which subnormal numbers take, too.
struct Half {
    uint16_t bits;
    operator float() const {
        const uint32_t rest = (bits & 0x7FFFu) << 13, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
        const uint32_t special = rest >= 0x0F800000u ? 0x7F800000u : 0u;  // infinity and NaN
        float value;
        std::memcpy(&value, &rest, 4);
        value *= 0x1p112f;
        uint32_t word;
        std::memcpy(&word, &value, 4);
        word |= sign | special;
        std::memcpy(&value, &word, 4);
        return value;
    }
};
#endif

// Scales of the columns [first, first + width) of a group.
inline void load_scales(const Problem& p, int64_t group, int64_t first, int64_t width, float* scale) {
    const int64_t start = group * p.n + first;
    if (p.half_scales) {
        const auto* half = static_cast<const Half*>(p.scales) + start;
        for (int64_t i = 0; i < width; ++i) scale[i] = static_cast<float>(half[i]);
    } else {
        const auto* full = static_cast<const float*>(p.scales) + start;
        for (int64_t i = 0; i < width; ++i) scale[i] = full[i];
    }
}

// scale and shift of the columns [first, first + width) of a group.
inline void group_terms(const Problem& p, const float* b, int64_t group, int64_t first, int64_t width, float* scale,
                        float* shift) {
    const int64_t start = group * p.n + first;
    load_scales(p, group, first, width, scale);
    for (int64_t i = 0; i < width; ++i) shift[i] = -scale[i] * static_cast<float>(p.zeros[start + i]);
    if (p.offsets) {
        for (int64_t i = 0; i < width; ++i) shift[i] += p.offsets[start + i];
    }
    for (int64_t r = 0; r < p.rank; ++r) {
        const float a = p.scaling * p.lora_a[r * p.groups + group];
        for (int64_t i = 0; i < width; ++i) shift[i] += a * b[r * p.n + first + i];
    }
}
