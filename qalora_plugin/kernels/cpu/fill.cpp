// Dequantisation with the adapter folded in, one pass over the packed weight.
//
// A task is a strip of columns times a few groups. What all rows of a group share is summed up once and stays in L1, as
// B's strip does from group to group; then every word is read once and every weight written once. Strips run along N,
// the contiguous direction of words and weights alike, so that the compiler vectorises them.

#include <algorithm>

#include "bfloat16.h"
#include "problem.h"

namespace {

constexpr int64_t STRIP = 1024;  // columns of a task
constexpr int64_t GROUPS = 4;    // groups of a task

// One group of one strip: words [words, width] → out [words·32/b, width], both with rows of n.
template <int BITS, typename Out>
inline void fill_group(const int32_t* qweight, const float* scale, const float* shift, int64_t words, int64_t width,
                       int64_t n, Out* out) {
    for (int64_t row = 0; row < words; ++row, qweight += n) {
        for (int bit = 0; bit < 32; bit += BITS, out += n) {
            for (int64_t i = 0; i < width; ++i) {
                const uint32_t code = (static_cast<uint32_t>(qweight[i]) >> bit) & ((1u << BITS) - 1);
                write(static_cast<float>(static_cast<int32_t>(code)) * scale[i] + shift[i], out + i);
            }
        }
    }
}

template <int BITS, typename Out>
void fill(const Problem& p, Out* out) {
    const int64_t n = p.n, words = p.group_size * BITS / 32;
    const int64_t strips = (n + STRIP - 1) / STRIP, blocks = (p.groups + GROUPS - 1) / GROUPS;
    const auto b = transposed_b(p);
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t first = strip * STRIP, width = std::min(STRIP, n - first);
            float scale[STRIP], shift[STRIP];
            for (int64_t group = block * GROUPS; group < std::min((block + 1) * GROUPS, p.groups); ++group) {
                group_terms(p, b.data(), group, first, width, scale, shift);
                fill_group<BITS>(p.qweight + words * group * n + first, scale, shift, words, width, n,
                                 out + p.group_size * group * n + first);
            }
        }
    }
}

template <typename Out>
void fill_bits(const Problem& p, Out* out) {
    p.bits == 2 ? fill<2>(p, out) : p.bits == 4 ? fill<4>(p, out) : fill<8>(p, out);
}

}  // namespace

// The effective weight [K, N], as bfloat16 or float32.
extern "C" void qalora_fill(const Problem* p, void* out, int32_t bfloat16) {
    bfloat16 ? fill_bits(*p, static_cast<uint16_t*>(out)) : fill_bits(*p, static_cast<float*>(out));
}
