// Lower bounds: the least that the work costs, whoever does it. Compiled for the machine that runs them
// (lower_bounds.py), and vectorised where possible.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>

#include "base/direct_op.h"
#include "cpu/base/huge_pages.h"

namespace {

// ------------------------------------------------------------------------------------------- autograd
// What PyTorch itself costs around a kernel that is called the way bigramx::embedding_cross_entropy is.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Noop : torch::autograd::Function<Noop> {
    static variable_list forward(AutogradContext* ctx, const at::Tensor& weight, int64_t num_pairs) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        ctx->saved_data["gradient"] = at::empty(weight.sizes(), weight.options());
        return {at::empty({}, weight.options()), at::empty({num_pairs, weight.size(1)}, weight.options())};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list&) {
        const auto entry = ctx->saved_data.find("gradient");
        at::Tensor gradient = entry->second.toTensor();
        ctx->saved_data.erase(entry);
        return {gradient, at::Tensor()};
    }
};

std::tuple<at::Tensor, at::Tensor> noop(const at::Tensor& idx, const at::Tensor& weight, const at::Tensor&) {
    const variable_list outputs = Noop::apply(weight, idx.numel());
    return {outputs[0], outputs[1]};
}

// --------------------------------------------------------------------------------------------- memory

void advise_huge_pages(const at::Tensor& tensor) { bigramx::cpu::advise_huge_pages(tensor); }

// Sums the 64-bit words of a tensor.
int64_t read_words(const at::Tensor& tensor) {
    const auto* words = static_cast<const uint64_t*>(tensor.const_data_ptr());
    const auto sum = [words](int64_t begin, int64_t end, uint64_t start) {
        return std::accumulate(words + begin, words + end, start);
    };
    const auto num_words = static_cast<int64_t>(tensor.nbytes() / sizeof(uint64_t));
    return static_cast<int64_t>(
        at::parallel_reduce(0, num_words, 1 << 14, uint64_t{0}, sum, std::plus<uint64_t>()));
}

// Follows a random cycle through 16 KiB.
int64_t dependent_loads(int64_t num_loads) {
    static const auto next = [] {
        std::array<uint32_t, 4096> cycle;
        std::iota(cycle.begin(), cycle.end(), 0);
        std::mt19937 engine;
        for (uint32_t k = cycle.size() - 1; k > 0; --k) std::swap(cycle[k], cycle[engine() % k]);
        return cycle;
    }();
    uint32_t at = 0;
    for (int64_t load = 0; load < num_loads; ++load) at = next[at];
    return at;
}

// ------------------------------------------------------------------------------------- Mersenne Twister
// MT19937 (Matsumoto, Nishimura, 1998), 624 words at a time.

constexpr int64_t kStates = 624, kShift = 397;

inline uint32_t twist(uint32_t state, uint32_t next, uint32_t shifted) {
    const uint32_t mixed = (state & 0x80000000u) | (next & 0x7FFFFFFFu);
    return shifted ^ (mixed >> 1) ^ (-(next & 1u) & 0x9908B0DFu);
}

inline uint32_t temper(uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680u;
    word ^= (word << 15) & 0xEFC60000u;
    return word ^ (word >> 18);
}

void refill(uint32_t* states) {
    constexpr int64_t kWrap = kStates - kShift;
    for (int64_t k = 0; k < kWrap; ++k) states[k] = twist(states[k], states[k + 1], states[k + kShift]);
#pragma GCC ivdep
    for (int64_t k = kWrap; k < kStates - 1; ++k) {
        states[k] = twist(states[k], states[k + 1], states[k - kWrap]);
    }
    states[kStates - 1] = twist(states[kStates - 1], states[0], states[kShift - 1]);
}

// The sum of the words drawn, from the seed that std::mt19937 has by default.
int64_t mersenne_twister(int64_t num_words) {
    std::array<uint32_t, kStates> states;
    states[0] = std::mt19937::default_seed;
    for (uint32_t k = 1; k < kStates; ++k) {
        states[k] = 1812433253u * (states[k - 1] ^ (states[k - 1] >> 30)) + k;
    }
    uint64_t sum = 0;
    for (; num_words > 0; num_words -= kStates) {
        refill(states.data());
        const int64_t drawn = std::min(num_words, kStates);
        for (int64_t k = 0; k < drawn; ++k) sum += temper(states[k]);
    }
    return static_cast<int64_t>(sum);
}

// ------------------------------------------------------------------------------------------ arithmetic

// e^x for moderate x: x = n ln 2 + r, e^r by a polynomial (Cephes' expf), 2^n added to the exponent.
inline float exponential(float x) {
    const float shifted = x * 0x1.715476p0f + 0x1.8p23f;  // its low bits are n
    const float n = shifted - 0x1.8p23f;
    const float r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
    float series = 1.9875691500e-4f;
    series = series * r + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    const float e_r = series * (r * r) + r + 1.0f;
    return __builtin_bit_cast(
        float, __builtin_bit_cast(uint32_t, e_r) + (__builtin_bit_cast(uint32_t, shifted) << 23));
}

// For each element the exponential that its gradient needs and the AdamW update, in chunks of 1024 that stay
// in L1; the last chunk is always full.
double exp_and_adamw(int64_t num_elements) {
    constexpr int64_t kChunk = 1024;
    alignas(64) float param[kChunk] = {}, grad[kChunk], exp_avg[kChunk] = {}, exp_avg_sq[kChunk] = {};
    const float step_size = 1e-6f, decay = 1 - 1e-8f, root_correction2 = 1.1f, eps = 1e-8f;
    for (; num_elements > 0; num_elements -= kChunk) {
        for (int64_t k = 0; k < kChunk; ++k) grad[k] = exponential(param[k]);
        for (int64_t k = 0; k < kChunk; ++k) {
            exp_avg[k] += (grad[k] - exp_avg[k]) * 0.1f;
            exp_avg_sq[k] = exp_avg_sq[k] * 0.999f + grad[k] * grad[k] * 0.001f;
            const float denominator = std::sqrt(exp_avg_sq[k]) * root_correction2 + eps;
            param[k] = param[k] * decay - step_size * (exp_avg[k] / denominator);
        }
    }
    return std::accumulate(param, param + kChunk, 0.0);
}

TORCH_LIBRARY(bigramx_lower_bounds, m) {
    m.def("noop(Tensor idx, Tensor weight, Tensor targets) -> (Tensor loss, Tensor logits)", &noop);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    bigramx::DirectOp<decltype(noop)>::define(m, "bigramx_lower_bounds", "noop");
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("read_words", &read_words);
    m.def("dependent_loads", &dependent_loads);
    m.def("mersenne_twister", &mersenne_twister);
    m.def("exp_and_adamw", &exp_and_adamw);
}
