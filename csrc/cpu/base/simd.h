// The vector primitives that the CPU kernels share, for the target that is being compiled (foreach_target.h
// includes this file once for each, hence no include guard).
//
// Vectors are the compilers' vector types: arithmetic, comparison and selection are operators, and only what
// these lack (16-bit floats, masked access, scaling) needs intrinsics. A lane has the accumulation dtype of
// the table: float for float32, bfloat16 and float16, double for float64.

namespace bigramx::cpu::BIGRAMX_TARGET {

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

// Of a row whose dtype is its accumulation dtype.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
inline Vector<T> load(const T* from) {
    Vector<T> to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}

using Bits = Vector<uint32_t>;
typedef uint16_t HalfBits __attribute__((vector_size(BIGRAMX_VECTOR_BYTES / 2)));

// Widening and narrowing; compilers split the generic conversions.
inline Bits widen(HalfBits bits) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(bits)));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
    return __builtin_convertvector(bits, Bits);
#endif
}

inline HalfBits narrow(Bits bits) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<HalfBits>(_mm512_maskz_cvtepi32_epi16(0xFFFF, reinterpret_cast<__m512i>(bits)));
#else
    return __builtin_convertvector(bits, HalfBits);
#endif
}

inline Vector<float> load(const c10::BFloat16* from) {
    HalfBits bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<Vector<float>>(widen(bits) << 16);
}

template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
inline void store(T* to, Vector<T> from) {
    std::memcpy(to, &from, sizeof(from));
}

// The upper halves, rounded to nearest, ties to even. Not for NaN.
inline Bits round_to_bfloat16(Vector<float> from) {
    const Bits bits = reinterpret_cast<Bits>(from);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

inline void store(c10::BFloat16* to, Vector<float> from) {
    const Bits quiet_nan = Bits{} + 0x7FC0;
    const HalfBits result = narrow(from == from ? round_to_bfloat16(from) : quiet_nan);
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

// As store, for vectors without a NaN.
template <typename scalar_t, typename T = opmath_t<scalar_t>>
inline void store_numbers(scalar_t* to, Vector<T> from) {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
        const HalfBits result = narrow(round_to_bfloat16(from));
        std::memcpy(to, &result, sizeof(result));
    } else {
        store(to, from);
    }
}

// What a comparison of vectors results in; also the order of lanes.
template <typename T>
using Mask = Vector<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;

template <typename T, size_t... lane>
constexpr Mask<T> lane_numbers(std::index_sequence<lane...>) {
    return Mask<T>{lane...};
}

// All bits set in the first `count` lanes.
template <typename T>
inline Mask<T> first_lanes(int64_t count) {
    using Integer = std::remove_reference_t<decltype(Mask<T>{}[0])>;
    return lane_numbers<T>(std::make_index_sequence<kLanes<T>>()) < broadcast(static_cast<Integer>(count));
}

// The last `count` < kLanes elements of a row; the lanes beyond them hold `fill`.
template <typename scalar_t, typename T = opmath_t<scalar_t>>
inline Vector<T> load_tail(const scalar_t* from, int64_t count, T fill) {
#if BIGRAMX_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<scalar_t, float>) {
        const Vector<float> fills = broadcast(fill);
        return reinterpret_cast<Vector<float>>(_mm512_mask_loadu_ps(
            reinterpret_cast<__m512>(fills), static_cast<__mmask16>((1u << count) - 1), from));
    }
#elif BIGRAMX_VECTOR_BYTES == 32
    if constexpr (std::is_same_v<scalar_t, float>) {
        const auto is_in = first_lanes<float>(count);
        const auto loaded = _mm256_maskload_ps(from, reinterpret_cast<__m256i>(is_in));
        return is_in ? reinterpret_cast<Vector<float>>(loaded) : broadcast(fill);
    }
#endif
    alignas(BIGRAMX_VECTOR_BYTES) T lanes[kLanes<T>];
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        lanes[lane] = lane < count ? static_cast<T>(from[lane]) : fill;
    }
    return load(lanes);
}

template <typename scalar_t, typename T = opmath_t<scalar_t>>
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
        return count == kLanes<T> ? BIGRAMX_TARGET::load(row + begin) : load_tail(row + begin, count, fill);
    }

    // The vector with zeros in the lanes beyond the row.
    Vector<T> in_row(Vector<T> vector) const {
        if (count == kLanes<T>) return vector;
        return first_lanes<T>(count) ? vector : Vector<T>{};
    }

    template <typename scalar_t>
    void store(scalar_t* row, Vector<T> vector) const {
        if (count == kLanes<T>) {
            BIGRAMX_TARGET::store(row + begin, vector);
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

// The part of a row that `size` vectors hold. If it is more than one, all are whole.
template <typename T, int64_t vectors>
struct Places {
    static constexpr int64_t size = vectors;
    int64_t begin;
    int64_t count = size * kLanes<T>;

    inline __attribute__((always_inline)) Lanes<T> operator[](int64_t k) const {
        return {begin + k * kLanes<T>, size == 1 ? count : kLanes<T>};
    }
};

// Calls visit(places) for `together` vectors of a row at a time, then for each that is left.
template <typename T, int64_t together, typename Visit>
inline __attribute__((always_inline)) void for_each_places(int64_t size, const Visit& visit) {
    constexpr int64_t kStep = together * kLanes<T>;
    int64_t begin = 0;
    for (; begin + kStep <= size; begin += kStep) visit(Places<T, together>{begin});
    for_each_vector<T>(size - begin, [&](Lanes<T> lanes) __attribute__((always_inline)) {
        visit(Places<T, 1>{begin + lanes.begin, lanes.count});
    });
}

// A non-temporal store, which bypasses the caches: for data that is not read again soon. `to`: aligned to
// `bytes`.
template <int64_t bytes>
inline void store_nontemporal(void* to, const void* from) {
#if defined(__x86_64__)
    if constexpr (bytes == 64)
        return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
    if constexpr (bytes == 32) {
        return _mm256_stream_si256(static_cast<__m256i*>(to),
                                   _mm256_loadu_si256(static_cast<const __m256i*>(from)));
    }
    if constexpr (bytes == 16) {
        return _mm_stream_si128(static_cast<__m128i*>(to),
                                _mm_loadu_si128(static_cast<const __m128i*>(from)));
    }
#endif
    std::memcpy(to, from, bytes);
}

// Non-temporal stores are weakly ordered: this orders them before all later stores.
inline void fence_nontemporal_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Writes a row of results in the table's dtype by non-temporal stores, one vector per step(), interleaved
// with other work. `from` must not change until finish().
template <typename scalar_t>
class NonTemporalRow {
  public:
    using acc_t = opmath_t<scalar_t>;

    void start(scalar_t* to, const acc_t* from, int64_t size, acc_t scale) {
        finish();
        to_ = to;
        from_ = from;
        left_ = size;
        scale_ = scale;
        while (left_ > 0 && reinterpret_cast<uintptr_t>(to_) % kBytes != 0) store_one();
    }

    inline __attribute__((always_inline)) void step() {
        if (left_ < kLanes<acc_t>) return;
        scalar_t lanes[kLanes<acc_t>];
        store_numbers(lanes, load(from_) * broadcast(scale_));
        store_nontemporal<kBytes>(to_, lanes);
        advance(kLanes<acc_t>);
    }

    void finish() {
        while (left_ >= kLanes<acc_t>) step();
        while (left_ > 0) store_one();
    }

  private:
    static constexpr int64_t kBytes = kLanes<acc_t> * sizeof(scalar_t);

    void store_one() {
        *to_ = static_cast<scalar_t>(*from_ * scale_);
        advance(1);
    }

    void advance(int64_t count) {
        to_ += count;
        from_ += count;
        left_ -= count;
    }

    scalar_t* to_ = nullptr;
    const acc_t* from_ = nullptr;
    int64_t left_ = 0;
    acc_t scale_ = 1;
};

// Copies short rows without a call to memcpy. The last vector may overlap the one before it.
inline void copy_row(char* to, const char* from, int64_t bytes) {
    constexpr int64_t kVector = BIGRAMX_VECTOR_BYTES, kShort = 1 << 11;
    if (bytes < kVector || bytes > kShort) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
        return;
    }
    for (int64_t begin = 0; begin + kVector <= bytes; begin += kVector) {
        std::memcpy(to + begin, from + begin, kVector);
    }
    std::memcpy(to + bytes - kVector, from + bytes - kVector, kVector);
}

// ------------------------------------------------------------------------------------------ arithmetic

// a > b ? a : b, thus b where either is NaN: one instruction, which compilers do not select themselves.
inline Vector<float> max(Vector<float> a, Vector<float> b) {
#if BIGRAMX_VECTOR_BYTES == 64
    const auto first = reinterpret_cast<__m512>(a), second = reinterpret_cast<__m512>(b);
    return reinterpret_cast<Vector<float>>(_mm512_maskz_max_ps(0xFFFF, first, second));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Vector<float>>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__x86_64__)
    return reinterpret_cast<Vector<float>>(
        _mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
    return a > b ? a : b;
#endif
}

inline Vector<double> max(Vector<double> a, Vector<double> b) { return a > b ? a : b; }

inline Vector<float> sqrt(Vector<float> x) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<float>>(_mm512_maskz_sqrt_ps(0xFFFF, reinterpret_cast<__m512>(x)));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Vector<float>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__x86_64__)
    return reinterpret_cast<Vector<float>>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

inline Vector<double> sqrt(Vector<double> x) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<double>>(_mm512_maskz_sqrt_pd(0xFF, reinterpret_cast<__m512d>(x)));
#elif BIGRAMX_VECTOR_BYTES == 32
    return reinterpret_cast<Vector<double>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__x86_64__)
    return reinterpret_cast<Vector<double>>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#else
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

// The bits that are set in a or in b.
template <typename T>
inline Vector<T> bits_of_either(Vector<T> a, Vector<T> b) {
    using Words = Vector<uint64_t>;
    return reinterpret_cast<Vector<T>>(reinterpret_cast<Words>(a) | reinterpret_cast<Words>(b));
}

template <typename T>
inline bool has_bits(Vector<T> vector) {
#if BIGRAMX_VECTOR_BYTES == 32
    const auto bits = reinterpret_cast<__m256i>(vector);
    return _mm256_testz_si256(bits, bits) == 0;
#else
    const auto words = reinterpret_cast<Vector<uint64_t>>(vector);
    uint64_t all = 0;
    for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) all |= words[lane];
    return all != 0;
#endif
}

// The products of the low words of 64-bit lanes.
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
    return __builtin_shuffle(vector, Mask<T>{(lane ^ distance)...});
#endif
}

// A bit mask of the lanes that are at least `bound`.
template <typename T>
inline uint64_t lanes_reaching(Vector<T> vector, T bound) {
#if BIGRAMX_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(vector), _mm512_set1_ps(bound), _CMP_GE_OQ);
    } else {
        return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(vector), _mm512_set1_pd(bound), _CMP_GE_OQ);
    }
#elif BIGRAMX_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) {
        return _mm256_movemask_ps(reinterpret_cast<__m256>(vector >= bound));
    } else {
        return _mm256_movemask_pd(reinterpret_cast<__m256d>(vector >= bound));
    }
#else
    uint64_t bits = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= uint64_t{vector[lane] >= bound} << lane;
    return bits;
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

// Takes the lanes whose index has the bit `distance` from b, the others from a. swapped: takes each from its
// neighbour at that distance.
template <int64_t distance, bool swapped, typename T, size_t... lane>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::index_sequence<lane...>) {
    constexpr size_t kOther = swapped ? distance : 0, kSecond = kLanes<T>;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((lane ^ kOther) + (lane & distance ? kSecond : 0))...);
#else
    return __builtin_shuffle(a, b, Mask<T>{((lane ^ kOther) + (lane & distance ? kSecond : 0))...});
#endif
}

// Reduces kLanes<T> vectors together: lane k of the result is the reduction of vectors[k].
template <typename T, int64_t distance = 1, typename Combine>
inline Vector<T> reduce_each(const Vector<T>* vectors, const Combine& combine) {
    if constexpr (distance == kLanes<T>) {
        return vectors[0];
    } else {
        Vector<T> halves[kLanes<T> / distance / 2];
        const auto lanes = std::make_index_sequence<kLanes<T>>();
        for (int64_t k = 0; k < kLanes<T> / distance / 2; ++k) {
            const Vector<T> a = vectors[2 * k], b = vectors[2 * k + 1];
            halves[k] = combine(interleave<distance, false, T>(a, b, lanes),
                                interleave<distance, true, T>(a, b, lanes));
        }
        return reduce_each<T, 2 * distance>(halves, combine);
    }
}

// x 2^n for integers n from -150 to 129.
inline __attribute__((always_inline)) Vector<float> scale_by_power_of_two(Vector<float> x, Vector<float> n) {
#if BIGRAMX_VECTOR_BYTES == 64
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
    // In two factors, as 2^n alone may not be a normal number.
    using Integers = Vector<int32_t>;
    const Integers exponent = __builtin_convertvector(n, Integers);
    const Integers half = exponent >> 1;
    const auto power_of_two = [](Integers e) { return reinterpret_cast<Vector<float>>((e + 127) << 23); };
    return x * power_of_two(half) * power_of_two(exponent - half);
#endif
}

constexpr float kToInteger = 0x1.8p23f;  // adding it leaves no bits for a fraction

// x = n ln 2 + r with |r| <= ln(2) / 2.
struct ExponentParts {
    Vector<float> n_to_integer;  // n + kToInteger: its low bits are those of n
    Vector<float> e_r;           // e^r by a polynomial (Cephes' expf)
};

inline __attribute__((always_inline)) ExponentParts exponent_parts(Vector<float> x) {
    const Vector<float> n_to_integer = x * 0x1.715476p0f + kToInteger;
    const Vector<float> n = n_to_integer - kToInteger;
    const Vector<float> r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;

    Vector<float> series = broadcast(1.9875691500e-4f);
    series = series * r + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    return {n_to_integer, series * (r * r) + r + 1.0f};
}

// e^x to 2 ulp over all of float32, infinities, NaN and subnormal results included.
inline __attribute__((always_inline)) Vector<float> exp(Vector<float> x) {
    const Vector<float> lowest = broadcast(-104.0f), highest = broadcast(89.0f);
    const Vector<float> zero = broadcast(0.0f);
    // A product that underflows costs a hundred cycles. Where results are scaled by products, avoid it.
    constexpr bool kProducts = BIGRAMX_VECTOR_BYTES != 64;
    const auto vanishes = x < lowest;
    x = kProducts ? (vanishes ? zero : x) : max(lowest, x);
    x = -max(-highest, -x);
    const ExponentParts parts = exponent_parts(x);
    const Vector<float> result = scale_by_power_of_two(parts.e_r, parts.n_to_integer - kToInteger);
    return kProducts ? (vanishes ? zero : result) : result;
}

// Whether all results of exp are normal numbers, far from the ends of float32. A NaN is not.
template <size_t size>
inline __attribute__((always_inline)) bool have_normal_exponentials(const Vector<float> (&x)[size]) {
    using Integers = Vector<int32_t>;
    Integers largest{};
    for (const Vector<float>& each : x) {
        const Integers magnitude = reinterpret_cast<Integers>(each) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    return !has_bits<int32_t>(largest > reinterpret_cast<Integers>(broadcast(87.3f)));
}

// exp, kept out of loops where it is rarely called for.
__attribute__((noinline, cold)) inline Vector<float> exp_of_any(Vector<float> x) { return exp(x); }

// Replaces each x by e^x. AVX-512 scales in one instruction. Elsewhere, where all results are normal numbers,
// n is added to the exponents of e^r, in half of the time.
template <size_t size>
inline __attribute__((always_inline)) void exp_each(Vector<float> (&x)[size]) {
    if (BIGRAMX_VECTOR_BYTES == 64) {
        for (Vector<float>& each : x) each = exp(each);
    } else if (have_normal_exponentials(x)) {
        for (Vector<float>& each : x) {
            const ExponentParts parts = exponent_parts(each);
            each = reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(parts.e_r) +
                                                   (reinterpret_cast<Bits>(parts.n_to_integer) << 23));
        }
    } else {
        for (Vector<float>& each : x) each = exp_of_any(each);
    }
}

// The natural logarithm to 2 ulp over all of float32: NaN below zero, -inf at zero, infinities and NaN as
// they are.
//
// x = m 2^n with m from sqrt(1/2) to sqrt(2); log m by a polynomial in m - 1 (Cephes' logf).
inline __attribute__((always_inline)) Vector<float> log(Vector<float> x) {
    const Vector<float> zero = broadcast(0.0f), smallest = broadcast(0x1p-126f);
    const auto subnormal = x < smallest;
    const Vector<float> scaled = subnormal ? x * 0x1p24f : x;
    const Bits bits = reinterpret_cast<Bits>(scaled) - 0x3F3504F3;  // the bits of sqrt(1/2)
    const Vector<int32_t> exponent = reinterpret_cast<Vector<int32_t>>(bits) >> 23;
    const Vector<float> m = reinterpret_cast<Vector<float>>((bits & 0x007FFFFF) + 0x3F3504F3);
    Vector<float> n = __builtin_convertvector(exponent, Vector<float>);
    n = subnormal ? n - 24.0f : n;

    const Vector<float> z = m - 1.0f;
    Vector<float> series = broadcast(7.0376836292e-2f);
    series = series * z - 1.1514610310e-1f;
    series = series * z + 1.1676998740e-1f;
    series = series * z - 1.2420140846e-1f;
    series = series * z + 1.4249322787e-1f;
    series = series * z - 1.6668057665e-1f;
    series = series * z + 2.0000714765e-1f;
    series = series * z - 2.4999993993e-1f;
    series = series * z + 3.3333331174e-1f;
    const Vector<float> square = z * z;
    Vector<float> result = series * z * square - 2.12194440e-4f * n - 0.5f * square;
    result = z + result + n * 0.693359375f;

    const float infinity = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    result = x < broadcast(infinity) ? result : x;  // infinity and NaN
    result = x < zero ? broadcast(nan) : result;
    return x == zero ? broadcast(-infinity) : result;
}

inline Vector<double> log(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::log(x[lane]);
    return x;
}

inline Vector<double> exp(Vector<double> x) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}

template <size_t size>
inline void exp_each(Vector<double> (&x)[size]) {
    for (Vector<double>& each : x) each = exp(each);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
