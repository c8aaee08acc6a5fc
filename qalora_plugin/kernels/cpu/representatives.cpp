// Tokens that stand for all of a batch: chosen in proportion to |x|·|dy|, each row divided by its norm.
//
// One call for what takes plain torch a dozen small ones, each of which wakes all threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bfloat16.h"

namespace {

template <typename In>
void norms(const In* rows, int64_t count, int64_t width, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < count; ++row) {
        const In* in = rows + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) {
            const float value = read(in + i);
            sum += value * value;
        }
        out[row] = std::sqrt(sum);
    }
}

template <typename In>
void divided(const In* rows, const float* norms, const int64_t* chosen, int64_t count, int64_t width, In* out,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        const In* in = rows + chosen[i] * width;
        const float norm = std::max(norms[chosen[i]], std::numeric_limits<float>::min());
        for (int64_t j = 0; j < width; ++j) write(read(in + j) / norm, out + i * width + j);
    }
}

template <typename In>
double choose(const In* x, const In* dy, int64_t tokens, int64_t k, int64_t n, int64_t count, double place,
              In* some_x, In* some_dy, int64_t* rows, int threads) {
    std::vector<float> x_norms(tokens), dy_norms(tokens);
    norms(x, tokens, k, x_norms.data(), threads);
    norms(dy, tokens, n, dy_norms.data(), threads);
    std::vector<double> edges(tokens);
    double sum = 0;
    for (int64_t i = 0; i < tokens; ++i) edges[i] = sum += static_cast<double>(x_norms[i]) * dy_norms[i];
    const double share = sum / count;
    for (int64_t i = 0; i < count; ++i) {
        const auto found = std::upper_bound(edges.begin(), edges.end(), (i + place) * share);
        rows[i] = std::min<int64_t>(found - edges.begin(), tokens - 1);
    }
    divided(x, x_norms.data(), rows, count, k, some_x, threads);
    divided(dy, dy_norms.data(), rows, count, n, some_dy, threads);
    return share;
}

}  // namespace

// x [T, K], dy [T, N], both bfloat16 or both float32; place in [0, 1). some_x [count, K], some_dy [count, N], rows
// [count]; share: what some_xᵀ·some_dy is to be multiplied by.
extern "C" void qalora_representatives(const void* x, const void* dy, int32_t bfloat16, int64_t tokens, int64_t k,
                                       int64_t n, int64_t count, double place, void* some_x, void* some_dy,
                                       int64_t* rows, double* share, int32_t threads) {
    const auto run = [&](auto type) {
        using In = decltype(type);
        *share = choose(static_cast<const In*>(x), static_cast<const In*>(dy), tokens, k, n, count, place,
                        static_cast<In*>(some_x), static_cast<In*>(some_dy), rows, threads);
    };
    bfloat16 ? run(uint16_t{}) : run(float{});
}
