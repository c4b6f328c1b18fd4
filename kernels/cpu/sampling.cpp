// A token for every row of logits; sample_tokens in kernels/reference.py defines it. All sums are
// doubles, so that in which order they are taken decides next to nothing. NaN is passed over.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "simd.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

constexpr int64_t kBlock = 64;

struct Choice {
    double temperature, top_k, top_p, min_p, uniform;
};

// Largest of logits [0, count), at most a block.
float largest_of(const float* logits, int64_t count) {
    Floats largest = broadcast(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    // If one operand is NaN, max returns the second.
    for (; i + 16 <= count; i += 16) largest = max(load(logits + i), largest);
    float lanes[16];
    store(lanes, largest);
    for (; i < count; ++i) lanes[0] = logits[i] > lanes[0] ? logits[i] : lanes[0];
    return *std::max_element(lanes, lanes + 16);
}

// The k-th largest value, of at least k; reorders them.
float kth_largest(float* values, int64_t count, int64_t k) {
    std::nth_element(values, values + k - 1, values + count, std::greater<float>());
    return values[k - 1];
}

// The least value v of which those above it add up to less than `needed`; the largest value if none
// does. Reorders the values, which are not negative.
float nucleus(float* values, int64_t count, double needed) {
    float least = *std::max_element(values, values + count);
    while (count > 0) {
        // The middle of three, so that sorted values are halved too.
        const float a = values[0], b = values[count / 2], c = values[count - 1];
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        float* equal = std::partition(values, values + count, [=](float v) { return v > pivot; });
        float* below = std::partition(equal, values + count, [=](float v) { return v == pivot; });
        double above = 0;
        for (const float* v = values; v < equal; ++v) above += *v;
        if (above >= needed) {
            count = equal - values;
            continue;
        }
        least = std::min(least, pivot);
        needed -= above + static_cast<double>(below - equal) * pivot;
        count -= below - values;
        values = below;
        if (needed <= 0) break;
    }
    return least;
}

// Room for what one thread works on. Entries are rounded up to whole blocks.
struct Scratch {
    Buffers values, others;
    std::unique_ptr<int32_t[]> tokens;
    std::unique_ptr<float[]> peaks;
    std::unique_ptr<double[]> sums;

    explicit Scratch(int64_t blocks)
        : values(buffers(1, blocks * kBlock)), others(buffers(1, blocks * kBlock)),
          tokens(new int32_t[blocks * kBlock]), peaks(new float[blocks]),
          sums(new double[blocks]) {}
};

class Row {
   public:
    Row(const float* logits, int64_t vocab, Scratch& scratch)
        : logits_(logits), vocab_(vocab), blocks_((vocab + kBlock - 1) / kBlock),
          values_(scratch.values.get()), others_(scratch.others.get()),
          tokens_(scratch.tokens.get()), peaks_(scratch.peaks.get()), sums_(scratch.sums.get()) {
        for (int64_t b = 0; b < blocks_; ++b) peaks_[b] = largest_of(logits_ + b * kBlock, size(b));
        peak_ = *std::max_element(peaks_, peaks_ + blocks_);
    }

    int64_t sample(const Choice& choice) {
        if (choice.temperature == 0 || !std::isfinite(peak_)) return first_largest();
        const bool some = choice.top_k > 0 && choice.top_k < static_cast<double>(vocab_);
        return some ? of_largest(choice) : of_all(choice);
    }

   private:
    const float* logits_;
    int64_t vocab_, blocks_;
    float *values_, *others_;
    int32_t* tokens_;  // those of `values_`, if they are not all
    float* peaks_;     // largest of each block
    double* sums_;     // of each block
    float peak_;

    int64_t size(int64_t block) const { return std::min(kBlock, vocab_ - block * kBlock); }

    int64_t first_largest() const {
        for (int64_t b = 0; b < blocks_; ++b)
            if (peaks_[b] == peak_)
                for (int64_t i = b * kBlock; i < b * kBlock + size(b); ++i)
                    if (logits_[i] == peak_) return i;
        return 0;  // all are NaN
    }

    // top_k leaves only some entries: these alone are looked at.
    int64_t of_largest(const Choice& choice) {
        const auto top_k = static_cast<int64_t>(choice.top_k);
        // As many blocks as top_k, if there are, have a logit of at least this: so the top_k are.
        float least = -std::numeric_limits<float>::infinity();
        if (top_k <= blocks_) {
            std::copy(peaks_, peaks_ + blocks_, others_);
            least = kth_largest(others_, blocks_, top_k);
        }
        const auto temperature = static_cast<float>(choice.temperature);
        int64_t count = 0;
        for (int64_t b = 0; b < blocks_; ++b) {
            if (!(peaks_[b] >= least)) continue;
            for (int64_t i = b * kBlock; i < b * kBlock + size(b); ++i) {
                values_[count] = logits_[i] / temperature;
                tokens_[count] = static_cast<int32_t>(i);
                count += logits_[i] >= least;
            }
        }
        if (count > top_k) {
            std::copy(values_, values_ + count, others_);
            count = keep(count, kth_largest(others_, count, top_k));
        }
        const float peak = peak_ / temperature;
        for (int64_t i = 0; i < count; ++i) values_[i] = std::exp(values_[i] - peak);
        if (choice.top_p < 1) {
            std::copy(values_, values_ + count, others_);
            const double needed = choice.top_p * std::accumulate(values_, values_ + count, 0.0);
            count = keep(count, nucleus(others_, count, needed));
        }
        if (choice.min_p > 0) count = keep(count, static_cast<float>(choice.min_p));
        const double target = choice.uniform * std::accumulate(values_, values_ + count, 0.0);
        return tokens_[drawn(0, count, 0, 0, target)];
    }

    // Of the first `count` entries those of at least `least`, in order; how many they are.
    int64_t keep(int64_t count, float least) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            values_[kept] = values_[i];
            tokens_[kept] = tokens_[i];
            kept += values_[i] >= least;
        }
        return kept;
    }

    int64_t of_all(const Choice& choice) {
        weigh(static_cast<float>(choice.temperature));
        double total = add_up(0);
        float least = 0;
        if (choice.top_p < 1) least = least_of_nucleus(choice.top_p * total);
        if (choice.min_p > 0) least = std::max(least, static_cast<float>(choice.min_p));
        if (least > 0) total = add_up(least);
        const double target = choice.uniform * total;
        int64_t block = 0;
        double before = 0, sum = 0;
        for (int64_t b = 0; b < blocks_ && sum <= target; ++b) {
            if (sums_[b] == 0) continue;
            block = b;
            before = sum;
            sum += sums_[b];
        }
        return drawn(block * kBlock, block * kBlock + size(block), before, least, target);
    }

    // The first of the entries with which their sum, and what comes before, is above the target.
    // No entry of 0 is; if none is, the last which is not 0.
    int64_t drawn(int64_t first, int64_t end, double sum, float least, double target) const {
        int64_t last = first;
        for (int64_t i = first; i < end; ++i) {
            if (!(values_[i] > 0 && values_[i] >= least)) continue;
            last = i;
            sum += values_[i];
            if (sum > target) break;
        }
        return last;
    }

    // e to the power of each logit, less the largest, over the temperature; and 0 to whole blocks.
    void weigh(float temperature) {
        const Floats divisor = broadcast(temperature), peak = broadcast(peak_ / temperature);
        // What exp makes of the least that it tells from minus infinity.
        const Floats nothing = broadcast(1.25e-38f);
        for (int64_t b = 0; b < blocks_; ++b) {
            Floats largest = zero();
            for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += 16) {
                const int64_t count = std::clamp<int64_t>(vocab_ - i, 0, 16);
                const Floats x = load_first(logits_ + i, count) / divisor;
                // If one operand is NaN, max returns the second.
                const Floats e = keep_first(max(zero(), exp(x - peak) - nothing), count);
                store(values_ + i, e);
                largest = max(largest, e);
            }
            alignas(64) float lanes[16];
            store(lanes, largest);
            peaks_[b] = *std::max_element(lanes, lanes + 16);
        }
    }

    // Sums of each block's entries of at least `least`, and of all.
    double add_up(float least) {
        double total = 0;
        for (int64_t b = 0; b < blocks_; ++b) {
            double lanes[16] = {};
            if (peaks_[b] >= least)
                for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += 16)
                    for (int j = 0; j < 16; ++j)
                        lanes[j] += values_[i + j] >= least ? values_[i + j] : 0.0f;
            sums_[b] = std::accumulate(lanes, lanes + 16, 0.0);
            total += sums_[b];
        }
        return total;
    }

    // Looks at the largest first, then at more and more.
    float least_of_nucleus(double needed) {
        for (float least = 0x1p-6f;; least *= 0x1p-6f) {
            int64_t count = 0;
            double total = 0;
            for (int64_t b = 0; b < blocks_; ++b) {
                if (peaks_[b] < least) continue;
                for (int64_t i = b * kBlock; i < b * kBlock + size(b); ++i) {
                    others_[count] = values_[i];
                    const bool counts = values_[i] >= least;
                    count += counts;
                    total += counts ? values_[i] : 0.0f;
                }
            }
            if (total >= needed || least == 0) return nucleus(others_, count, needed);
        }
    }
};

}  // namespace

// choices: (rows, 5), the fields of a TokenChoice in order; tokens: (rows).
extern "C" int nybble_sample_tokens(const float* logits, const double* choices, int64_t* tokens,
                                    int64_t rows, int64_t vocab, int threads) try {
    std::vector<Scratch> scratch;
    for (int i = 0; i < std::min<int64_t>(threads, rows); ++i)
        scratch.emplace_back((vocab + kBlock - 1) / kBlock);
    parallel_for(rows, static_cast<int>(scratch.size()), [&](int64_t r, int thread) {
        const double* c = choices + 5 * r;
        tokens[r] = Row(logits + r * vocab, vocab, scratch[thread])
                        .sample({c[0], c[1], c[2], c[3], c[4]});
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
