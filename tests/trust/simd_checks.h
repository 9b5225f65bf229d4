// Checks of cpu/base/simd.h and of the AdamW kernels, for the CPU target that is being compiled
// (simd_checks.cpp includes this file once for each, hence no include guard).

#include "cpu/deferred_adamw_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename Vectorised, typename Exact>
void check_function(const char* name, double most_ulps, const Vectorised& vectorised, const Exact& exact,
                    float (*sampled)(uint32_t) = sample) {
    constexpr int64_t kCount = kLanes<float>;
    float from[kCount], to[kCount];
    for (uint32_t begin = 0; begin < kSamples; begin += kCount) {
        for (int64_t lane = 0; lane < kCount; ++lane)
            from[lane] = sampled(begin + static_cast<uint32_t>(lane));
        store(to, vectorised(load(from)));
        for (int64_t lane = 0; lane < kCount; ++lane) {
            check(ulps(to[lane], exact(static_cast<double>(from[lane]))) <= most_ulps, name, from[lane]);
        }
    }
}

template <typename scalar_t>
void check_narrow(const char* name) {
    constexpr int64_t kCount = kLanes<float>;
    scalar_t narrow[kCount];
    float wide[kCount];
    for (uint32_t begin = 0; begin < 1 << 16; begin += kCount) {
        for (uint32_t k = 0; k < kCount; ++k) {
            narrow[k] = scalar_t(static_cast<uint16_t>(begin + k), scalar_t::from_bits());
        }
        store(wide, load(narrow));
        for (int64_t k = 0; k < kCount; ++k)
            check(same(wide[k], static_cast<float>(narrow[k])), name, wide[k]);
    }
    for (uint32_t begin = 0; begin < kSamples; begin += kCount) {
        for (uint32_t k = 0; k < kCount; ++k) wide[k] = sample(begin + k);
        store(narrow, load(wide));
        for (int64_t k = 0; k < kCount; ++k) {
            const float expected = static_cast<float>(static_cast<scalar_t>(wide[k]));
            check(same(static_cast<float>(narrow[k]), expected), name, wide[k]);
        }
    }
}

// Rows of all sizes up to a few vectors: what lies behind a row is neither read into a result nor written.
template <typename scalar_t>
void check_rows(const char* name) {
    using acc_t = opmath_t<scalar_t>;
    constexpr int64_t kMost = 4 * kLanes<acc_t>;
    for (int64_t size = 0; size <= kMost; ++size) {
        scalar_t from[kMost + 1], to[kMost + 1], streamed[kMost + 1];
        acc_t wide[kMost + 1], expected = 0;
        for (int64_t k = 0; k <= kMost; ++k) {
            from[k] = static_cast<scalar_t>(k < size ? k % 7 - 2 : 99);
            to[k] = streamed[k] = scalar_t(-1);
            wide[k] = static_cast<acc_t>(from[k]);
            if (k < size) expected += wide[k];
        }
        Vector<acc_t> sums = broadcast(acc_t(0)), largest = broadcast(acc_t(-3));
        for_each_vector<acc_t>(size, [&](Lanes<acc_t> lanes) {
            sums += lanes.load(from, acc_t(0));
            largest = max(largest, lanes.load(from, acc_t(-3)));
            lanes.store(to, lanes.load(from, acc_t(0)));
        });
        NonTemporalRow<scalar_t> row;
        row.start(streamed, wide, size, acc_t(2));
        row.finish();
        fence_nontemporal_stores();
        check(horizontal_sum<acc_t>(sums) == expected, name, size);
        check(horizontal_max<acc_t>(largest) == (size == 0 ? -3 : std::min<int64_t>(size, 7) - 3), name,
              size);
        for (int64_t k = 0; k <= kMost; ++k) {
            check(to[k] == (k < size ? from[k] : scalar_t(-1)), name, size);
            check(streamed[k] == (k < size ? scalar_t(wide[k] * 2) : scalar_t(-1)), name, size);
        }
    }
}

template <typename T>
void check_lanes(const char* name) {
    Vector<T> vectors[kLanes<T>], largest[1];
    for (int64_t k = 0; k < kLanes<T>; ++k) {
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) vectors[k][lane] = static_cast<T>(k * lane % 5);
    }
    largest[0] = reduce_each<T>(vectors, [](Vector<T> a, Vector<T> b) { return max(a, b); });
    for (int64_t k = 0; k < kLanes<T>; ++k) {
        check(largest[0][k] == horizontal_max<T>(vectors[k]), name, static_cast<double>(k));
        uint64_t reaching = 0;
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) reaching |= uint64_t{vectors[k][lane] >= 2} << lane;
        check(lanes_reaching<T>(vectors[k], T(2)) == reaching, name, static_cast<double>(k));
    }
}

inline void check_products() {
    const uint64_t factor = 0xD2511F53;
    Vector<uint64_t> words{};
    for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) words[lane] = ~uint64_t{0} / (lane + 3);
    const Vector<uint64_t> products = multiply_low_words(words, broadcast(factor));
    for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) {
        check(products[lane] == (words[lane] & 0xFFFFFFFF) * factor, "multiply_low_words", lane);
    }
}

template <typename T>
void check_adamw(const char* name, double tolerance) {
    constexpr int64_t kSize = 5 * kLanes<T> + 3;
    T param[kSize], grad[kSize], exp_avg[kSize], exp_avg_sq[kSize], largest[kSize];
    double expected[kSize];
    const AdamWOptions options{0.1, 0.9, 0.99, 1e-8, 0.01, false};
    const AdamWConstants<double> exact = adamw_constants<double>(options, 3);
    for (int64_t k = 0; k < kSize; ++k) {
        param[k] = static_cast<T>(0.25 * (k % 9) - 1);
        grad[k] = static_cast<T>(0.5 * (k % 5) - 1);
        exp_avg[k] = static_cast<T>(0.125 * (k % 4));
        exp_avg_sq[k] = static_cast<T>(0.25 * (k % 3));
        largest[k] = static_cast<T>(0.5 * (k % 2));
        const double average = exp_avg[k] + (grad[k] - exp_avg[k]) * exact.one_minus_beta1;
        const double square = exp_avg_sq[k] * exact.beta2 + exact.one_minus_beta2 * grad[k] * grad[k];
        const double root = std::sqrt(std::max<double>(largest[k], square));
        expected[k] = param[k] * exact.decay -
                      exact.step_size * average / (root * exact.inverse_root_correction2 + exact.eps);
    }
    adamw_kernel<T>(adamw_constants<T>(options, 3), {param, exp_avg, exp_avg_sq, largest}, grad, kSize - 1);
    for (int64_t k = 0; k + 1 < kSize; ++k) {
        check(std::abs(param[k] - expected[k]) < tolerance * (1 + std::abs(expected[k])), name, param[k]);
    }
    check(param[kSize - 1] == static_cast<T>(0.25 * ((kSize - 1) % 9) - 1), name, kSize);
}

// Missed steps have the bits of steps whose gradient is zero, however the compiler contracts either loop.
template <typename T>
void check_deferred_adamw(const char* name, const AdamWOptions& options) {
    constexpr int64_t kSize = 5 * kLanes<T> + 3, kFirst = 3, kSteps = 70;
    AdamWSchedule<T> schedule(kFirst);
    for (int64_t k = 0; k < kSteps; ++k) schedule.add(options);
    T late[3][kSize], expected[3][kSize], grad[kSize] = {};
    for (int64_t k = 0; k < kSize; ++k) {
        late[0][k] = expected[0][k] = static_cast<T>(0.37 * (k % 9) - 1);
        late[1][k] = expected[1][k] = static_cast<T>(k < kLanes<T> ? 0 : 0.013 * (k % 7) - 0.04);
        late[2][k] = expected[2][k] = static_cast<T>(k < kLanes<T> ? 0 : 0.0021 * (k % 5));
    }
    int64_t row_steps = kFirst - 1;
    catch_up_kernel<T>({{late[0], late[1], late[2]}, kSize, &row_steps, &schedule}, 0, kFirst + kSteps - 1);
    for (int64_t k = 0; k < kSteps; ++k) {
        adamw_kernel<T>(*schedule.step(kFirst + k), {expected[0], expected[1], expected[2]}, grad, kSize);
    }
    check(row_steps == kFirst + kSteps - 1, name, static_cast<double>(row_steps));
    for (int64_t array = 0; array < 3; ++array) {
        for (int64_t k = 0; k < kSize; ++k) {
            const T got = late[array][k];
            check(std::memcmp(&got, expected[array] + k, sizeof(T)) == 0, name, got);
        }
    }
}

inline void check_all_kernel() {
    const auto exact_exp = [](double x) { return std::exp(x); };
    check_function("exp", 2, [](Vector<float> x) { return exp(x); }, exact_exp);
    // Its two ways: for vectors of numbers of any size, and for those without an extreme one.
    for (const auto sampled : {sample, moderate_sample}) {
        const auto each = [](Vector<float> x) {
            Vector<float> vectors[] = {x, x};
            exp_each(vectors);
            return vectors[1];
        };
        check_function("exp_each", 2, each, exact_exp, sampled);
    }
    check_function("log", 2, [](Vector<float> x) { return log(x); }, [](double x) { return std::log(x); });
    check_function(
        "sqrt", 0.5, [](Vector<float> x) { return sqrt(x); }, [](double x) { return std::sqrt(x); });
    check_narrow<c10::BFloat16>("bfloat16");
    check_narrow<c10::Half>("float16");
    check_rows<float>("rows of float32");
    check_rows<double>("rows of float64");
    check_rows<c10::BFloat16>("rows of bfloat16");
    check_rows<c10::Half>("rows of float16");
    check_lanes<float>("lanes of float32");
    check_lanes<double>("lanes of float64");
    check_products();
    check_adamw<float>("adamw_kernel of float32", 1e-6);
    check_adamw<double>("adamw_kernel of float64", 1e-14);
    for (const double weight_decay : {0.0, 0.01}) {
        const AdamWOptions options{0.01, 0.9, 0.99, 1e-8, weight_decay, weight_decay > 0};
        check_deferred_adamw<float>("missed steps of float32", options);
        check_deferred_adamw<double>("missed steps of float64", options);
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
