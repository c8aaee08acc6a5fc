// Products straight from the packed weight, for CPUs with AVX512-BF16: no dense weight at all.
//
// A thread unpacks 64 columns of the effective weight (or of its transpose) into a panel in its own L2 cache and
// multiplies it with every token. Against unpacking everything and calling a GEMM, neither the dense weight nor the GEMM's
// own copy of it travels through L3 and memory; which is more than the unpacking costs.

#include "problem.h"

#include "microkernel.h"

#ifdef QALORA_BFLOAT16

namespace {

// The codes of bits [bit, bit + BITS) of 16 words, dequantised.
template <int BITS>
inline __m512 weights(__m512i words, int bit, __m512 scale, __m512 shift) {
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(words, bit), _mm512_set1_epi32((1 << BITS) - 1));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, shift);
}

// Rounded to bfloat16, the first 16 in the lower half.
inline __m512i rounded(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Panel of w' [K, N]: the columns [first, first + width).
template <int BITS>
void unpack(const Problem& p, const float* b, int64_t first, int64_t width, uint32_t* panel) {
    const int64_t words = p.group_size * BITS / 32;
    alignas(64) float scale[COLUMNS] = {}, shift[COLUMNS] = {};
    for (int64_t group = 0; group < p.groups; ++group) {
        group_terms(p, b, group, first, width, scale, shift);
        for (int64_t row = group * words; row < (group + 1) * words; ++row) {
            for (int64_t i = 0; i < COLUMNS; i += 16) {
                const __m512i word = _mm512_maskz_loadu_epi32(lanes(width - i), p.qweight + row * p.n + first + i);
                _mm_prefetch(p.qweight + row * p.n + first + i + COLUMNS, _MM_HINT_T1);
                const __m512 s = _mm512_load_ps(scale + i), t = _mm512_load_ps(shift + i);
                uint32_t* out = panel + row * (16 / BITS) * COLUMNS + i;
#pragma GCC unroll 8
                for (int bit = 0; bit < 32; bit += 2 * BITS, out += COLUMNS) {
                    const auto even = weights<BITS>(word, bit, s, t), odd = weights<BITS>(word, bit + BITS, s, t);
                    _mm512_store_si512(out, paired(rounded(even, odd)));
                }
            }
        }
    }
}

// 16×16 words, rows `from` and `to` words apart: swaps blocks of 1, 2, 4, 8 across the diagonal.
inline void transpose(const uint32_t* in, int64_t from, uint32_t* out, int64_t to) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(in + i * from);
#pragma GCC unroll 4
    for (int d = 1; d < 16; d *= 2) {
        const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(d));
        const __m512i step = _mm512_set1_epi32(d);
        // Of 32 lanes, those of the other row counted from 16: what of it comes left, and what of it goes right.
        const __m512i left = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(16 - d));
        const __m512i rest = _mm512_mask_add_epi32(_mm512_add_epi32(lane, step), right, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (i & d) continue;
            const __m512i upper = row[i], lower = row[i + d];
            row[i] = _mm512_permutex2var_epi32(upper, left, lower);
            row[i + d] = _mm512_permutex2var_epi32(upper, rest, lower);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * to, row[i]);
}

// Panel of w'ᵀ [N, K]: the columns [first, first + 64), of which those from K on are not written.
template <int BITS>
void unpack_transposed(const Problem& p, const float* b, int64_t first, uint32_t* panel) {
    constexpr int64_t PERIOD = 32 / BITS;
    const int64_t last = std::min(first + COLUMNS, p.groups * p.group_size);
    alignas(64) uint32_t tile[COLUMNS][COLUMNS / 2] = {};  // w' [64 of K, 64 of N] as pairs along N
    alignas(64) float scale[COLUMNS] = {}, shift[COLUMNS] = {};
    for (int64_t n = 0; n < p.n; n += COLUMNS) {
        const int64_t width = std::min(COLUMNS, p.n - n);
        int64_t group = -1;
        for (int64_t k = first; k < last; k += PERIOD) {
            if (k / p.group_size != group) {
                group = k / p.group_size;
                group_terms(p, b, group, n, width, scale, shift);
            }
            const int32_t* words = p.qweight + k / PERIOD * p.n + n;
            for (int64_t i = 0; i < COLUMNS; i += 32) {
                const __m512i one = _mm512_maskz_loadu_epi32(lanes(width - i), words + i);
                const __m512i two = _mm512_maskz_loadu_epi32(lanes(width - i - 16), words + i + 16);
                const __m512 s1 = _mm512_load_ps(scale + i), s2 = _mm512_load_ps(scale + i + 16);
                const __m512 t1 = _mm512_load_ps(shift + i), t2 = _mm512_load_ps(shift + i + 16);
#pragma GCC unroll 16
                for (int j = 0; j < PERIOD; ++j) {
                    _mm512_store_si512(tile[k - first + j] + i / 2, rounded(weights<BITS>(one, j * BITS, s1, t1),
                                                                            weights<BITS>(two, j * BITS, s2, t2)));
                }
            }
        }
        for (int64_t i = 0; i < COLUMNS; i += 16) {
            for (int64_t pair = 0; pair < (width + 1) / 2; pair += 16) {
                transpose(tile[i] + pair, COLUMNS / 2, panel + (n / 2 + pair) * COLUMNS + i, COLUMNS);
            }
        }
    }
}

template <int BITS>
void matmul(const Problem& p, const uint16_t* x, int64_t tokens, uint16_t* y) {
    const int64_t k = p.groups * p.group_size;
    const auto b = transposed_b(p);
    for_each_block(p.n, tokens, p.threads, [&](int64_t first, int64_t row, int64_t rows) {
        const int64_t width = std::min(COLUMNS, p.n - first);
        uint32_t* panel = panel_of(k / 2);
        unpack<BITS>(p, b.data(), first, width, panel);
        multiply_panel(x + row * k, rows, k, panel, y + row * p.n + first, p.n, width);
    });
}

template <int BITS>
void matmul_transposed(const Problem& p, const uint16_t* dy, int64_t tokens, uint16_t* dx) {
    const int64_t k = p.groups * p.group_size;
    const auto b = transposed_b(p);
    for_each_block(k, tokens, p.threads, [&](int64_t first, int64_t row, int64_t rows) {
        uint32_t* panel = panel_of((p.n + COLUMNS - 1) / COLUMNS * COLUMNS / 2);  // written in squares of 64
        unpack_transposed<BITS>(p, b.data(), first, panel);
        multiply_panel(dy + row * p.n, rows, p.n, panel, dx + row * k + first, k, std::min(COLUMNS, k - first));
    });
}

}  // namespace

// y [T, N] = x [T, K] · w'
extern "C" void qalora_matmul(const Problem* p, const uint16_t* x, int64_t tokens, uint16_t* y) {
    p->bits == 2   ? matmul<2>(*p, x, tokens, y)
    : p->bits == 4 ? matmul<4>(*p, x, tokens, y)
                   : matmul<8>(*p, x, tokens, y);
}

// dx [T, K] = dy [T, N] · w'ᵀ
extern "C" void qalora_matmul_transposed(const Problem* p, const uint16_t* dy, int64_t tokens, uint16_t* dx) {
    p->bits == 2   ? matmul_transposed<2>(*p, dy, tokens, dx)
    : p->bits == 4 ? matmul_transposed<4>(*p, dy, tokens, dx)
                   : matmul_transposed<8>(*p, dy, tokens, dx);
}

#endif
