// Dequantisation with the adapter folded in, one pass over the packed weight:
//
//     out[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n] + scaling·Σ_r A[r,γ]·B[n,r]
//              = scales[γ,n]·q[k,n] + shifts[γ,n]
//
// A task is a strip of columns times a few groups. What all rows of a group share (scale; zero, offset and the adapter's
// share) is summed up once and stays in L1, as B's strip does from group to group; then every word is read once and
// every weight written once. Strips run along N, the contiguous direction of words and weights alike, so that the
// compiler vectorises them.
//
// A plain C interface, called through ctypes: without torch's headers this compiles in a second or two.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

struct Problem {  // the tensors of packed.py, all contiguous; cpu.py mirrors this struct
    const int32_t* qweight;
    const int32_t* qzeros;
    const void* scales;
    const float* offsets;  // [G, N] or null
    const float* lora_a;   // [R, G]
    const float* lora_b;   // [N, R]
    void* out;             // [K, N]
    int64_t rank, groups, group_size, n;
    float scaling;
    uint32_t zero_shift;  // added to a word of qzeros, gives true zeros
    int32_t bits, half_scales, bfloat16_out, threads;
};

namespace {

constexpr int64_t STRIP = 1024;  // columns of a task
constexpr int64_t GROUPS = 4;    // groups of a task

// float32 → bfloat16, to nearest even; dequantised weights are finite.
inline void store(float value, uint16_t* out) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    *out = static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

inline void store(float value, float* out) { *out = value; }

// One group of one strip: words [words, width] → out [words·32/b, width], both with rows of n.
template <int BITS, typename Out>
inline void fill_group(const int32_t* qweight, const float* scale, const float* shift, int64_t words, int64_t width,
                       int64_t n, Out* out) {
    for (int64_t row = 0; row < words; ++row, qweight += n) {
        for (int bit = 0; bit < 32; bit += BITS, out += n) {
            for (int64_t i = 0; i < width; ++i) {
                const uint32_t code = (static_cast<uint32_t>(qweight[i]) >> bit) & ((1u << BITS) - 1);
                store(static_cast<float>(static_cast<int32_t>(code)) * scale[i] + shift[i], out + i);
            }
        }
    }
}

template <int BITS, typename Scale, typename Out>
void fill(const Problem& p) {
    constexpr int64_t PERIOD = 32 / BITS;
    constexpr uint32_t MASK = (1u << BITS) - 1;
    const int64_t n = p.n, words = p.group_size / PERIOD;
    const int64_t strips = (n + STRIP - 1) / STRIP, blocks = (p.groups + GROUPS - 1) / GROUPS;
    const auto* scales = static_cast<const Scale*>(p.scales);
    auto* out = static_cast<Out*>(p.out);

    std::vector<float> b(p.rank * n);  // [R, N]: B along N, too
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t r = 0; r < p.rank; ++r) b[r * n + i] = p.lora_b[i * p.rank + r];
    }
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t first = strip * STRIP, width = std::min(STRIP, n - first);
            float scale[STRIP], shift[STRIP];
            for (int64_t group = block * GROUPS; group < std::min((block + 1) * GROUPS, p.groups); ++group) {
                const int64_t start = group * n + first;
                for (int64_t i = 0; i < width; ++i) scale[i] = static_cast<float>(scales[start + i]);
                for (int64_t i = 0; i < width; i += PERIOD) {  // n and STRIP are whole words of qzeros
                    const uint32_t word = static_cast<uint32_t>(p.qzeros[(start + i) / PERIOD]) + p.zero_shift;
                    for (int64_t j = 0; j < PERIOD; ++j) {
                        const auto zero = static_cast<int32_t>((word >> (j * BITS)) & MASK);
                        shift[i + j] = -scale[i + j] * static_cast<float>(zero);
                    }
                }
                if (p.offsets) {
                    for (int64_t i = 0; i < width; ++i) shift[i] += p.offsets[start + i];
                }
                for (int64_t r = 0; r < p.rank; ++r) {
                    const float a = p.scaling * p.lora_a[r * p.groups + group];
                    for (int64_t i = 0; i < width; ++i) shift[i] += a * b[r * n + first + i];
                }
                fill_group<BITS>(p.qweight + words * group * n + first, scale, shift, words, width, n,
                                 out + p.group_size * group * n + first);
            }
        }
    }
}

template <int BITS>
void fill_types(const Problem& p) {
    if (p.half_scales) {
        p.bfloat16_out ? fill<BITS, _Float16, uint16_t>(p) : fill<BITS, _Float16, float>(p);
    } else {
        p.bfloat16_out ? fill<BITS, float, uint16_t>(p) : fill<BITS, float, float>(p);
    }
}

}  // namespace

// The effective weight; bits is 2, 4 or 8.
extern "C" void qalora_fill(const Problem* p) {
    p->bits == 2 ? fill_types<2>(*p) : p->bits == 4 ? fill_types<4>(*p) : fill_types<8>(*p);
}
