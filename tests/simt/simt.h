// Runs CUDA kernels on a CPU, and checks them as no GPU does. What its parts share:
//
//   scheduler.cpp   the threads of a block, as fibers in random order; barriers, warps, launches
//   memory.cpp      every access of a kernel: in bounds, aligned, initialised, free of races
//   order.h         which accesses the barriers and fences of a kernel order
//   report.cpp      where in the source an error is
//
// A kernel is compiled with -fsanitize=thread, which puts a call before each access to memory, but linked
// with memory.cpp in place of that sanitizer's library; so, too, with some checks of -fsanitize=undefined.
//
// What it does not see: a reach from one part of an allocation into another; what the lanes of a mask that is
// not full are ordered by; how many registers a kernel takes; and all that takes blocks at the same time.
//
// Environment: SIMT_SEED, the seed of the order of threads and blocks; SIMT_MAX_SHARED_BYTES, the shared
// memory that a block can have.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxSharedBytes = 232448;  // of a block, on an H100

// The thread of a kernel that runs; null outside of kernels.
struct Thread {
    unsigned index;
    const unsigned char *stack, *stack_end;
};
extern __thread const Thread* running __attribute__((tls_model("initial-exec")));

// Ends the launch with an error. Kernels are not unwound: the sanitizer's calls cannot throw.
[[noreturn]] void fail(const std::string& message);
[[noreturn]] void fail_as(const std::string& message);  // says the message alone, not where in the source

void preempt();  // lets other threads of the block run

// A block with more, some 64 accesses each, is taken to wait for ever.
extern uint64_t max_preemptions;

// For messages.
std::string describe(Site site);
std::string name_of(unsigned thread, unsigned block);
std::string name_of_running();

// The lines of the source that the addresses lie in, one a line; empty where there is no addr2line.
std::string source_lines(void* const* addresses, int count);

// Random numbers, from the seed.
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
