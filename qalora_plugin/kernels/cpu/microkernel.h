// A bfloat16 GEMM for CPUs with AVX512-BF16: out [T, 64] = a [T, depth] · panel [depth, 64], summed in float32.
//
// A *panel* holds 64 columns of the right-hand side in the order that vdpbf16ps multiplies them: word [p, c] is the pair
// (row 2p, row 2p+1) of column c. Its caller builds it, from a packed weight say, and it stays in L2 while all rows of
// `a` pass by; DEPTH rows of it stay in L1 while a block of them does.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QALORA_BFLOAT16

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 64;  // of a panel: four registers of pairs
constexpr int64_t ROWS = 6;      // of `a` at a time: 6·4 sums, 4 of the panel, 1 of `a` in 32 registers
constexpr int64_t DEPTH = 256;   // rows of a panel that are in L1: 32 KiB
constexpr int64_t BLOCK = 96;    // rows of `a` whose sums are in L1 or near: 24 KiB

struct alignas(64) Line {
    uint32_t words[16];
};

// A panel of `pairs` pairs, the thread's own, kept from call to call: a new one would be paged in every time.
inline uint32_t* panel_of(int64_t pairs) {
    static thread_local std::vector<Line> lines;
    if (lines.size() * 16 < static_cast<size_t>(pairs * COLUMNS)) lines.resize(pairs * COLUMNS / 16);
    return lines.data()->words;
}

// The first `count` of 16 lanes; none for count ≤ 0.
inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

inline __m512 load(const float* in, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, in); }

inline __m512 load(const uint16_t* in, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in)), 16));
}

inline void store(float* out, __mmask16 mask, __m512 sums) { _mm512_mask_storeu_ps(out, mask, sums); }

inline void store(uint16_t* out, __mmask16 mask, __m512 sums) {
    _mm256_mask_storeu_epi16(out, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
}

// sums [R, 64] (+)= a [R, 2·pairs] · panel.
template <int R>
inline void multiply_rows(const uint16_t* a, int64_t stride, const uint32_t* panel, int64_t pairs, float* sums,
                          bool add) {
    __m512 sum[R][4];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][j] = add ? _mm512_load_ps(sums + i * COLUMNS + 16 * j) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; ++p, panel += COLUMNS) {
        __m512bh column[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) column[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + 16 * j));
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) {
            int32_t pair;
            std::memcpy(&pair, a + i * stride + 2 * p, 4);
            const auto row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, column[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) _mm512_store_ps(sums + i * COLUMNS + 16 * j, sum[i][j]);
    }
}

inline void multiply_rows(int64_t rows, const uint16_t* a, int64_t stride, const uint32_t* panel, int64_t pairs,
                          float* sums, bool add) {
    switch (rows) {
        case 1: return multiply_rows<1>(a, stride, panel, pairs, sums, add);
        case 2: return multiply_rows<2>(a, stride, panel, pairs, sums, add);
        case 3: return multiply_rows<3>(a, stride, panel, pairs, sums, add);
        case 4: return multiply_rows<4>(a, stride, panel, pairs, sums, add);
        case 5: return multiply_rows<5>(a, stride, panel, pairs, sums, add);
        default: return multiply_rows<ROWS>(a, stride, panel, pairs, sums, add);
    }
}

// out [rows, width ≤ 64], rows out_stride apart, (+)= a [rows, depth], rows depth apart, · panel. depth is even.
template <bool ADD = false, typename Out>
inline void multiply_panel(const uint16_t* a, int64_t rows, int64_t depth, const uint32_t* panel, Out* out,
                           int64_t out_stride, int64_t width) {
    alignas(64) float sums[BLOCK * COLUMNS];
    for (int64_t block = 0; block < rows; block += BLOCK) {
        const int64_t height = std::min(BLOCK, rows - block);
        for (int64_t k = 0; k == 0 || k < depth; k += DEPTH) {  // once for no depth, which sums up to zeros
            const int64_t pairs = std::min(DEPTH, depth - k) / 2;
            for (int64_t i = 0; i < height; i += ROWS) {
                multiply_rows(std::min(ROWS, height - i), a + (block + i) * depth + k, depth, panel + k / 2 * COLUMNS,
                              pairs, sums + i * COLUMNS, k > 0);
            }
        }
        for (int64_t i = 0; i < height; ++i) {
            for (int64_t j = 0; j < width; j += 16) {
                Out* to = out + (block + i) * out_stride + j;
                const __m512 sum = _mm512_load_ps(sums + i * COLUMNS + j);
                store(to, lanes(width - j), ADD ? _mm512_add_ps(sum, load(to, lanes(width - j))) : sum);
            }
        }
    }
}

// The pairs of two rows of 16: lane i of the result is (lane i of the lower half, lane i of the upper half).
inline __m512i paired(__m512i halves) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), halves);
}

// The panel of 64 columns, from `first` on, of rows [count, n]; an odd last row is paired with zeros.
inline uint32_t* panel_of_rows(const uint16_t* rows, int64_t count, int64_t n, int64_t first) {
    const int64_t pairs = (count + 1) / 2;
    uint32_t* panel = panel_of(pairs);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t *even = rows + 2 * pair * n + first, *odd = even + n;
        for (int64_t i = 0; i < COLUMNS; i += 16) {
            const __mmask16 mask = lanes(n - first - i);
            const __m256i upper = 2 * pair + 1 < count ? _mm256_maskz_loadu_epi16(mask, odd + i) : __m256i{};
            const __m512i lower = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, even + i));
            _mm512_store_si512(panel + pair * COLUMNS + i, paired(_mm512_inserti64x4(lower, upper, 1)));
        }
    }
    return panel;
}

// Tasks of 64 columns times all rows, or a part of them where there are more threads than columns to go round.
// task(first column, first row, rows)
template <typename Task>
void for_each_block(int64_t columns, int64_t rows, int threads, const Task& task) {
    const int64_t blocks = (columns + COLUMNS - 1) / COLUMNS;
    const int64_t parts = std::clamp<int64_t>(2 * threads / blocks, 1, 1 + rows / (2 * BLOCK));
    const int64_t part = (rows + parts - 1) / parts;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t i = 0; i < parts; ++i) {
            if (i * part < rows) task(block * COLUMNS, i * part, std::min(part, rows - i * part));
        }
    }
}

}  // namespace

#endif
