// The types of tables and tokens in device code, what tables are accumulated in, and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "types.h"

namespace bigramx {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// In what the kernels compute for a table of this type.
template <typename scalar_t>
using Accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(float16 value) { return __half2float(value); }

// Rounded to nearest, ties to even.
template <typename scalar_t>
__device__ inline scalar_t narrow(Accumulator<scalar_t> value) {
    if constexpr (std::is_same_v<scalar_t, bfloat16>) {
        return __float2bfloat16_rn(value);
    } else if constexpr (std::is_same_v<scalar_t, float16>) {
        return __float2half_rn(value);
    } else {
        return value;
    }
}

// Calls visit(zero) with a zero of the type.
template <typename Visit>
void with_type(FloatType type, const Visit& visit) {
    switch (type) {
        case FloatType::float64:
            return visit(double{});
        case FloatType::float32:
            return visit(float{});
        case FloatType::bfloat16:
            return visit(bfloat16{});
        case FloatType::float16:
            return visit(float16{});
    }
}

template <typename Visit>
void with_type(TokenType type, const Visit& visit) {
    switch (type) {
        case TokenType::uint8:
            return visit(uint8_t{});
        case TokenType::uint16:
            return visit(uint16_t{});
        case TokenType::int32:
            return visit(int32_t{});
        case TokenType::int64:
            return visit(int64_t{});
    }
}

constexpr int kChunkBytes = 16;

template <typename T>
constexpr int kChunk = kChunkBytes / sizeof(T);

// What one access moves; aligned to its size.
template <typename T>
struct alignas(kChunkBytes) Chunk {
    T elements[kChunk<T>];
};

template <typename T>
__device__ inline Chunk<T> load_chunk(const T* from) {
    return *reinterpret_cast<const Chunk<T>*>(from);
}

template <typename T>
__device__ inline void store_chunk(T* to, const Chunk<T>& chunk) {
    *reinterpret_cast<Chunk<T>*>(to) = chunk;
}

// How many elements the begin of a row lies behind the begin of the chunk that it is in.
template <typename T>
__device__ inline int elements_into_chunk(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kChunkBytes / sizeof(T));
}

// How many elements lie before the first chunk, `size` at most.
template <typename T>
__device__ inline int64_t elements_before_chunks(const T* row, int64_t size) {
    const int64_t before = (kChunk<T> - elements_into_chunk(row)) % kChunk<T>;
    return before < size ? before : size;
}

// For the threads of a block: visit_chunk(k, chunk) for each 16 bytes of a row that can be read at once, k
// being the first of their elements, and visit_element(k) for those before and behind them. A thread reads
// kInFlight chunks before it visits the first of them. Fewer than 2^31 elements.
template <int kInFlight = 1, typename T, typename VisitChunk, typename VisitElement>
__device__ inline void for_each_chunk(const T* row, int64_t size, const VisitChunk& visit_chunk,
                                      const VisitElement& visit_element) {
    const int before = static_cast<int>(elements_before_chunks(row, size));
    const int num_chunks = static_cast<int>((size - before) / kChunk<T>);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int first = thread; first < num_chunks; first += kInFlight * threads) {
        Chunk<T> chunks[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int c = first + k * threads;
            if (c < num_chunks) chunks[k] = load_chunk(row + before + c * kChunk<T>);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int c = first + k * threads;
            if (c < num_chunks) visit_chunk(before + c * kChunk<T>, chunks[k]);
        }
    }
    const int in_chunks = num_chunks * kChunk<T>, outside = static_cast<int>(size) - in_chunks;
    for (int k = thread; k < outside; k += threads) visit_element(k < before ? k : k + in_chunks);
}

}  // namespace bigramx
