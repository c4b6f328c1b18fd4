// A pool of threads that go on looking for work for a moment before they sleep.
//
// OpenMP's runtime is not used. If a process has several threads that compute (one loads a model,
// another runs it), GCC's starts a pool for each, and as these are more threads than processors,
// lets them sleep at once at every barrier. Waking one takes as long as a small product.

#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace nybble {
namespace {

using Clock = std::chrono::steady_clock;

// For so long a thread looks for work before it sleeps: longer than what one thread computes alone
// between two parts of a step, and much shorter than a step.
constexpr auto kLooks = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `done()` or for kLooks; returns whether it is done.
template <class Done>
bool look(Done done) {
    if (done()) return true;
    const auto end = Clock::now() + kLooks;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < end);
    return done();
}

class Pool {
   public:
    void run(int64_t count, int threads, Call call, const void* task) {
        // Two that compute at once have too few processors anyway: the second does without threads.
        if (busy_.exchange(true, std::memory_order_acquire)) return alone(count, call, task);
        const auto seats = static_cast<uint64_t>(std::min<int64_t>(threads, count)) - 1;
        if (hire(seats))
            share(seats, count, call, task);
        else
            alone(count, call, task);
        busy_.store(false, std::memory_order_release);
    }

   private:
    static constexpr int kJobShift = 16;
    static constexpr uint64_t kSeatMask = (1 << kJobShift) - 1;

    std::atomic<bool> busy_{false};
    uint64_t workers_ = 0;

    // The job: written before its seats are offered.
    Call call_ = nullptr;
    const void* task_ = nullptr;
    int64_t count_ = 0;

    // The job's number and the seats left for threads that want to work on it. A thread that has
    // taken one is waited for.
    alignas(64) std::atomic<uint64_t> seats_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> finished_{0};

    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> waits_{false};  // whoever shares out the job, for the last to finish
    std::mutex bed_;
    std::condition_variable wake_, done_;

    static void alone(int64_t count, Call call, const void* task) {
        for (int64_t index = 0; index < count; ++index) call(task, index, 0);
    }

    void share(uint64_t seats, int64_t count, Call call, const void* task) {
        call_ = call;
        task_ = task;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        const uint64_t job = (seats_.load(std::memory_order_relaxed) >> kJobShift) + 1;
        seats_.store(job << kJobShift | seats);
        if (sleepers_.load() > 0) {
            { const std::lock_guard<std::mutex> guard(bed_); }
            wake_.notify_all();
        }
        work(0);
        // Who has not come yet is not needed any more.
        const uint64_t left = seats_.exchange(job << kJobShift) & kSeatMask;
        const auto all = [&] { return finished_.load() == seats - left; };
        if (!look(all)) {
            std::unique_lock<std::mutex> guard(bed_);
            waits_.store(true);
            done_.wait(guard, all);
            waits_.store(false);
        }
    }

    // Whether there are so many workers or, if the system gives no more, any.
    bool hire(uint64_t workers) {
        try {
            for (; workers_ < std::min(workers, kSeatMask); ++workers_)
                std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
        }
        return workers_ > 0;
    }

    void work(int thread) {
        for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
            call_(task_, index, thread);
    }

    void serve() {
        for (uint64_t job = 0;;) {  // the last one worked on
            uint64_t seen = 0;
            const auto offered = [&] {
                seen = seats_.load();
                return seen >> kJobShift != job && (seen & kSeatMask) > 0;
            };
            if (!look(offered)) {
                std::unique_lock<std::mutex> guard(bed_);
                ++sleepers_;
                wake_.wait(guard, offered);
                --sleepers_;
            }
            if (!seats_.compare_exchange_strong(seen, seen - 1)) continue;
            job = seen >> kJobShift;
            work(static_cast<int>(seen & kSeatMask));
            finished_.fetch_add(1);
            if (waits_.load()) {
                { const std::lock_guard<std::mutex> guard(bed_); }
                done_.notify_one();
            }
        }
    }
};

// Never destroyed, as its threads run until the process ends. A forked process has none of them.
Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
}();

}  // namespace

void run_parallel(int64_t count, int threads, Call call, const void* task) {
    pool->run(count, threads, call, task);
}

}  // namespace nybble
