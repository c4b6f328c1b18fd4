// The logits of a mixture's router, which kernels/reference.py defines, and the experts that they
// choose, as kernels/routing.py defines it.

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

inline Floats load_input(const bf16* source) { return load_bf16(source); }
inline Floats load_input(const float* source) { return load(source); }

// Always added in this order, so that a row's logits do not depend on the other rows.
template <typename T>
float product(const T* x, const float* weight, int64_t inputs) {
    constexpr int kSums = 4;
    Floats sums[kSums] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 16 * kSums <= inputs; i += 16 * kSums)
        for (int s = 0; s < kSums; ++s)
            sums[s] = fma(load_input(x + i + 16 * s), load(weight + i + 16 * s), sums[s]);
    for (; i < inputs; i += 16) sums[0] = fma(load_input(x + i), load(weight + i), sums[0]);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void logits(const T* x, const float* weight, const float* bias, float* out, int64_t rows,
            int64_t inputs, int64_t outputs, int threads) {
    parallel_for(outputs, threads, rows * outputs * inputs > 1 << 16, [=](int64_t n) {
        for (int64_t row = 0; row < rows; ++row)
            out[row * outputs + n] = product(x + row * inputs, weight + n * inputs, inputs) +
                                     (bias ? bias[n] : 0.0f);
    });
}

// kernels/cpu/library.py has the same numbers.
enum Scoring : int { kSoftmax = 0, kSigmoid = 1, kSoftmaxOfChosen = 2 };

// exp(x − highest) in place, divided by their sum.
void softmax(float* values, int64_t count) {
    const float highest = *std::max_element(values, values + count);
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - highest);
    for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

struct Rule {
    int64_t experts, top_k;
    int scoring, renormalize;
    float least_sum, scaling_factor;
    int64_t groups, topk_groups;
    int by_two_best;  // a group's score is the sum of its two highest, not the highest
};

// The `count` highest of all values, the highest first and of equal ones the first; `index` gets
// their places. What is no number is never chosen before a number, but a place always is.
void highest(const float* values, int64_t all, int64_t count, int64_t* index) {
    int64_t found = 0;
    for (int64_t i = 0; i < all; ++i) {
        const auto above = [&](int64_t other) {
            return values[i] > values[other] || (std::isnan(values[other]) && !std::isnan(values[i]));
        };
        int64_t at = found;
        while (at > 0 && above(index[at - 1])) --at;
        if (at == count) continue;
        found = std::min(found + 1, count);
        std::copy_backward(index + at, index + found - 1, index + found);
        index[at] = i;
    }
}

// −∞ for the experts of all but the best groups. scores: a buffer of `groups` numbers.
void keep_best_groups(const Rule& rule, float* preference, float* scores, int64_t* best) {
    const int64_t size = rule.experts / rule.groups;
    for (int64_t g = 0; g < rule.groups; ++g) {
        int64_t top[2] = {};
        highest(preference + g * size, size, rule.by_two_best ? 2 : 1, top);
        scores[g] = preference[g * size + top[0]];
        if (rule.by_two_best) scores[g] += preference[g * size + top[1]];
    }
    highest(scores, rule.groups, rule.topk_groups, best);
    for (int64_t g = 0; g < rule.groups; ++g)
        if (std::find(best, best + rule.topk_groups, g) == best + rule.topk_groups)
            std::fill(preference + g * size, preference + (g + 1) * size, -INFINITY);
}

// Of one row. scores: a buffer of 2 · experts + groups numbers; best_groups: of `topk_groups`.
void choose(const Rule& rule, const float* logits, const float* correction, float* scores,
            int64_t* best_groups, int64_t* ids, float* weights) {
    float *preference = scores + rule.experts, *group_scores = preference + rule.experts;
    std::copy(logits, logits + rule.experts, scores);
    if (rule.scoring == kSoftmax) softmax(scores, rule.experts);
    if (rule.scoring == kSigmoid)
        for (int64_t i = 0; i < rule.experts; ++i) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    for (int64_t i = 0; i < rule.experts; ++i)
        preference[i] = scores[i] + (correction ? correction[i] : 0.0f);
    if (rule.groups > 1) keep_best_groups(rule, preference, group_scores, best_groups);
    highest(preference, rule.experts, rule.top_k, ids);
    for (int64_t k = 0; k < rule.top_k; ++k) weights[k] = scores[ids[k]];
    if (rule.scoring == kSoftmaxOfChosen) {
        softmax(weights, rule.top_k);
    } else if (rule.renormalize) {
        float total = 0.0f;
        for (int64_t k = 0; k < rule.top_k; ++k) total += weights[k];
        for (int64_t k = 0; k < rule.top_k; ++k) weights[k] /= std::max(total, rule.least_sum);
    }
    for (int64_t k = 0; k < rule.top_k; ++k) weights[k] *= rule.scaling_factor;
}

}  // namespace

// logits are (rows, experts), ids and weights (rows, top_k). correction may be null.
extern "C" int nybble_choose_experts(const float* logits, const float* correction, int64_t* ids,
                                     float* weights, int64_t rows, int64_t experts, int64_t top_k,
                                     int scoring, int renormalize, float least_sum,
                                     float scaling_factor, int64_t groups, int64_t topk_groups,
                                     int by_two_best, int threads) try {
    const Rule rule{experts,   top_k,          scoring, renormalize,
                    least_sum, scaling_factor, groups,  topk_groups,
                    by_two_best};
    const int64_t size = 2 * experts + groups;
    const auto scores = buffers(threads, size);
    std::vector<int64_t> best_groups(threads * topk_groups);
    parallel_for(rows, threads, rows * experts > 4096, [&](int64_t row) {
        const int thread = thread_number();
        choose(rule, logits + row * experts, correction, scores.get() + thread * size,
               best_groups.data() + thread * topk_groups, ids + row * top_k, weights + row * top_k);
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}

// Contiguous; inputs is a multiple of 16. bias may be null.
extern "C" void nybble_router_logits(const void* x, const float* weight, const float* bias,
                                     float* out, int64_t rows, int64_t inputs, int64_t outputs,
                                     int is_bf16, int threads) {
    if (is_bf16)
        logits(static_cast<const bf16*>(x), weight, bias, out, rows, inputs, outputs, threads);
    else
        logits(static_cast<const float*>(x), weight, bias, out, rows, inputs, outputs, threads);
}
