// The few vector primitives that the CPU kernels share, for the capability that is being compiled
// (for_each_capability.h includes this file once for each; hence no include guard).
//
// Vectors are the compilers' own vector types: arithmetic, comparison and selection are operators, and only
// what they lack (16-bit floats, masked access, scaling) is an intrinsic. A lane holds the
// accumulator of a table's dtype: float for float32, bfloat16 and float16, double for float64.

namespace bigramx::BIGRAMX_CAPABILITY {

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(BIGRAMX_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = BIGRAMX_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

// ------------------------------------------------------------------------------------- load and store

// Of a row that is accumulated as it is.
template <typename T>
inline Vector<T> load(const T* from) {
    Vector<T> to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}

using Bits = Vector<uint32_t>;
typedef uint16_t HalfBits __attribute__((vector_size(BIGRAMX_VECTOR_BYTES / 2)));

inline Vector<float> load(const c10::BFloat16* from) {
    HalfBits bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits, Bits) << 16);
}

template <typename T>
inline void store(T* to, Vector<T> from) {
    std::memcpy(to, &from, sizeof(from));
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(c10::BFloat16* to, Vector<float> from) {
    const Bits bits = reinterpret_cast<Bits>(from);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Bits quiet_nan = Bits{} + 0x7FC0;
    const HalfBits result = __builtin_convertvector(from == from ? rounded : quiet_nan, HalfBits);
    std::memcpy(to, &result, sizeof(result));
}

inline Vector<float> load(const c10::Half* from) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Vector<float>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vector<float> to;
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) to[lane] = from[lane];
    return to;
#endif
}

inline void store(c10::Half* to, Vector<float> from) {
#if BIGRAMX_VECTOR_BYTES == 64
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to),
        _mm512_maskz_cvtps_ph(0xFFFF, reinterpret_cast<__m512>(from), _MM_FROUND_TO_NEAREST_INT));
#elif BIGRAMX_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(from), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) to[lane] = from[lane];
#endif
}

// The last `count` < kLanes elements of a row; the lanes beyond them hold `fill`.
template <typename scalar_t, typename T = Accumulator<scalar_t>>
inline Vector<T> load_tail(const scalar_t* from, int64_t count, T fill) {
#if BIGRAMX_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<scalar_t, float>) {
        const Vector<float> fills = broadcast(fill);
        return reinterpret_cast<Vector<float>>(_mm512_mask_loadu_ps(
            reinterpret_cast<__m512>(fills), static_cast<__mmask16>((1u << count) - 1), from));
    }
#endif
    alignas(BIGRAMX_VECTOR_BYTES) T lanes[kLanes<T>];
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        lanes[lane] = lane < count ? static_cast<T>(from[lane]) : fill;
    }
    return load(lanes);
}

template <typename scalar_t, typename T = Accumulator<scalar_t>>
inline void store_tail(scalar_t* to, Vector<T> from, int64_t count) {
#if BIGRAMX_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<scalar_t, float>) {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(from));
        return;
    }
#endif
    scalar_t lanes[kLanes<T>];
    store(lanes, from);
    std::copy(lanes, lanes + count, to);
}

// The part of a row that one vector holds: `count` elements from `begin` on.
template <typename T>
struct Lanes {
    int64_t begin;
    int64_t count;

    template <typename scalar_t>
    Vector<T> load(const scalar_t* row, T fill) const {
        return count == kLanes<T> ? BIGRAMX_CAPABILITY::load(row + begin)
                                  : load_tail(row + begin, count, fill);
    }

    template <typename scalar_t>
    void store(scalar_t* row, Vector<T> vector) const {
        if (count == kLanes<T>) {
            BIGRAMX_CAPABILITY::store(row + begin, vector);
        } else {
            store_tail(row + begin, vector, count);
        }
    }
};

// Calls visit(lanes) for each part of a row of `size` elements.
template <typename T, typename Visit>
inline __attribute__((always_inline)) void for_each_vector(int64_t size, const Visit& visit) {
    int64_t begin = 0;
    for (; begin + kLanes<T> <= size; begin += kLanes<T>) visit(Lanes<T>{begin, kLanes<T>});
    if (begin < size) visit(Lanes<T>{begin, size - begin});
}

// ------------------------------------------------------------------------------------------ arithmetic

template <typename V>
inline V max(V a, V b) {
    return a > b ? a : b;
}

// Of 64-bit lanes: the products of their low words.
inline Vector<uint64_t> multiply_low_words(Vector<uint64_t> a, Vector<uint64_t> b) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<uint64_t>>(
        _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Vector<uint64_t>>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
    return reinterpret_cast<Vector<uint64_t>>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

template <int64_t distance, typename T, size_t... lane>
inline Vector<T> swap_lanes(Vector<T> vector, std::index_sequence<lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(vector, vector, (lane ^ distance)...);
#else
    using Order = Vector<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    return __builtin_shuffle(vector, Order{(lane ^ distance)...});
#endif
}

// Combines each lane with the one at a distance of 1, 2, 4, ...: log2(lanes) steps, all in registers.
template <typename T, int64_t distance = 1, typename Combine>
inline T reduce(Vector<T> vector, const Combine& combine) {
    if constexpr (distance == kLanes<T>) {
        return vector[0];
    } else {
        const Vector<T> swapped = swap_lanes<distance, T>(vector, std::make_index_sequence<kLanes<T>>());
        return reduce<T, 2 * distance>(combine(vector, swapped), combine);
    }
}

template <typename T>
inline T horizontal_max(Vector<T> vector) {
    return reduce<T>(vector, [](Vector<T> a, Vector<T> b) { return max(a, b); });
}

template <typename T>
inline T horizontal_sum(Vector<T> vector) {
    return reduce<T>(vector, [](Vector<T> a, Vector<T> b) { return a + b; });
}

// x 2^n for whole n from -150 to 129.
inline __attribute__((always_inline)) Vector<float> scale_by_power_of_two(Vector<float> x, Vector<float> n) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
    // In two factors: n alone may reach beyond the exponents of normal numbers.
    using Integers = Vector<int32_t>;
    const Integers exponent = __builtin_convertvector(n, Integers);
    const Integers half = exponent >> 1;
    const auto power_of_two = [](Integers e) { return reinterpret_cast<Vector<float>>((e + 127) << 23); };
    return x * power_of_two(half) * power_of_two(exponent - half);
#endif
}

// e^x to 2 ulp over all of float32, infinities, NaN and subnormal results included.
//
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r by a polynomial (Cephes' expf).
inline __attribute__((always_inline)) Vector<float> exp(Vector<float> x) {
    const Vector<float> zero = broadcast(0.0f), lowest = broadcast(-104.0f), highest = broadcast(89.0f);
    const auto vanishes = x < lowest;  // set aside: an underflow costs the processor a hundred cycles
    x = vanishes ? zero : x;
    x = x > highest ? highest : x;

    const float to_integer = 0x1.8p23f;  // adding it leaves no bits for a fraction
    const Vector<float> n = (x * 0x1.715476p0f + to_integer) - to_integer;
    const Vector<float> r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;

    Vector<float> series = broadcast(1.9875691500e-4f);
    series = series * r + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    const Vector<float> e_r = series * (r * r) + r + 1.0f;

    return vanishes ? zero : scale_by_power_of_two(e_r, n);
}

inline Vector<double> exp(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
