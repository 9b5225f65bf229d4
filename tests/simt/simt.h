// The GPU emulator: runs CUDA kernels on a CPU, with checks that no GPU performs. This header is what its
// parts share:
//
//   scheduler.cpp   runs the threads of a block, as fibers in random order; barriers, warps, launches
//   memory.cpp      checks every access of a kernel: in bounds, aligned, initialised, free of data races
//   order.h         which accesses are ordered by barriers and fences
//   report.cpp      finds the source lines of an error
//
// A kernel is compiled with -fsanitize=thread, which inserts a call before each memory access, but linked
// with memory.cpp in place of that sanitizer's library; the same goes for some checks of
// -fsanitize=undefined.
//
// Not detected: an access that strays from one part of an allocation into another. Not modelled: the order
// that a barrier of a partial mask creates between its lanes, registers, and blocks that run at the same
// time.
//
// Environment: SIMT_SEED, the seed for the order of threads and blocks; SIMT_MAX_SHARED_BYTES, the most
// shared memory that a block can have.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxSharedBytes = 232448;  // per block, on an H100

// A thread of a kernel; `running` is null outside of kernels.
struct Thread {
    unsigned index;
    const unsigned char *stack, *stack_end;
};
extern __thread const Thread* running __attribute__((tls_model("initial-exec")));

// Ends the launch with an error. The kernel's stack is not unwound: the sanitizer's calls cannot throw.
[[noreturn]] void fail(const std::string& message);
[[noreturn]] void fail_as(const std::string& message);  // without the source lines

void preempt();  // lets another thread of the block run

// A block with more preemptions, one in about 64 accesses, is considered to be in an endless loop.
extern uint64_t max_preemptions;

// For messages.
std::string describe(Site site);
std::string name_of(unsigned thread, unsigned block);
std::string name_of_running();

// The source lines of the addresses, one per line; empty if addr2line is not installed.
std::string source_lines(void* const* addresses, int count);

// Random numbers that depend only on the seed.
class Random {
  public:
    explicit Random(uint64_t seed) : seed_(seed), state_(seed) {}
    void seed(uint64_t seed) { *this = Random(seed); }
    uint64_t seed() const { return seed_; }

    // Below `end`.
    uint32_t operator()(uint32_t end) {
        state_ += 0x9E3779B97F4A7C15;
        uint64_t mixed = (state_ ^ state_ >> 32) * 0xD6E8FEB86659FD93;
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93;
        return static_cast<uint32_t>((mixed >> 32) * end >> 32);
    }

  private:
    uint64_t seed_, state_;
};
extern Random random_below;

}  // namespace simt
