// A thread pool whose workers sleep when idle, and scratch buffers for each thread.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "vector.h"

// Dynamic scheduling: a job is split into chunks, which threads claim one by one. The caller claims chunks too, and at the
// end waits only for those that workers have begun, never for a worker to wake. One caller runs a job at a time.
class ThreadPool {
    std::mutex caller, sleep_mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> ticket{0};  // high half: the job's number; low half: chunks not yet claimed
    std::atomic<int64_t> done{0};  // chunks
    std::atomic<int> sleeping{0}, active{1};  // numbers of threads; `active` includes the caller
    std::atomic<bool> idle{true};  // no job follows soon: workers sleep instead of spinning
    int started = 1;
    void (*work)(const void *, int64_t) = nullptr;
    const void *argument = nullptr;

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    bool has_chunks() const { return (uint32_t)ticket.load(); }
    bool run_chunk() {  // claims a chunk; false if none is left
        uint64_t current = ticket.load(std::memory_order_acquire);
        while ((uint32_t)current)
            if (ticket.compare_exchange_weak(current, current - 1, std::memory_order_acq_rel)) {
                work(argument, (uint32_t)current - 1);
                done.fetch_add(1, std::memory_order_release);
                return true;
            }
        return false;
    }
    void worker(int number) {
        const auto has_work = [&] { return has_chunks() && number < active; };
        for (;;) {
            for (int i = 0; i < 3000 && !idle.load(std::memory_order_relaxed); i++)  // spins up to 0.1 ms
                if (has_work() && run_chunk()) i = 0;
                else pause();
            std::unique_lock<std::mutex> guard(sleep_mutex);
            sleeping++;
            wake.wait(guard, has_work);
            sleeping--;
            guard.unlock();
            while (number < active && run_chunk()) {}
        }
    }

public:
    int size() const { return active; }
    void resize(int n) {
        const std::lock_guard<std::mutex> guard(caller);
        for (; started < n; started++) std::thread([this, number = started] { worker(number); }).detach();
        active = n;
    }
    void run(int64_t chunks, void (*function)(const void *, int64_t), const void *context) {
        const std::lock_guard<std::mutex> guard(caller);
        work = function, argument = context, done = 0, idle = false;
        ticket = ((ticket >> 32) + 1) << 32 | chunks;
        if (sleeping) {
            { const std::lock_guard<std::mutex> wait(sleep_mutex); }  // for a worker that is about to sleep
            wake.notify_all();
        }
        while (run_chunk()) {}
        for (int i = 0; done.load(std::memory_order_acquire) < chunks; i++) i < 20000 ? pause() : std::this_thread::yield();
    }
    void set_idle() { idle = true; }
};

// Never destroyed, as its workers outlive main. A forked child has no workers, and gets a pool of its own.
static ThreadPool *pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    return new ThreadPool;
}();

// Calls work(begin, end) for chunks of [0, size), whose lengths are multiples of `grain`: about `chunks_per_thread` for
// each thread, so that a slow thread claims fewer.
template <typename Work>
static void parallel_for(int64_t size, int64_t grain, const Work &work, int64_t chunks_per_thread = 8) {
    const int64_t chunk = std::max<int64_t>(1, size / grain / (chunks_per_thread * pool->size())) * grain;
    const int64_t chunks = (size + chunk - 1) / chunk;
    const auto call = [&](int64_t i) { work(i * chunk, std::min(size, (i + 1) * chunk)); };
    if (chunks <= 1 || pool->size() == 1) {
        for (int64_t i = 0; i < chunks; i++) call(i);
        return;
    }
    pool->run(chunks, [](const void *c, int64_t i) { (*(decltype(call) *)c)(i); }, &call);
}
// Calls work(row) for each row of `size` elements; in the calling thread if there are too few to be worth a job.
template <typename Work>
static void parallel_for_rows(int64_t rows, int64_t size, const Work &work) {
    const auto all = [&](int64_t r, int64_t end) {
        for (; r < end; r++) work(r);
    };
    if (rows * size < 4096) all(0, rows);
    else parallel_for(rows, 1, all);
}

// A thread's scratch buffers, which are kept for the next call, so that their pages are faulted in once.
enum Buffer { WEIGHT_TILE, COLUMNS, BF16_X, PACKED_X, QUANTIZED_X, SCORES, PACKED_KV, ACTIVATIONS };
template <Buffer>
static void *scratch(size_t bytes) {
    static thread_local struct Memory {
        void *address = nullptr;
        size_t size = 0;
        ~Memory() { free(address); }
    } kept;
    if (bytes > kept.size) {
        free(kept.address);
        kept.size = (bytes + 4095) / 4096 * 4096;
        kept.address = aligned_alloc(4096, kept.size);
        if (!kept.address) abort();
    }
    return kept.address;
}
