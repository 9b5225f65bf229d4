// Collective operations of a warp and of a block: reductions, scans, the last block of a grid; and of kernels
// that overlap. All threads of the block must call a block function, all lanes of the warp a warp function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/base/types.h"
#include "sampling/philox.h"

#if defined(__CUDACC__)
// What assert() calls; not declared where NDEBUG is defined.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept;
#endif

namespace bigramx::cuda {

constexpr int kWarp = 32;  // lanes
constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps_of_block() { return (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp; }

// Aborts the kernel and all later work of the context, as the assertions of PyTorch's kernels do. `message`
// names the op.
__device__ inline void device_assert(bool condition, const char* message) {
    if (!condition) __assert_fail(message, __FILE__, __LINE__, __func__);
}

// A bump allocator over the dynamic shared memory of a block; each part is aligned to 16 bytes. The host sums
// bytes<T>(count) over the parts for the launch.
class SharedMemory {
  public:
    __device__ SharedMemory() {
        extern __shared__ __align__(16) unsigned char bigramx_shared_memory[];
        next_ = bigramx_shared_memory;
    }

    template <typename T>
    __device__ T* take(int64_t count) {
        T* const part = reinterpret_cast<T*>(next_);
        next_ += bytes<T>(count);
        return part;
    }

    // The bytes that take<T>(count) takes.
    template <typename T>
    static constexpr __host__ __device__ int64_t bytes(int64_t count) {
        return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    }

  private:
    unsigned char* next_;
};

// -------------------------------------------------------------------------------------------------- warps

// shuffle(part) for a value of any trivially copyable type whose size is a multiple of 4 bytes: whole, or in
// parts.
template <typename T, typename Shuffle>
__device__ inline T shuffle_parts(T value, const Shuffle& shuffle) {
    if constexpr (std::is_same_v<T, unsigned __int128>) {
        const uint64_t high = shuffle(static_cast<uint64_t>(value >> 64));
        return static_cast<T>(high) << 64 | shuffle(static_cast<uint64_t>(value));
    } else if constexpr (std::is_arithmetic_v<T>) {
        return shuffle(value);
    } else {
        static_assert(sizeof(T) % 4 == 0, "shuffles move words");
        uint32_t words[sizeof(T) / 4];
        memcpy(words, &value, sizeof(T));
        for (uint32_t& word : words) word = shuffle(word);
        memcpy(&value, words, sizeof(T));
        return value;
    }
}

template <typename T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
    return shuffle_parts(value, [=](auto part) { return __shfl_xor_sync(kAllLanes, part, lane_mask); });
}

template <typename T>
__device__ inline T shuffle_up(T value, int distance) {
    return shuffle_parts(value, [=](auto part) { return __shfl_up_sync(kAllLanes, part, distance); });
}

// The value of a lane.
template <typename T>
__device__ inline T broadcast(T value, int lane) {
    return shuffle_parts(value, [=](auto part) { return __shfl_sync(kAllLanes, part, lane); });
}

// Butterfly reductions by combine(a, b), whose shuffles do not wait for each other. All lanes get the same
// bits, as both lanes of an exchange combine in the same order.
template <int count, typename T, typename Combine>
__device__ inline void warp_reduce_each(T (&values)[count], const Combine& combine) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        T others[count];
#pragma unroll
        for (int k = 0; k < count; ++k) others[k] = shuffle_xor(values[k], distance);
        const bool is_upper = (lane_of_thread() & distance) != 0;
#pragma unroll
        for (int k = 0; k < count; ++k)
            values[k] = is_upper ? combine(others[k], values[k]) : combine(values[k], others[k]);
    }
}

template <typename T, typename Combine>
__device__ inline T warp_reduce(T value, const Combine& combine) {
    T values[1] = {value};
    warp_reduce_each(values, combine);
    return values[0];
}

template <int count, typename T>
__device__ inline void warp_sum_each(T (&values)[count]) {
    warp_reduce_each(values, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ inline T warp_sum(T value) {
    return warp_reduce(value, [](T a, T b) { return a + b; });
}

// The sum over the lanes up to and including this one.
template <typename T>
__device__ inline T warp_inclusive_scan(T value) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const T before = shuffle_up(value, distance);
        if (lane_of_thread() >= distance) value += before;
    }
    return value;
}

// ------------------------------------------------------------------------------------------------- blocks

// A reduction by combine(a, b) over the block, whose size is a multiple of kWarp. All threads get the same
// bits; the order depends on the block size alone. scratch: (kMaxWarps) in shared memory, free on return.
template <typename T, typename Combine>
__device__ inline T block_reduce(T value, T* scratch, const Combine& combine) {
    value = warp_reduce(value, combine);
    if (lane_of_thread() == 0) scratch[warp_of_thread()] = value;
    __syncthreads();
    T total = scratch[0];
    for (int warp = 1; warp < warps_of_block(); ++warp) total = combine(total, scratch[warp]);
    __syncthreads();
    return total;
}

template <typename T>
__device__ inline T block_sum(T value, T* scratch) {
    return block_reduce(value, scratch, [](T a, T b) { return a + b; });
}

// The sum over the threads before this one; *total: over all threads.
template <typename T>
__device__ inline T block_exclusive_scan(T value, T* scratch, T* total) {
    const T within = warp_inclusive_scan(value);
    if (lane_of_thread() == kWarp - 1) scratch[warp_of_thread()] = within;
    __syncthreads();
    T before = 0, sum = 0;
    for (int warp = 0; warp < warps_of_block(); ++warp) {
        if (warp == warp_of_thread()) before = sum;
        sum += scratch[warp];
    }
    __syncthreads();
    *total = sum;
    return before + within - value;
}

// Whether this block is the last of the grid to arrive; its threads then see all that the other blocks wrote
// before they arrived. The last block can thus reduce the partial results of all (the threadfence reduction
// of the CUDA samples). ticket: in device memory, 0 before the launch. scratch: () in shared memory.
__device__ inline bool is_last_block(unsigned* ticket, int* scratch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const bool is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        if (is_last) __threadfence();  // the others read nothing
        *scratch = is_last;
    }
    __syncthreads();
    return *scratch != 0;
}

// -------------------------------------------------------------------------------------- dependent launches

// The kernel that follows in the stream may begin, if its launch overlaps (launch.h) and as soon as each
// block of this one has called this or has ended.
__device__ inline void let_next_kernel_begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Returns when the kernel before this one in the stream has ended, at once where the launch does not overlap.
// Each thread of a kernel whose launch does waits, so that the kernel after it follows all that came before.
// Until it has waited, a thread writes nothing, and reads nothing that an earlier kernel may write, back to
// one whose launch does not overlap.
__device__ inline void wait_for_kernel_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

// -------------------------------------------------------------------------------------------------- seeds

// The seed of a launch, the same for all threads.
__device__ inline uint64_t seed_of(const Seed& seed) {
    if (!seed.of_device_generator) return seed.value;
    const bool captured = seed.captured_seed != nullptr;
    const uint64_t key = captured ? static_cast<uint64_t>(*seed.captured_seed) : seed.value;
    const uint64_t offset =
        captured ? static_cast<uint64_t>(*seed.captured_offset) + seed.offset : seed.offset;
    const Philox mixed(key, offset, 0);
    return uint64_t{mixed.words[1]} << 32 | mixed.words[0];
}

}  // namespace bigramx::cuda
