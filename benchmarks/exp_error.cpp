// The error of the kernels' exponential, in units in the last place, over the float32 numbers.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <vector>

#define BIGRAMX_KERNELS "../benchmarks/exp_error_kernels.h"
#include "cpu/base/foreach_target.h"

namespace {

constexpr int64_t kBlock = 4096;

using Exponential = void (*)(const float* from, float* to, int64_t size);

// Those that this machine can run.
std::vector<Exponential> exponentials() {
    std::vector<Exponential> all{&bigramx::cpu::portable::exponential};
#if defined(__x86_64__)
    const bigramx::cpu::Target target = bigramx::cpu::cpu_target();
    if (target != bigramx::cpu::Target::portable) all.push_back(&bigramx::cpu::avx2::exponential);
    if (target == bigramx::cpu::Target::avx512) all.push_back(&bigramx::cpu::avx512::exponential);
#endif
    return all;
}

double error_in_ulp(float actual, double exact) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity(), kOverflow = 0x1.ffffffp127;
    if (std::isnan(exact)) return std::isnan(actual) ? 0 : kInfinity;
    if (exact >= kOverflow) return actual == kInfinity ? 0 : kInfinity;
    // The exponent's bits alone are the power of two below; what they lack of those of 2^1023 is its inverse.
    const auto power = __builtin_bit_cast(uint64_t, std::max(exact, 0x1p-126)) & 0x7FF0000000000000u;
    const double inverse = __builtin_bit_cast(double, 0x7FE0000000000000u - power);
    const double error = std::abs(std::min<double>(actual, 0x1p128) - exact) * inverse * 0x1p23;
    return error >= 0 ? error : kInfinity;
}

// The largest error over every stride-th float32 number, of each capability that this machine can run.
std::vector<double> exp_error(int64_t stride) {
    const std::vector<Exponential> all = exponentials();
    const int64_t num_blocks = ((int64_t{1} << 32) / stride + kBlock - 1) / kBlock;
    using Errors = std::vector<double>;
    return at::parallel_reduce(
        0, num_blocks, 64, Errors(all.size()),
        [&](int64_t begin, int64_t end, Errors errors) {
            std::vector<float> numbers(kBlock), results(kBlock);
            std::vector<double> exact(kBlock);
            for (int64_t block = begin; block < end; ++block) {
                for (int64_t k = 0; k < kBlock; ++k) {
                    const auto bits = static_cast<uint32_t>((block * kBlock + k) * stride);
                    std::memcpy(&numbers[k], &bits, sizeof(bits));
                    exact[k] = std::exp(static_cast<double>(numbers[k]));
                }
                for (size_t which = 0; which < all.size(); ++which) {
                    all[which](numbers.data(), results.data(), kBlock);
                    for (int64_t k = 0; k < kBlock; ++k) {
                        errors[which] = std::max(errors[which], error_in_ulp(results[k], exact[k]));
                    }
                }
            }
            return errors;
        },
        [](Errors a, const Errors& b) {
            for (size_t which = 0; which < a.size(); ++which) a[which] = std::max(a[which], b[which]);
            return a;
        });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("exp_error", &exp_error); }
