// What is done with P(x), the input summed over each group: the sum itself, training's gradient of the offsets, and
// the term that the offsets add in serving.

#include <cstdint>

#include "microkernel.h"

#ifdef QALORA_BFLOAT16

namespace {

constexpr int64_t SMALL = 1 << 19;  // multiplications: less is done before other threads are awake

// out [T, G], rows out_stride apart; summed in float32, rounded once. group_size is even.
void pool(const uint16_t* x, int64_t tokens, int64_t groups, int64_t group_size, uint16_t* out, int64_t out_stride,
          int threads) {
    const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t group = 0; group < groups; ++group) {
            const uint16_t* start = x + (token * groups + group) * group_size;
            __m512 sums = _mm512_setzero_ps();
            for (int64_t j = 0; j < group_size; j += 32) {
                const auto values = _mm512_maskz_loadu_epi32(lanes((group_size - j) / 2), start + j);
                sums = _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(values), one);
            }
            store(out + token * out_stride + group, 1, _mm512_set1_ps(_mm512_reduce_add_ps(sums)));
        }
    }
}

}  // namespace

// 0: this CPU lacks the instructions. 1: it has them. 2: it multiplies matrices in hardware (AMX), which torch uses.
extern "C" int32_t qalora_bfloat16() {
#ifdef __AMX_BF16__
    return 2;
#else
    return 1;
#endif
}

// P(x) [T, G] of x [T, G·g], g even.
extern "C" void qalora_pool(const uint16_t* x, int64_t tokens, int64_t groups, int64_t group_size, uint16_t* out,
                            int32_t threads) {
    pool(x, tokens, groups, group_size, out, groups, threads);
}

// dE [G, N] = P(x)ᵀ [G, T] · dy [T, N]; rows of pooled_t are as many tokens apart, rounded up to a pair, padded with 0.
extern "C" void qalora_offset_gradient(const uint16_t* pooled_t, const uint16_t* dy, int64_t tokens, int64_t groups,
                                       int64_t n, float* out, int32_t threads) {
    const int64_t pairs = (tokens + 1) / 2;
    for_each_block(n, groups, threads, [&](int64_t first, int64_t row, int64_t rows) {
        const uint32_t* panel = panel_of_rows(dy, tokens, n, first);
        multiply_panel(pooled_t + row * 2 * pairs, rows, 2 * pairs, panel, out + row * n + first, n,
                       std::min(COLUMNS, n - first));
    });
}

// y [T, N] += P(x)·offsets, whose panels [⌈N/64⌉, ⌈G/2⌉, 64] are aligned to 64 bytes; x [T, G·g], g even.
extern "C" void qalora_add_offsets(const uint16_t* x, int64_t tokens, int64_t groups, int64_t group_size,
                                   const uint32_t* panels, int64_t n, uint16_t* y, int32_t threads) {
    static thread_local std::vector<uint16_t> pooled;
    const int64_t depth = (groups + 1) / 2 * 2;
    const int team = tokens * groups * n < SMALL ? 1 : threads;
    pooled.assign(tokens * depth, 0);
    pool(x, tokens, groups, group_size, pooled.data(), depth, team);
    const uint16_t* a = pooled.data();  // this thread's, read by all
    for_each_block(n, tokens, team, [&](int64_t first, int64_t row, int64_t rows) {
        multiply_panel<true>(a + row * depth, rows, depth, panels + first * depth / 2, y + row * n + first, n,
                             std::min(COLUMNS, n - first));
    });
}

#else

extern "C" int32_t qalora_bfloat16() { return 0; }

#endif
