// The element types of tables and tokens in device code, their accumulation dtypes, and 16-byte vector
// access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/base/types.h"

namespace bigramx::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The accumulation dtype of a table's dtype.
template <typename scalar_t>
using opmath_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(float16 value) { return __half2float(value); }

// Rounded to nearest, ties to even.
template <typename scalar_t>
__device__ inline scalar_t narrow(opmath_t<scalar_t> value) {
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
        case FloatType::float64: return visit(double{});
        case FloatType::float32: return visit(float{});
        case FloatType::bfloat16: return visit(bfloat16{});
        case FloatType::float16: return visit(float16{});
    }
}

template <typename Visit>
void with_type(TokenType type, const Visit& visit) {
    switch (type) {
        case TokenType::uint8: return visit(uint8_t{});
        case TokenType::uint16: return visit(uint16_t{});
        case TokenType::uint32: return visit(uint32_t{});
        case TokenType::int32: return visit(int32_t{});
        case TokenType::int64: return visit(int64_t{});
    }
}

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorSize = kVectorBytes / sizeof(T);

// What one 16-byte access moves.
template <typename T>
struct alignas(kVectorBytes) AlignedVector {
    T elements[kVectorSize<T>];
};

template <typename T>
__device__ inline AlignedVector<T> load_vector(const T* from) {
    return *reinterpret_cast<const AlignedVector<T>*>(from);
}

template <typename T>
__device__ inline void store_vector(T* to, const AlignedVector<T>& vector) {
#if defined(__CUDA_ARCH__)
    uint4 words;  // the compiler may divide the store of 16-bit elements
    memcpy(&words, &vector, sizeof(words));
    *reinterpret_cast<uint4*>(to) = words;
#else
    *reinterpret_cast<AlignedVector<T>*>(to) = vector;
#endif
}

#if defined(__CUDA_ARCH__)
__device__ inline __nv_bfloat162 narrow_pair(bfloat16, float a, float b) {
    return __floats2bfloat162_rn(a, b);
}
__device__ inline __half2 narrow_pair(float16, float a, float b) { return __floats2half2_rn(a, b); }
#endif

// The largest element; a NaN counts only where there is nothing else. Pairs of 16-bit elements at a time.
template <typename scalar_t, int count>
__device__ inline opmath_t<scalar_t> largest_element(const AlignedVector<scalar_t> (&vectors)[count]) {
    constexpr int kSize = kVectorSize<scalar_t>;
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(scalar_t) == 2) {
        auto largest =
            decltype(narrow_pair(scalar_t(), 0, 0))(vectors[0].elements[0], vectors[0].elements[1]);
        for (int k = 2; k < count * kSize; k += 2) {
            const auto& elements = vectors[k / kSize].elements;
            largest = __hmax2(largest, {elements[k % kSize], elements[k % kSize + 1]});
        }
        return fmaxf(widen(largest.x), widen(largest.y));
    } else
#endif
    {
        opmath_t<scalar_t> largest = widen(vectors[0].elements[0]);
        for (int k = 1; k < count * kSize; ++k) {
            largest = std::fmax(largest, widen(vectors[k / kSize].elements[k % kSize]));
        }
        return largest;
    }
}

// Two elements by each conversion, where they have 16 bits.
template <typename scalar_t>
__device__ inline AlignedVector<scalar_t> narrow_vector(
    const opmath_t<scalar_t> (&values)[kVectorSize<scalar_t>]) {
    AlignedVector<scalar_t> vector;
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(scalar_t) == 2) {
        for (int k = 0; k < kVectorSize<scalar_t>; k += 2) {
            const auto pair = narrow_pair(scalar_t(), values[k], values[k + 1]);
            vector.elements[k] = pair.x;
            vector.elements[k + 1] = pair.y;
        }
    } else
#endif
    {
        for (int k = 0; k < kVectorSize<scalar_t>; ++k) vector.elements[k] = narrow<scalar_t>(values[k]);
    }
    return vector;
}

// The position of a row's first element within its aligned vector.
template <typename T>
__device__ inline int elements_into_vector(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

// The number of elements before the first aligned vector, at most `size`.
template <typename T>
__device__ inline int64_t elements_before_vectors(const T* row, int64_t size) {
    const int64_t before = (kVectorSize<T> - elements_into_vector(row)) % kVectorSize<T>;
    return before < size ? before : size;
}

// For a block: visit_element(k) for the elements of a row before its vectors and after them.
template <typename VisitElement>
__device__ inline void for_each_outside(int before, int in_vectors, int size,
                                        const VisitElement& visit_element) {
    const int threads = static_cast<int>(blockDim.x), outside = size - in_vectors;
    for (int k = static_cast<int>(threadIdx.x); k < outside; k += threads) {
        visit_element(k < before ? k : k + in_vectors);
    }
}

// For a block: visit_vector(k, vector) for each aligned vector of a row, whose first element is k, and
// visit_element(k) for the elements before and after them. A thread loads kInFlight vectors before it visits
// the first, to hide latency. Fewer than 2^31 elements.
template <int kInFlight = 1, typename T, typename VisitVector, typename VisitElement>
__device__ inline void for_each_aligned_vector(const T* row, int64_t size, const VisitVector& visit_vector,
                                               const VisitElement& visit_element) {
    const int before = static_cast<int>(elements_before_vectors(row, size));
    const int num_vectors = static_cast<int>((size - before) / kVectorSize<T>);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int first = thread; first < num_vectors; first += kInFlight * threads) {
        AlignedVector<T> vectors[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int c = first + k * threads;
            if (c < num_vectors) vectors[k] = load_vector(row + before + c * kVectorSize<T>);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int c = first + k * threads;
            if (c < num_vectors) visit_vector(before + c * kVectorSize<T>, vectors[k]);
        }
    }
    for_each_outside(before, num_vectors * kVectorSize<T>, static_cast<int>(size), visit_element);
}

// The same in batches of vectors, which a thread loads together: visit_batch(first, stride, vectors), where
// the first element of vectors[k] is first + k stride. The vectors that fill no batch are visited one by one.
template <int kBatch, typename T, typename VisitBatch, typename VisitVector, typename VisitElement>
__device__ inline void for_each_batch_of_vectors(const T* row, int64_t size, const VisitBatch& visit_batch,
                                                 const VisitVector& visit_vector,
                                                 const VisitElement& visit_element) {
    constexpr int kSize = kVectorSize<T>;
    const int before = static_cast<int>(elements_before_vectors(row, size));
    const int num_vectors = static_cast<int>((size - before) / kSize);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const auto* const vectors = reinterpret_cast<const AlignedVector<T>*>(row + before);
    const int in_batches = num_vectors / (kBatch * threads) * (kBatch * threads);
    for (int c = thread; c < in_batches; c += kBatch * threads) {
        AlignedVector<T> batch[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) batch[k] = vectors[c + k * threads];
        visit_batch(before + c * kSize, threads * kSize, batch);
    }
    for (int c = in_batches + thread; c < num_vectors; c += threads)
        visit_vector(before + c * kSize, vectors[c]);
    for_each_outside(before, num_vectors * kSize, static_cast<int>(size), visit_element);
}

// For a block: lets a row that it reads later come into the L2 cache, but for elements outside its vectors.
template <typename T>
__device__ inline void prefetch_row(const T* row, int64_t size) {
#if defined(__CUDA_ARCH__)
    const int64_t before = elements_before_vectors(row, size);
    const auto bytes = static_cast<uint32_t>((size - before) / kVectorSize<T> * kVectorBytes);
    const size_t address = __cvta_generic_to_global(row + before);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && bytes > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#else
    constexpr uint32_t kLine = 128;  // bytes
    for (uint32_t k = threadIdx.x * kLine; k < bytes; k += blockDim.x * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(address + k));
#endif
#endif
}

}  // namespace bigramx::cuda
