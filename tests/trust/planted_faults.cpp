// Faults that the sanitizers must find, called by test_sanitizers.py: linked into their builds alone, and
// compiled with the same flags as the package.
#include <ATen/Parallel.h>

#include <cstdint>

#define PLANTED extern "C" __attribute__((visibility("default")))

PLANTED int64_t overflow(int64_t value) { return value + 1; }

PLANTED int64_t to_integer(double value) { return static_cast<int64_t>(value); }

// Two threads of at::parallel_for write to one place.
PLANTED void race(int64_t* value) {
    at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) { *value = begin; });
}

// No fault: two threads write to a place each, which is read when both have ended.
PLANTED int64_t sum_in_parallel() {
    int64_t parts[2] = {1, 1};
    at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) parts[i] += i;
    });
    return parts[0] + parts[1];
}
