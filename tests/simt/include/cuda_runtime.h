// The emulator's version of the CUDA runtime's header, with which a C++ compiler compiles the unchanged CUDA
// kernels for the CPU. Only what the kernels use; ../scheduler.cpp and ../memory.cpp define the functions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// ---------------------------------------------------------------------------------------------- qualifiers

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Dynamic shared memory is declared `extern`, where this attribute has no effect. On a local variable, of
// which each thread would have its own, it is an error (-Werror=attributes).
#define __shared__ __attribute__((visibility("default")))

// What assert() and device_assert() call.
extern "C" [[noreturn]] void simt_assert_fail(const char* assertion, const char* file, unsigned line,
                                              const char* function) noexcept;
#define __assert_fail simt_assert_fail

// -------------------------------------------------------------------------------------------- the host side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaFuncAttributes {
    int ptxVersion;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

typedef struct CUstream_st* cudaStream_t;

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// threadIdx and the like are calls, so that the compiler does not take them for memory accesses. Each
// returns the same value throughout the life of a thread.
__attribute__((const)) uint3 simt_thread_index();
__attribute__((const)) uint3 simt_block_index();
__attribute__((const)) dim3 simt_block_size();
__attribute__((const)) dim3 simt_grid_size();

#define threadIdx simt_thread_index()
#define blockIdx simt_block_index()
#define blockDim simt_block_size()
#define gridDim simt_grid_size()

// The macros above turn its members blockDim and gridDim into calls, too.
struct cudaLaunchConfig_t {
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
    dim3 block_size, grid_size;

    dim3& simt_block_size() { return block_size; }
    dim3& simt_grid_size() { return grid_size; }
};

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);

namespace simt {

// A kernel and its arguments, as passed to the scheduler.
struct Call {
    const void* kernel;  // its address, which identifies it
    void (*run)(const void* arguments);
    const void* arguments;
    size_t arguments_bytes;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call);
cudaError_t allow_shared_bytes(const void* kernel, int bytes);

template <typename... Parameters>
struct Arguments {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;

    static void run(const void* arguments) {
        const auto* self = static_cast<const Arguments*>(arguments);
        std::apply(self->kernel, self->values);
    }
};

}  // namespace simt

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return simt::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}

template <typename... Parameters, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Given&&... given) {
    using Arguments = simt::Arguments<Parameters...>;
    const Arguments arguments{kernel, std::tuple<Parameters...>(static_cast<Given&&>(given)...)};
    return simt::launch(
        *config, {reinterpret_cast<const void*>(kernel), &Arguments::run, &arguments, sizeof(arguments)});
}

// ------------------------------------------------------------------------------------- dependent launches

// Whenever it begins, the next kernel must not rely on what this one does until it has waited.
inline void cudaTriggerProgrammaticLaunchCompletion() {}
void cudaGridDependencySynchronize();

// ------------------------------------------------------------------------------------- barriers and warps

namespace simt {

// A source line of a kernel.
struct Site {
    const char* file;
    int line;
};

enum class BlockOp { barrier, count, all, any };
enum class WarpOp { barrier, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all, match_any };

int block_barrier(BlockOp op, int predicate, Site site);

// argument, width: for shuffles.
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site);

template <typename T, typename... Types>
constexpr bool kIsOneOf = (std::is_same_v<T, Types> || ...);

template <typename T>
uint64_t to_bits(T value) {
    static_assert(
        kIsOneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>,
        "no warp intrinsic takes this type; cast to one that has an overload");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace simt

// Parameters whose defaults are the caller's source line.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(simt::BlockOp::barrier, 0, {file, line}); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
    return simt::block_barrier(simt::BlockOp::count, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
    return simt::block_barrier(simt::BlockOp::all, predicate, {file, line});
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
    return simt::block_barrier(simt::BlockOp::any, predicate, {file, line});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, SIMT_SITE) {
    simt::warp_collective(simt::WarpOp::barrier, mask, 0, 0, 0, {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
    return simt::from_bits<T>(
        simt::warp_collective(simt::WarpOp::shuffle, mask, simt::to_bits(value), lane, width, {file, line}));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    return simt::from_bits<T>(simt::warp_collective(simt::WarpOp::shuffle_up, mask, simt::to_bits(value),
                                                    static_cast<int>(delta), width, {file, line}));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    return simt::from_bits<T>(simt::warp_collective(simt::WarpOp::shuffle_down, mask, simt::to_bits(value),
                                                    static_cast<int>(delta), width, {file, line}));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
    return simt::from_bits<T>(simt::warp_collective(simt::WarpOp::shuffle_xor, mask, simt::to_bits(value),
                                                    lane_mask, width, {file, line}));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
    return static_cast<unsigned>(
        simt::warp_collective(simt::WarpOp::ballot, mask, predicate != 0, 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
    return static_cast<int>(
        simt::warp_collective(simt::WarpOp::any, mask, predicate != 0, 0, 0, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
    return static_cast<int>(
        simt::warp_collective(simt::WarpOp::all, mask, predicate != 0, 0, 0, {file, line}));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
    return static_cast<unsigned>(
        simt::warp_collective(simt::WarpOp::match_any, mask, simt::to_bits(value), 0, 0, {file, line}));
}

#undef SIMT_SITE

// No lane can rely on others being active with it.
inline unsigned __activemask() { return 1u << (threadIdx.x % 32); }

// ------------------------------------------------------------------------------------------------- memory

void __threadfence();

namespace simt {

enum class AtomicOp { add, min, max, exchange, compare_and_swap, bit_or };

// For int, unsigned, unsigned long long, float and double. Returns the previous value.
template <typename T>
T atomic(AtomicOp op, T* address, T operand, T expected);

template <typename T>
struct Identity {
    using type = T;
};
template <typename T>
using NotDeduced = typename Identity<T>::type;

}  // namespace simt

// Atomics, for the types for which CUDA has them.
#define SIMT_ATOMIC(name, op, ...)                                                           \
    template <typename T>                                                                    \
    T name(T* address, simt::NotDeduced<T> operand) {                                        \
        static_assert(simt::kIsOneOf<T, __VA_ARGS__>, "CUDA has no " #name " of this type"); \
        return simt::atomic<T>(simt::AtomicOp::op, address, operand, T());                   \
    }

SIMT_ATOMIC(atomicAdd, add, int, unsigned, unsigned long long, float, double)
SIMT_ATOMIC(atomicMin, min, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicMax, max, int, unsigned, unsigned long long)
SIMT_ATOMIC(atomicExch, exchange, int, unsigned, unsigned long long, float)
SIMT_ATOMIC(atomicOr, bit_or, int, unsigned, unsigned long long)

#undef SIMT_ATOMIC

template <typename T>
T atomicCAS(T* address, simt::NotDeduced<T> expected, simt::NotDeduced<T> desired) {
    static_assert(simt::kIsOneOf<T, int, unsigned, unsigned long long>, "CUDA has no atomicCAS of this type");
    return simt::atomic<T>(simt::AtomicOp::compare_and_swap, address, desired, expected);
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}

// --------------------------------------------------------------------------------------------- arithmetic

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// Single operations, never fused.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

template <typename T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
    return a < b ? b : a;
}
