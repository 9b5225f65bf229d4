#include "../multinomial.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/topk.h>

#include <algorithm>
#include <type_traits>

#include "generator.h"
#include "multinomial_philox.h"
#include "noise.h"

#define BIGRAMX_KERNELS "multinomial_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

template <typename scalar_t>
[[noreturn]] void refuse_row(const scalar_t* probs, int64_t vocab_size, int64_t b) {
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double prob = static_cast<double>(probs[j]);
        TORCH_CHECK(
            prob >= 0 && prob < std::numeric_limits<double>::infinity(),
            "multinomial: probability tensor contains either `inf`, `nan` or element < 0: probs holds ", prob,
            " in row ", b, " at position ", j);
    }
    TORCH_CHECK(false, "multinomial: invalid multinomial distribution (sum of probabilities <= 0) in row ",
                b);
}

template <typename scalar_t>
void check_probs(const scalar_t* probs, int64_t num_rows, int64_t vocab_size) {
    const auto kernel = BIGRAMX_DISPATCH(is_distribution<scalar_t>);
    for (int64_t b = 0; b < num_rows; ++b) {
        const scalar_t* row = probs + b * vocab_size;
        if (!kernel(row, vocab_size)) refuse_row(row, vocab_size, b);
    }
}

template <typename scalar_t>
void sample_one(const at::Tensor& probs, const std::optional<at::Generator>& generator, at::Tensor& samples) {
    const int64_t num_rows = probs.size(0), vocab_size = probs.size(1);
    const scalar_t* row = probs.const_data_ptr<scalar_t>();
    int64_t* tokens = samples.data_ptr<int64_t>();
    with_noise<scalar_t>(generator, vocab_size, num_rows, [&](auto& noise) {
        for (int64_t b = 0; b < num_rows; ++b) tokens[b] = noise.sample(row + b * vocab_size);
    });
}

// What torch.multinomial compares. The noise lies in memory, and is drawn, in the order in which probs lies.
at::Tensor draw_ratios(const at::Tensor& probs, const std::optional<at::Generator>& generator) {
    at::Tensor ratios = at::empty_like(probs).exponential_(1, generator);
    return at::div_out(ratios, probs, ratios);
}

// The cumulative sums of a row, kept in `sum_t`: float32 for 16-bit floats, else the dtype itself, as ATen
// keeps them; float64 where there are more categories than float32 can count, which ATen refuses.
template <typename sum_t>
class CumulativeSums {
  public:
    CumulativeSums(int64_t vocab_size, int64_t num_searches)
        : sums_(vocab_size), guide_(guide_size(vocab_size, num_searches)) {}

    template <typename scalar_t>
    void set(const scalar_t* probs) {
        sum_t total = 0;
        for (sum_t& sum : sums_) sum = total += static_cast<sum_t>(*probs++);
        for (sum_t& sum : sums_) sum /= total;
        sums_[sums_.size() - 1] = 1;
        int64_t token = 0;
        for (int64_t k = 0; k < guide_.size(); ++k) {
            const double u = static_cast<double>(k) / static_cast<double>(guide_.size());
            while (below(token, u)) ++token;
            guide_[k] = token;
        }
    }

    // The first token whose sum is not below u, 0 <= u < 1.
    int64_t find(double u) const {
        if (guide_.size() == 0) {
            return std::lower_bound(sums_.begin(), sums_.end(), u,
                                    [](sum_t sum, double u) { return static_cast<double>(sum) < u; }) -
                   sums_.begin();
        }
        int64_t token = guide_[static_cast<int64_t>(u * static_cast<double>(guide_.size()))];
        token += below(token, u);  // mostly enough, and without a branch that cannot be predicted
        token += below(token, u);
        while (below(token, u)) ++token;
        return token;
    }

  private:
    // A power of two, so that u * size is exact; none where it would cost more than the searches without it.
    static int64_t guide_size(int64_t vocab_size, int64_t num_searches) {
        if (num_searches <= vocab_size / 8) return 0;
        int64_t size = 1;
        while (size < vocab_size) size *= 2;
        return size;
    }

    bool below(int64_t token, double u) const { return static_cast<double>(sums_[token]) < u; }

    const Buffer<sum_t> sums_;
    const Buffer<int64_t> guide_;  // find(k / size)
};

template <typename scalar_t, typename sum_t>
void sample_with_replacement(const at::Tensor& probs, const std::optional<at::Generator>& generator,
                             at::Tensor& samples) {
    constexpr int64_t kBlock = GeneratorStream::kMaxDraws;
    double draws[kBlock];
    const int64_t vocab_size = probs.size(1), num_samples = samples.size(1);
    CumulativeSums<sum_t> sums(vocab_size, num_samples);
    GeneratorStream stream(cpu_generator(generator));
    int64_t* sample = samples.data_ptr<int64_t>();
    for (int64_t b = 0; b < probs.size(0); ++b) {
        sums.set(probs.const_data_ptr<scalar_t>() + b * vocab_size);
        for (int64_t first = 0; first < num_samples; first += kBlock) {
            const int64_t count = std::min(kBlock, num_samples - first);
            draw_uniforms(stream, count, draws);
            for (int64_t k = 0; k < count; ++k) *sample++ = sums.find(draws[k]);
        }
    }
}

}  // namespace

at::Tensor multinomial_cpu(const at::Tensor& probs, int64_t num_samples, bool replacement, Sampler sampler,
                           const std::optional<at::Generator>& generator) {
    constexpr int64_t kFloatCounts = 1 << 24;
    at::Tensor samples = at::empty({probs.size(0), num_samples}, probs.options().dtype(at::kLong));
    const at::Tensor rows = probs.contiguous();
    const bool are_drawn =
        sampler == Sampler::philox && multinomial_philox(rows, replacement, draw_seed(generator), samples);
    if (are_drawn) return samples;  // else check_probs tells why not
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, probs.scalar_type(), "multinomial", [&] {
        using sum_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        check_probs(rows.const_data_ptr<scalar_t>(), rows.size(0), rows.size(1));
        if (num_samples == 1 && (probs.is_contiguous() || at::empty_like(probs).is_contiguous())) {
            sample_one<scalar_t>(rows, generator, samples);
        } else if (num_samples == 1) {
            samples = draw_ratios(probs, generator).argmax(-1, /*keepdim=*/true);
        } else if (!replacement) {
            samples = std::get<1>(at::topk(draw_ratios(probs, generator), num_samples));
        } else if (rows.size(1) <= kFloatCounts) {
            sample_with_replacement<scalar_t, sum_t>(rows, generator, samples);
        } else {
            sample_with_replacement<scalar_t, double>(rows, generator, samples);
        }
    });
    return samples;
}

}  // namespace bigramx
