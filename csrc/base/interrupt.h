// Lets Python's signal handlers run, and raise, in the middle of a long native call.
#pragma once

#include <chrono>

namespace bigramx {

// Throws what a handler raised. Set by bindings.cpp; without Python there is nothing to handle.
inline void (*handle_signals)() = [] {};

class SignalCheck {
  public:
    // Call it often, and without holding a lock: once an interval it waits for the interpreter.
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
