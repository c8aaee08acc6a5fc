// Scales that train: the weight that they make, and their gradient, in one pass over the packed weight.
//
//     scales'[γ,n]   = scales[γ,n]·(1 + Σ_r D[γ,r]·C[r,n])
//     offsets'[γ,n]  = offsets[γ,n] + scales[γ,n]·scaling·Σ_r A[r,γ]·B[n,r]
//     gradient[γ,n]  = scales[γ,n]·Σ_{k∈γ} (q[k,n] − zeros[γ,n])·along[k,n]          along = xᵀ·dy
//
// Strips run along N, as in fill.cpp. q·along and along are summed apart: the zero-point belongs to the whole group.
// In bfloat16 a tile of xᵀ·dy is made where it is summed up, and never leaves the cache.

#include <algorithm>

#include "bfloat16.h"
#include "microkernel.h"
#include "problem.h"

namespace {

constexpr int64_t STRIP = 1024;  // columns of a task

// codes += q·along, plain += along: `words` rows of packed codes, and the rows of `along` that they stand for.
template <int BITS, typename In>
inline void sum_group(const int32_t* word, int64_t words, int64_t n, const In* along, int64_t stride, int64_t width,
                      float* codes, float* plain) {
    for (int64_t row = 0; row < words; ++row, word += n) {
        for (int bit = 0; bit < 32; bit += BITS, along += stride) {
            for (int64_t i = 0; i < width; ++i) {
                const uint32_t code = (static_cast<uint32_t>(word[i]) >> bit) & ((1u << BITS) - 1);
                const float value = read(along + i);
                codes[i] += static_cast<float>(static_cast<int32_t>(code)) * value;
                plain[i] += value;
            }
        }
    }
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
            sum_group<BITS>(p.qweight + words * group * n + first, words, n, along + p.group_size * group * n + first,
                            n, width, codes, plain);
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

#ifdef QALORA_BFLOAT16

// A panel of dy's columns times the rows of xᵀ that a group has, TILE at a time.
template <int BITS>
void factor_gradient_of(const Problem& p, const uint16_t* x_t, const uint16_t* dy, int64_t tokens, float* gradient) {
    constexpr int64_t TILE = 96;  // rows, of whole words
    const int64_t n = p.n, depth = (tokens + 1) / 2 * 2, codes_per_word = 32 / BITS;
    for_each_block(n, p.groups, p.threads, [&](int64_t first, int64_t group, int64_t groups) {
        const uint32_t* panel = panel_of_rows(dy, tokens, n, first);
        const int64_t width = std::min(COLUMNS, n - first);
        alignas(64) float tile[TILE * COLUMNS];
        for (const int64_t end = group + groups; group < end; ++group) {
            float scale[COLUMNS], shift[COLUMNS], codes[COLUMNS] = {}, plain[COLUMNS] = {};
            group_terms(p, nullptr, group, first, width, scale, shift);
            for (int64_t row = 0; row < p.group_size; row += TILE) {
                const int64_t rows = std::min(TILE, p.group_size - row), k = group * p.group_size + row;
                multiply_panel(x_t + k * depth, rows, depth, panel, tile, COLUMNS, COLUMNS);
                sum_group<BITS>(p.qweight + k / codes_per_word * n + first, rows / codes_per_word, n, tile, COLUMNS,
                                width, codes, plain);
            }
            float* out = gradient + group * n + first;
            for (int64_t i = 0; i < width; ++i) out[i] = scale[i] * codes[i] + shift[i] * plain[i];
        }
    });
}

#endif

void in_steps(const Problem& p, const float* d, const float* c, int64_t rank, float* scales, float* offsets) {
    const int64_t n = p.n, strips = (n + STRIP - 1) / STRIP;
    const auto b = p.lora_b ? transposed_b(p) : std::vector<float>();
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
    for (int64_t group = 0; group < p.groups; ++group) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t first = strip * STRIP, width = std::min(STRIP, n - first), start = group * n + first;
            float scale[STRIP], sum[STRIP];
            load_scales(p, group, first, width, scale);
            std::fill(sum, sum + width, 1.0f);
            for (int64_t r = 0; r < rank; ++r) {
                for (int64_t i = 0; i < width; ++i) sum[i] += d[group * rank + r] * c[r * n + first + i];
            }
            for (int64_t i = 0; i < width; ++i) scales[start + i] = scale[i] * sum[i];
            if (!offsets) continue;
            std::fill(sum, sum + width, 0.0f);
            for (int64_t r = 0; r < p.rank; ++r) {
                const float a = p.scaling * p.lora_a[r * p.groups + group];
                for (int64_t i = 0; i < width; ++i) sum[i] += a * b[r * n + first + i];
            }
            for (int64_t i = 0; i < width; ++i) {
                offsets[start + i] = scale[i] * sum[i] + (p.offsets ? p.offsets[start + i] : 0.0f);
            }
        }
    }
}

}  // namespace

// scales' [G, N], and offsets' [G, N] unless null, of D [G, R'], C [R', N] and the adapter that the problem has.
extern "C" void qalora_in_steps(const Problem* p, const float* d, const float* c, int64_t rank, float* scales,
                                float* offsets) {
    in_steps(*p, d, c, rank, scales, offsets);
}

// along [K, N] as bfloat16 or float32; gradient [G, N] float32. The weight has neither offsets nor an adapter.
extern "C" void qalora_factor_gradient(const Problem* p, const void* along, int32_t bfloat16, float* gradient) {
    bfloat16 ? factor_gradient_bits(*p, static_cast<const uint16_t*>(along), gradient)
             : factor_gradient_bits(*p, static_cast<const float*>(along), gradient);
}

#ifdef QALORA_BFLOAT16

// x_t [K, T], rows as many tokens apart, rounded up to a pair, padded with 0; dy [T, N]; both bfloat16. As above.
extern "C" void qalora_factor_gradient_of(const Problem* p, const uint16_t* x_t, const uint16_t* dy, int64_t tokens,
                                          float* gradient) {
    p->bits == 2   ? factor_gradient_of<2>(*p, x_t, dy, tokens, gradient)
    : p->bits == 4 ? factor_gradient_of<4>(*p, x_t, dy, tokens, gradient)
                   : factor_gradient_of<8>(*p, x_t, dy, tokens, gradient);
}

#endif
