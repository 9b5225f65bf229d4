// Lets Python's signal handlers run, and raise, during a long native call.
#pragma once

#include <chrono>

namespace bigramx {

// Throws what a handler raised. Set by bindings.cpp; does nothing without Python.
inline void (*handle_signals)() = [] {};

class SignalCheck {
  public:
    // Call it often, and without a lock: once per interval it acquires the GIL.
    void poll() {
        constexpr std::chrono::milliseconds kInterval(100);
        const auto now = std::chrono::steady_clock::now();
        if (now - last_ < kInterval) return;
        last_ = now;
        handle_signals();
    }

  private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace bigramx
