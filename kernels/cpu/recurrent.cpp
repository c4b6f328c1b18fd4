// Layers that keep a state of each sequence; kernels/recurrent.py defines them.
//
// Rows of a sequence are computed one after the other, always in the same order of additions, so
// that cutting a prompt into chunks changes no bit.

#include <algorithm>
#include <cstring>

#include "simd.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

struct Bf16 {
    using type = bf16;
    static Floats load16(const bf16* source) { return load_bf16(source); }
    static void store16(bf16* target, Floats a) { store_bf16(target, a); }
};

struct Float32 {
    using type = float;
    static Floats load16(const float* source) { return load(source); }
    static void store16(float* target, Floats a) { store(target, a); }
};

// Row `row` of a sequence whose chunk begins at x and whose earlier rows are in `before`: null for
// zeros, else taps − 1 rows.
template <typename T>
const T* row_at(const T* x, const T* before, int64_t row, int64_t history, int64_t stride,
                int64_t channels) {
    if (row >= 0) return x + row * stride;
    return before ? before + (history + row) * channels : nullptr;
}

template <typename Type, typename T = typename Type::type>
void convolve(const T* x, const float* weight, const float* bias, T* state, const int32_t* starts,
              const int32_t* read, const int32_t* write, const int32_t* snapshot,
              const int32_t* snapshot_rows, T* out, int64_t seqs, int64_t channels, int64_t taps,
              int64_t stride, int threads) {
    const int64_t history = taps - 1, slot_size = history * channels;
    // Each task has 16 channels of one sequence: it reads all it needs of a state before it writes.
    const int64_t parts = channels / 16;
    parallel_for(seqs * parts, threads, starts[seqs] > 8, [=](int64_t task) {
        const int64_t seq = task / parts, at = task % parts * 16;
        const int64_t first = starts[seq], rows = starts[seq + 1] - first;
        const T* input = x + first * stride + at;
        const T* before = read[seq] < 0 ? nullptr : state + read[seq] * slot_size + at;
        for (int64_t row = 0; row < rows; ++row) {
            Floats total = bias ? load(bias + at) : zero();
            for (int64_t tap = 0; tap < taps; ++tap) {
                const T* source = row_at(input, before, row - history + tap, history, stride, channels);
                if (source)
                    total = total + Type::load16(source) * load(weight + tap * channels + at);
            }
            Type::store16(out + (first + row) * channels + at, total);
        }
        const auto keep = [&](int32_t slot, int64_t reached) {
            if (slot < 0) return;
            T* target = state + slot * slot_size + at;
            // In this order a slot can take the place of the one that is read.
            for (int64_t i = 0; i < history; ++i) {
                const T* source =
                    row_at(input, before, reached - history + i, history, stride, channels);
                if (source)
                    std::memmove(target + i * channels, source, 16 * sizeof(T));
                else
                    std::memset(target + i * channels, 0, 16 * sizeof(T));
            }
        };
        keep(snapshot[seq], snapshot_rows[seq]);
        keep(write[seq], rows);
    });
}

// A query or key divided by its length, times `scale`.
void unit(const float* x, int64_t size, float eps, float scale, float* target) {
    Floats squares = zero();
    for (int64_t i = 0; i < size; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const Floats by = broadcast(scale / std::sqrt(sum(squares) + eps));
    for (int64_t i = 0; i < size; i += 16) store(target + i, load(x + i) * by);
}

// One row for `kVectors` vectors of a head's values: state and values begin there.
template <int kVectors>
void delta_row(float* state, const float* q, const float* k, const float* v, float decay,
               float beta, float* out, int64_t key_dim, int64_t value_dim) {
    Floats seen[kVectors], change[kVectors], read[kVectors];
    for (int i = 0; i < kVectors; ++i) seen[i] = read[i] = zero();
    for (int64_t d = 0; d < key_dim; ++d) {
        const Floats key = broadcast(k[d]);
        for (int i = 0; i < kVectors; ++i)
            seen[i] = fma(load(state + d * value_dim + i * 16), key, seen[i]);
    }
    const Floats by = broadcast(decay), rate = broadcast(beta);
    for (int i = 0; i < kVectors; ++i) change[i] = (load(v + i * 16) - seen[i] * by) * rate;
    for (int64_t d = 0; d < key_dim; ++d) {
        const Floats key = broadcast(k[d]), query = broadcast(q[d]);
        for (int i = 0; i < kVectors; ++i) {
            float* entry = state + d * value_dim + i * 16;
            const Floats next = fma(key, change[i], load(entry) * by);
            store(entry, next);
            read[i] = fma(next, query, read[i]);
        }
    }
    for (int i = 0; i < kVectors; ++i) store(out + i * 16, read[i]);
}

// One row for `kVectors` vectors of a head: state and values begin there.
template <int kVectors>
void scan_row(float* state, const float* b, const float* c, const float* x, float decay, float dt,
              float* out, int64_t state_dim, int64_t head_dim) {
    Floats added[kVectors], read[kVectors];
    const Floats by = broadcast(decay);
    for (int i = 0; i < kVectors; ++i) {
        added[i] = load(x + i * 16) * broadcast(dt);
        read[i] = zero();
    }
    for (int64_t d = 0; d < state_dim; ++d) {
        const Floats key = broadcast(b[d]), query = broadcast(c[d]);
        for (int i = 0; i < kVectors; ++i) {
            float* entry = state + d * head_dim + i * 16;
            const Floats next = fma(key, added[i], load(entry) * by);
            store(entry, next);
            read[i] = fma(next, query, read[i]);
        }
    }
    for (int i = 0; i < kVectors; ++i) store(out + i * 16, read[i]);
}

// Which slots a batch's sequences read and write.
struct Slots {
    const int32_t *starts, *read, *write, *snapshot, *snapshot_rows;
    int64_t seqs;
};

// Takes each head of each sequence through its rows: `step(s, row, head, scratch)` changes the
// head's state s, of `size` floats, by a row. Each thread has `room` floats for its own use.
template <typename Step>
int recur(const Slots& slots, float* state, int64_t heads, int64_t size, int64_t room, int threads,
          Step step) try {
    const int64_t slot_size = heads * size;
    const auto all_buffers = buffers(threads, room + size);
#pragma omp parallel num_threads(threads) if (slots.seqs * heads > 1)
    {
        float* scratch = all_buffers.get() + thread_number() * (room + size);
        float* unkept = scratch + room;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < slots.seqs * heads; ++task) {
            const int64_t seq = task / heads, head = task % heads;
            const int32_t read = slots.read[seq], write = slots.write[seq];
            const int32_t snapshot = slots.snapshot[seq];
            float* s = write < 0 ? unkept : state + write * slot_size + head * size;
            if (read < 0)
                std::memset(s, 0, size * sizeof(float));
            else if (read != write)
                std::memcpy(s, state + read * slot_size + head * size, size * sizeof(float));
            const int64_t first = slots.starts[seq];
            for (int64_t row = first; row < slots.starts[seq + 1]; ++row) {
                step(s, row, head, scratch);
                if (snapshot >= 0 && row - first + 1 == slots.snapshot_rows[seq])
                    std::memcpy(state + snapshot * slot_size + head * size, s,
                                size * sizeof(float));
            }
        }
    }
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}

}  // namespace

extern "C" {

// Rows of x are `stride` apart; those of out are contiguous. channels is a multiple of 16.
void nybble_short_convolution(const void* x, const float* weight, const float* bias, void* state,
                              const int32_t* starts, const int32_t* read, const int32_t* write,
                              const int32_t* snapshot, const int32_t* snapshot_rows, void* out,
                              int64_t seqs, int64_t channels, int64_t taps, int64_t stride,
                              int is_bf16, int threads) {
    if (is_bf16)
        convolve<Bf16>(static_cast<const bf16*>(x), weight, bias, static_cast<bf16*>(state), starts,
                       read, write, snapshot, snapshot_rows, static_cast<bf16*>(out), seqs,
                       channels, taps, stride, threads);
    else
        convolve<Float32>(static_cast<const float*>(x), weight, bias, static_cast<float*>(state),
                          starts, read, write, snapshot, snapshot_rows, static_cast<float*>(out),
                          seqs, channels, taps, stride, threads);
}

// All contiguous float32. key_dim and value_dim are multiples of 16.
int nybble_gated_delta_rule(const float* q, const float* k, const float* v, const float* g,
                            const float* beta, float* state, const int32_t* starts,
                            const int32_t* read, const int32_t* write, const int32_t* snapshot,
                            const int32_t* snapshot_rows, float* out, int64_t seqs,
                            int64_t key_heads, int64_t value_heads, int64_t key_dim,
                            int64_t value_dim, float eps, int threads) {
    const Slots slots{starts, read, write, snapshot, snapshot_rows, seqs};
    const auto step = [&](float* s, int64_t row, int64_t head, float* query) {
        float* key = query + key_dim;
        const int64_t shared = head / (value_heads / key_heads);
        const int64_t from = (row * key_heads + shared) * key_dim;
        unit(q + from, key_dim, eps, 1 / std::sqrt(static_cast<float>(key_dim)), query);
        unit(k + from, key_dim, eps, 1.0f, key);
        const int64_t at = row * value_heads + head;
        const float decay = std::exp(g[at]), rate = beta[at];
        const float* values = v + at * value_dim;
        float* target = out + at * value_dim;
        int64_t i = 0;
        for (; i + 64 <= value_dim; i += 64)
            delta_row<4>(s + i, query, key, values + i, decay, rate, target + i, key_dim,
                         value_dim);
        for (; i < value_dim; i += 16)
            delta_row<1>(s + i, query, key, values + i, decay, rate, target + i, key_dim,
                         value_dim);
    };
    return recur(slots, state, value_heads, key_dim * value_dim, 2 * key_dim, threads, step);
}

// All contiguous float32. head_dim is a multiple of 16.
int nybble_state_space_scan(const float* x, const float* b, const float* c, const float* dt,
                            const float* g, float* state, const int32_t* starts,
                            const int32_t* read, const int32_t* write, const int32_t* snapshot,
                            const int32_t* snapshot_rows, float* out, int64_t seqs, int64_t groups,
                            int64_t heads, int64_t state_dim, int64_t head_dim, int threads) {
    const Slots slots{starts, read, write, snapshot, snapshot_rows, seqs};
    const auto step = [&](float* s, int64_t row, int64_t head, float*) {
        const int64_t from = (row * groups + head / (heads / groups)) * state_dim;
        const int64_t at = row * heads + head;
        const float decay = std::exp(g[at]);
        const float* values = x + at * head_dim;
        float* target = out + at * head_dim;
        int64_t i = 0;
        for (; i + 64 <= head_dim; i += 64)
            scan_row<4>(s + i, b + from, c + from, values + i, decay, dt[at], target + i, state_dim,
                        head_dim);
        for (; i < head_dim; i += 16)
            scan_row<1>(s + i, b + from, c + from, values + i, decay, dt[at], target + i, state_dim,
                        head_dim);
    };
    return recur(slots, state, heads, state_dim * head_dim, 0, threads, step);
}

}  // extern "C"
