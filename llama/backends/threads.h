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

// Dynamic scheduling: the items of a job are divided into one range per thread. A thread claims half of what is left of its
// own range, as often as it can, and then of the others: first long streams, and in the end little that others wait for.
// The caller claims items too, and waits only for those that workers have begun, never for a worker to wake. One caller
// runs a job at a time.
class ThreadPool {
    struct alignas(64) Range {
        std::atomic<uint64_t> ticket{0};  // high half: the job's number; low half: items not yet claimed, the last ones
        int64_t end;
    };
    static constexpr int MAX_RANGES = 64;  // more threads share ranges
    Range ranges[MAX_RANGES];
    std::mutex caller, sleep_mutex;
    std::condition_variable wake;
    std::atomic<int64_t> done{0};             // items
    std::atomic<int> sleeping{0}, active{1};  // numbers of threads; `active` includes the caller
    std::atomic<bool> idle{true};             // no job follows soon: workers sleep instead of spinning
    int started = 1;
    void (*work)(const void *, int64_t, int64_t) = nullptr;
    const void *argument = nullptr;

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    int count() const { return std::min<int>(active, MAX_RANGES); }  // of ranges
    bool has_items() const {
        for (int i = 0; i < count(); i++)
            if ((uint32_t)ranges[i].ticket.load()) return true;
        return false;
    }
    bool run_items(int number) {  // claims items for thread `number`; false if none are left
        for (int i = 0, n = count(); i < n; i++) {
            Range &range = ranges[(number + i) % n];
            uint64_t current = range.ticket.load(std::memory_order_acquire);
            while (const uint32_t left = current) {
                const uint32_t claimed = (left + 1) / 2;
                if (range.ticket.compare_exchange_weak(current, current - claimed, std::memory_order_acq_rel)) {
                    work(argument, range.end - left, range.end - left + claimed);
                    done.fetch_add(claimed, std::memory_order_release);
                    return true;
                }
            }
        }
        return false;
    }
    void worker(int number) {
        const auto has_work = [&] { return has_items() && number < active; };
        for (;;) {
            for (int i = 0; i < 3000 && !idle.load(std::memory_order_relaxed); i++)  // spins up to 0.1 ms
                if (number < active && run_items(number)) i = 0;
                else pause();
            std::unique_lock<std::mutex> guard(sleep_mutex);
            sleeping++;
            wake.wait(guard, has_work);
            sleeping--;
            guard.unlock();
            while (number < active && run_items(number)) {}
        }
    }

public:
    int size() const { return active; }
    void resize(int n) {
        const std::lock_guard<std::mutex> guard(caller);
        for (; started < n; started++) std::thread([this, number = started] { worker(number); }).detach();
        active = n;
    }
    void run(int64_t size, void (*function)(const void *, int64_t, int64_t), const void *context) {
        const std::lock_guard<std::mutex> guard(caller);
        work = function, argument = context, done = 0, idle = false;
        for (int64_t i = 0, n = count(), begin = 0; i < n; i++) {
            Range &range = ranges[i];
            range.end = size * (i + 1) / n;
            range.ticket = ((range.ticket >> 32) + 1) << 32 | (range.end - begin);
            begin = range.end;
        }
        if (sleeping) {
            { const std::lock_guard<std::mutex> wait(sleep_mutex); }  // for a worker that is about to sleep
            wake.notify_all();
        }
        while (run_items(0)) {}
        for (int i = 0; done.load(std::memory_order_acquire) < size; i++) i < 20000 ? pause() : std::this_thread::yield();
    }
    void set_idle() { idle = true; }
};

// Never destroyed, as its workers outlive main. A forked child has no workers, and gets a pool of its own.
static ThreadPool *pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    return new ThreadPool;
}();

// Calls work(begin, end) for ranges that make up [0, size).
template <typename Work>
static void parallel_for(int64_t size, const Work &work) {
    if (size > 1 && pool->size() > 1)
        pool->run(size, [](const void *w, int64_t begin, int64_t end) { (*(const Work *)w)(begin, end); }, &work);
    else if (size > 0)
        work(0, size);
}
// Calls work(row) for each row of `size` elements; in the calling thread if there are too few to be worth a job.
template <typename Work>
static void parallel_for_rows(int64_t rows, int64_t size, const Work &work) {
    const auto all = [&](int64_t r, int64_t end) {
        for (; r < end; r++) work(r);
    };
    if (rows * size < 4096) all(0, rows);
    else parallel_for(rows, all);
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
