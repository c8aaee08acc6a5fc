// The gradient of trained scales, one pass over the packed weight and the dense weight's gradient.
//
//     gradient[γ,n] = scales[γ,n]·Σ_{k∈γ} (q[k,n] − zeros[γ,n])·along[k,n]          along = xᵀ·dy
//
// Strips run along N, as in fill.cpp. q·along and along are summed apart: the zero-point belongs to the whole group.

#include "problem.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int64_t STRIP = 1024;  // columns of a task

inline float load(const float* in) { return *in; }

inline float load(const uint16_t* in) {
    const uint32_t word = static_cast<uint32_t>(*in) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

template <int BITS, typename In>
void factor_gradient(const Problem& p, const In* along, float* gradient) {
    const int64_t n = p.n, words = p.group_size * BITS / 32;
    const int64_t strips = (n + STRIP - 1) / STRIP;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
    for (int64_t group = 0; group < p.groups; ++group) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t first = strip * STRIP, width = std::min(STRIP, n - first);
            float scale[STRIP], shift[STRIP], codes[STRIP] = {}, plain[STRIP] = {};
            group_terms(p, nullptr, group, first, width, scale, shift);
            const int32_t* word = p.qweight + words * group * n + first;
            const In* in = along + p.group_size * group * n + first;
            for (int64_t row = 0; row < words; ++row, word += n) {
                for (int bit = 0; bit < 32; bit += BITS, in += n) {
                    for (int64_t i = 0; i < width; ++i) {
                        const uint32_t code = (static_cast<uint32_t>(word[i]) >> bit) & ((1u << BITS) - 1);
                        const float value = load(in + i);
                        codes[i] += static_cast<float>(static_cast<int32_t>(code)) * value;
                        plain[i] += value;
                    }
                }
            }
            float* out = gradient + group * n + first;
            for (int64_t i = 0; i < width; ++i) out[i] = scale[i] * codes[i] + shift[i] * plain[i];
        }
    }
}

template <typename In>
void factor_gradient_bits(const Problem& p, const In* along, float* gradient) {
    p.bits == 2   ? factor_gradient<2>(p, along, gradient)
    : p.bits == 4 ? factor_gradient<4>(p, along, gradient)
                  : factor_gradient<8>(p, along, gradient);
}

}  // namespace

// along [K, N] as bfloat16 or float32; gradient [G, N] float32. The weight has neither offsets nor an adapter.
extern "C" void qalora_factor_gradient(const Problem* p, const void* along, int32_t bfloat16, float* gradient) {
    bfloat16 ? factor_gradient_bits(*p, static_cast<const uint16_t*>(along), gradient)
             : factor_gradient_bits(*p, static_cast<const float*>(along), gradient);
}
