// Works on the threads of the kernels' pool in the ways that a server does; test_cpu_threads.py
// compiles it with the pool and runs it. Ends with 1 at the first wrong result.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "threads.h"

using nybble::parallel_for;
using nybble::parallel_for_small;

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

// Tasks of different length, more or fewer than there are threads.
void job(int round) {
    const int64_t count = round % 37;
    const int threads = 1 + round % 5;
    std::vector<int> done(count), of_thread(threads);
    const auto task = [&](int64_t index, int thread) {
        require(thread >= 0 && thread < threads, "a thread has a number that is not below `threads`");
        for (volatile int i = 0; i < (round * 7 + index * 13) % 500; i = i + 1) {}
        ++done[index];
        ++of_thread[thread];  // a race, if two that run at once have the same number
    };
    if (round % 2)
        parallel_for(count, threads, task);
    else
        parallel_for_small(count, threads, task);
    int64_t all = 0;
    for (const int times : done) require(times == 1, "a task was not done once");
    for (const int tasks : of_thread) all += tasks;
    require(all == count, "two threads had one number");
}

}  // namespace

int main() {
    for (int round = 0; round < 5000; ++round) job(round);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([caller] {
            for (int round = 0; round < 1000; ++round) {
                job(round + caller);
                if (round % 100 == 0) usleep(1000);  // so that the pool's threads sleep
            }
        });
    for (std::thread& caller : callers) caller.join();
#if !defined(__SANITIZE_THREAD__)  // which cannot follow a process that forks with threads
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        for (int round = 0; round < 500; ++round) job(round);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    require(status == 0, "a forked process does not compute as its parent does");
#endif
}
