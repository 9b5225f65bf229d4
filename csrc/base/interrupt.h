// Lets Python's signal handlers run, and raise, during a long native call.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

namespace bigramx {

// Throws what a handler raised. Acquires the GIL. Set by bindings.cpp; does nothing without Python.
inline void (*handle_signals)() = [] {};

constexpr std::chrono::milliseconds kSignalInterval(40);

// Python runs handlers in this thread alone. In another one, acquiring the GIL while the interpreter ends
// would end the process.
inline bool is_main_thread() {
#if defined(__linux__)
    return getpid() == static_cast<pid_t>(syscall(SYS_gettid));
#elif defined(__APPLE__)
    return pthread_main_np() != 0;
#else
    return true;
#endif
}

// Call it without a lock: a thread that has the GIL may wait for the lock. Within a parallel region it does
// nothing, as what a handler does there would run in one thread.
class SignalCheck {
  public:
    // Whether handlers should run, after work on so many more elements: for few the clock is rarely read.
    bool is_due(int64_t elements = kElementsAReading) {
        if ((until_reading_ -= elements) > 0) return false;
        until_reading_ = kElementsAReading;
        return Clock::now() - last_ >= kSignalInterval && !at::in_parallel_region();
    }

    void handle() {
        last_ = Clock::now();
        if (!is_main_thread()) return;
        // A handler may compute gradients, which an op that is below autograd has excluded in this thread.
        c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
        keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
        const c10::impl::ForceDispatchKeyGuard above_autograd(keys);
        handle_signals();
    }

    void poll(int64_t elements = kElementsAReading) {
        if (is_due(elements)) handle();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr int64_t kElementsAReading = 1 << 16;

    int64_t until_reading_ = kElementsAReading;
    Clock::time_point last_ = Clock::now();
};

// Calls visit(begin, end) for one chunk of a range after the other; handlers run in between.
template <typename Visit>
void for_each_chunk(int64_t size, int64_t chunk_size, const Visit& visit) {
    if (size <= chunk_size) {
        if (size > 0) visit(0, size);
        return;
    }
    SignalCheck signals;
    for (int64_t begin = 0; begin < size; begin += chunk_size) {
        visit(begin, std::min(begin + chunk_size, size));
        signals.poll();
    }
}

// The time that a parallel region may take before handlers run. Its threads stop when it is over, and go on
// in the next.
class TimeSlice {
  public:
    void begin() {
        end_ = Clock::now() + kSignalInterval;
        is_over_.store(false, std::memory_order_relaxed);
    }

    // Reads the clock. Once a thread has got true, all do, from is_over() too.
    bool ends() {
        if (Clock::now() >= end_) is_over_.store(true, std::memory_order_relaxed);
        return is_over();
    }

    bool is_over() const { return is_over_.load(std::memory_order_relaxed); }

  private:
    using Clock = std::chrono::steady_clock;

    Clock::time_point end_;
    std::atomic<bool> is_over_{false};
};

}  // namespace bigramx
