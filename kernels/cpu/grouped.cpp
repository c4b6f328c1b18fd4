// Packed weights of which every row uses those of its experts; kernels/reference.py
// (grouped_matmul) defines it. Only experts with rows are read; each is multiplied as by
// nybble_packed_matmul, so that a row's result does not depend on the others.

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "product.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

// Addresses of one expert's tensors, as the Python side lays them out.
struct Expert {
    const uint8_t* codes;
    const void* scales;
    const void* zeros;     // or null
    const float* bias;     // or null
    const int32_t* perm;   // or null
};

struct Grouped {
    const bf16* x;         // (rows, inputs), or (rows, top_k, inputs) if x_per_expert
    const Expert* experts;
    const float* levels;   // (16), those of all experts
    const int64_t* ids;    // (rows, top_k)
    const float* weights;  // (rows, top_k) or null
    bf16* out;             // (rows, top_k, outputs), or (rows, outputs) if there are weights
    int64_t rows, top_k, x_per_expert, count, inputs, outputs, columns, groups, octets_per_group;
    int scale_type, threads;
};

// Row `place` of all (rows, top_k).
const bf16* row_of(const Grouped& g, int64_t place) {
    return g.x + (g.x_per_expert ? place : place / g.top_k) * g.inputs;
}

// The same in the order of an expert's stored columns.
void gather(const Grouped& g, int64_t place, const int32_t* perm, int64_t padded, bf16* target) {
    const bf16* source = row_of(g, place);
    if (perm)
        for (int64_t k = 0; k < g.columns; ++k) target[k] = source[perm[k]];
    else
        std::memcpy(target, source, g.columns * sizeof(bf16));
    std::fill(target + g.columns, target + padded, bf16{0});
}

// Σ over top_k of weight · y, where y[slots[place]] belongs to a place.
void combine(const Grouped& g, int64_t row, const int64_t* slots, const bf16* y) {
    for (int64_t n = 0; n < g.outputs; n += 16) {
        const int64_t some = std::min<int64_t>(16, g.outputs - n);
        Floats total = zero();
        for (int64_t k = 0; k < g.top_k; ++k) {
            const int64_t place = row * g.top_k + k;
            const bf16* from = y + slots[place] * g.outputs + n;
            bf16 last[16] = {};
            if (some < 16) from = static_cast<bf16*>(std::memcpy(last, from, some * sizeof(bf16)));
            // Not fused, so that the sum is that of the reference.
            total = total + broadcast(g.weights[place]) * load_bf16(from);
        }
        store_bf16_first(g.out + row * g.outputs + n, total, some);
    }
}

template <class AnyProduct>
void run(const Grouped& g) {
    const int64_t places = g.rows * g.top_k, padded = (g.columns + 7) / 8 * 8;
    // A group may be larger than the weight, and buffers are made for one.
    const int64_t octets_per_group = std::min(g.octets_per_group, padded / 8);
    // Where each expert's rows begin once they are sorted by expert, and each place's slot there.
    std::vector<int64_t> starts(g.count + 1), slots(places), place_of(places);
    for (int64_t i = 0; i < places; ++i) ++starts[g.ids[i] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1), used;
    for (int64_t i = 0; i < places; ++i) {
        slots[i] = next[g.ids[i]]++;
        place_of[slots[i]] = i;
    }
    for (int64_t e = 0; e < g.count; ++e)
        if (starts[e + 1] > starts[e]) used.push_back(e);
    // The most work first, so that no thread begins with it when the others are done.
    std::stable_sort(used.begin(), used.end(), [&](int64_t a, int64_t b) {
        return starts[a + 1] - starts[a] > starts[b + 1] - starts[b];
    });
    // A row that its expert has alone is not copied: in a decode step other threads would wait for it.
    const auto alone = [&](int64_t e) { return starts[e + 1] - starts[e] == 1; };
    const auto read_in_place = [&](int64_t e) {
        return alone(e) && !g.experts[e].perm && g.columns == padded;
    };
    const auto written_in_place = [&](int64_t e) { return alone(e) && !g.weights; };
    std::unique_ptr<bf16[]> x(new bf16[places * padded]), y(new bf16[places * g.outputs]);
    const int movers = places > 64 ? g.threads : 1;
    parallel_for_small(places, movers, [&](int64_t slot, int) {
        const int64_t place = place_of[slot], e = g.ids[place];
        if (!read_in_place(e)) gather(g, place, g.experts[e].perm, padded, x.get() + slot * padded);
    });
    std::vector<std::unique_ptr<AnyProduct>> products;
    products.reserve(used.size());
    int64_t size = 0;
    for (const int64_t e : used) {
        const Expert& expert = g.experts[e];
        const int64_t first = starts[e], place = place_of[first];
        const PackedArgs args{read_in_place(e) ? row_of(g, place) : x.get() + first * padded,
                              expert.codes,
                              expert.scales,
                              expert.zeros,
                              g.levels,
                              expert.bias,
                              written_in_place(e) ? g.out + place * g.outputs
                                                  : y.get() + first * g.outputs,
                              starts[e + 1] - first,
                              g.outputs,
                              padded,
                              padded / 8,
                              g.groups,
                              octets_per_group,
                              g.scale_type,
                              1};
        products.push_back(std::make_unique<AnyProduct>(args, g.threads));
        size = std::max(size, products.back()->buffer_size());
    }
    const auto experts = static_cast<int64_t>(products.size());
    const int64_t tiles = (g.outputs + 15) / 16;
    const int64_t rows = experts ? places / experts : 0;  // of an expert, on average
    const int64_t each = tiles_of_task(experts * tiles, padded / 8 * rows, g.threads);
    const int64_t tasks = (tiles + each - 1) / each;  // of an expert
    const auto all_buffers = buffers(g.threads, size);
    parallel_for(experts * tasks, g.threads, [&](int64_t task, int thread) {
        const int64_t first = task % tasks * each;
        multiply_tiles(*products[task / tasks], first, std::min(first + each, tiles),
                       all_buffers.get() + thread * size);
    });
    parallel_for_small(g.rows, movers, [&](int64_t row, int) {
        if (g.weights) return combine(g, row, slots.data(), y.get());
        for (int64_t place = row * g.top_k; place < (row + 1) * g.top_k; ++place)
            if (!written_in_place(g.ids[place]))
                std::memcpy(g.out + place * g.outputs, y.get() + slots[place] * g.outputs,
                            g.outputs * sizeof(bf16));
    });
}

}  // namespace

// All experts have one size, one group size and one kind of scales and zeros. `columns` are the
// stored ones, `ids` below `count`.
extern "C" int nybble_grouped_matmul(const bf16* x, const void* experts, const float* levels,
                                     const int64_t* ids, const float* weights, bf16* out,
                                     int64_t rows, int64_t top_k, int64_t x_per_expert,
                                     int64_t count, int64_t inputs, int64_t outputs,
                                     int64_t columns, int64_t groups, int64_t octets_per_group,
                                     int scale_type, int activation_bits, int threads) try {
    const Grouped g{x,     static_cast<const Expert*>(experts),
                    levels, ids,
                    weights, out,
                    rows,  top_k,
                    x_per_expert, count,
                    inputs, outputs,
                    columns, groups,
                    octets_per_group, scale_type,
                    threads};
    with_product(levels, 1, activation_bits, [&](auto tag) { run<typename decltype(tag)::type>(g); });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
