// A pool of threads that sleep when idle, and scratch memory that each keeps.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "vector.h"

// A job has parts, which threads claim one by one. The caller claims too, and waits only for parts that others have begun:
// never for a thread to wake. One caller at a time; others wait for it.
class Pool {
    std::mutex caller, lock;
    std::condition_variable bell;
    std::atomic<uint64_t> ticket{0};  // the number of the job in the high half, parts not yet claimed in the low one
    std::atomic<int64_t> done{0};
    std::atomic<int> asleep{0}, wanted{1};
    std::atomic<bool> idle{true};  // no job will follow soon
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
    bool parts_left() const { return (uint32_t)ticket.load(); }
    bool part() {
        uint64_t now = ticket.load(std::memory_order_acquire);
        while ((uint32_t)now)
            if (ticket.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel)) {
                work(argument, (uint32_t)now - 1);
                done.fetch_add(1, std::memory_order_release);
                return true;
            }
        return false;
    }
    void serve(int number) {
        const auto mine = [&] { return parts_left() && number < wanted; };
        for (;;) {
            for (int i = 0; i < 3000 && !idle.load(std::memory_order_relaxed); i++)  // up to 0.1 ms
                if (mine() && part()) i = 0;
                else pause();
            std::unique_lock<std::mutex> guard(lock);
            asleep++;
            bell.wait(guard, mine);
            asleep--;
            guard.unlock();
            while (number < wanted && part()) {}
        }
    }

public:
    int size() const { return wanted; }
    void resize(int n) {
        const std::lock_guard<std::mutex> guard(caller);
        for (; started < n; started++) std::thread([this, number = started] { serve(number); }).detach();
        wanted = n;
    }
    void run(int64_t parts, void (*what)(const void *, int64_t), const void *with) {
        const std::lock_guard<std::mutex> guard(caller);
        work = what, argument = with, done = 0, idle = false;
        ticket = ((ticket >> 32) + 1) << 32 | parts;
        if (asleep) {
            { const std::lock_guard<std::mutex> wait(lock); }  // for one that is about to sleep
            bell.notify_all();
        }
        while (part()) {}
        for (int i = 0; done.load(std::memory_order_acquire) < parts; i++) i < 20000 ? pause() : std::this_thread::yield();
    }
    void rest() { idle = true; }
};

// Never destroyed, as its threads outlive main. A forked child has none of them, and gets a pool of its own.
static Pool *pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
}();

// Calls work(begin, end) for parts of [0, whole) that are multiples of `unit`, about `each` of them for each thread, so
// that a slow one takes fewer.
template <typename Work>
static void parallel_for(int64_t whole, int64_t unit, const Work &work, int64_t each = 8) {
    const int64_t some = std::max<int64_t>(1, whole / unit / (each * pool->size())) * unit;
    const int64_t parts = (whole + some - 1) / some;
    const auto call = [&](int64_t i) { work(i * some, std::min(whole, (i + 1) * some)); };
    if (parts <= 1 || pool->size() == 1) {
        for (int64_t i = 0; i < parts; i++) call(i);
        return;
    }
    pool->run(parts, [](const void *c, int64_t i) { (*(decltype(call) *)c)(i); }, &call);
}
// Calls work(row) for each row of so many numbers; a few are not worth sharing.
template <typename Work>
static void each_row(int64_t rows, int64_t size, const Work &work) {
    const auto all = [&](int64_t r, int64_t end) {
        for (; r < end; r++) work(r);
    };
    if (rows * size < 4096) all(0, rows);
    else parallel_for(rows, 1, all);
}

// Memory of a thread for each purpose, kept for the next call: its page faults happen once.
enum Purpose { TILE, NARROW, COLUMNS, ROWS, SCORES, KEYS, PASS };
template <Purpose purpose>
static void *scratch(size_t bytes) {
    static thread_local struct Kept {
        void *memory = nullptr;
        size_t size = 0;
        ~Kept() { free(memory); }
    } kept;
    if (bytes > kept.size) {
        free(kept.memory);
        kept.size = (bytes + 4095) / 4096 * 4096;
        kept.memory = aligned_alloc(4096, kept.size);
        if (!kept.memory) abort();
    }
    return kept.memory;
}
