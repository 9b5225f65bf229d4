#include "multinomial.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/topk.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/base/buffer.h"
#include "cpu/sampling/exponential_variates.h"
#include "cpu/sampling/fixed_point_weights.h"
#include "cpu/sampling/guide_table.h"
#include "cpu/sampling/philox_fill.h"
#include "sampling/distribution_errors.h"
#include "sampling/fixed_point_cdf.h"
#include "sampling/generator.h"

namespace bigramx::cpu {

// For the sampler "philox": sample k of row b is drawn at (seed, b, k).
struct MultinomialKernelParams {
    const void* probs;  // (B, V)
    int64_t vocab_size, num_samples;
    uint64_t seed;
    int64_t* samples;  // (B, num_samples)

    template <typename scalar_t>
    ProbRow row(int64_t b) const {
        return {static_cast<const scalar_t*>(probs) + b * vocab_size, 0};
    }
};

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "cpu/multinomial_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

// Between checks for signals.
constexpr int64_t kElementsAChunk = 1 << 20;

int64_t rows_a_chunk(const at::Tensor& probs) {
    return std::max<int64_t>(kElementsAChunk / std::max<int64_t>(probs.size(1), 1), 1);
}

// probs.contiguous(), in chunks.
at::Tensor contiguous_rows(const at::Tensor& probs) {
    if (probs.is_contiguous()) return probs;
    const at::Tensor rows = at::empty(probs.sizes(), probs.options());
    for_each_chunk(probs.size(0), rows_a_chunk(probs), [&](int64_t begin, int64_t end) {
        rows.narrow(0, begin, end - begin).copy_(probs.narrow(0, begin, end - begin));
    });
    return rows;
}

// --------------------------------------------------------------------------------------------- philox

constexpr int64_t kGrainSize = 1 << 15;

// The buckets that pay: about one per draw, and at most a few per token.
int guide_bits(const MultinomialKernelParams& params) {
    constexpr int64_t kBucketsAToken = 2;
    int bits = 0;
    while (int64_t{1} << bits < std::min(params.num_samples, kBucketsAToken * params.vocab_size)) ++bits;
    return bits;
}

// find(r): the token that r draws, where its high bits do not decide.
template <typename Find>
void draw_with_replacement(const MultinomialKernelParams& params, int64_t b, const uint32_t* cdf,
                           const Find& find) {
    constexpr int64_t kBlock = DrawBlock::kSize, kBlockGrainSize = 32, kBlocksAChunk = 1 << 14;
    const int bits = guide_bits(params);
    const Buffer<uint32_t> guide((int64_t{1} << bits) + 1);
    fill_guide_table(cdf, params.vocab_size, bits, guide.begin());
    int64_t* samples = params.samples + b * params.num_samples;
    const int64_t num_blocks = (params.num_samples + kBlock - 1) / kBlock;
    const auto draw_blocks = [&](int64_t first, int64_t last) {
        DrawBlock draws;
        for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, params.num_samples);
             begin += kBlock) {
            const int64_t count = std::min(kBlock, params.num_samples - begin);
            draws.fill_high(params.seed, b, begin, count);
            for (int64_t k = 0; k < count; ++k) {
                const uint32_t r = draws.high[k];
                const int64_t token = search_cdf(cdf, guide[guide_bucket(r, bits)], r);
                const bool decided = __builtin_expect(!is_undecided(cdf, token, r), true);
                samples[begin + k] = decided ? token : find(draws.complete(k));
            }
        }
    };
    for_each_chunk(num_blocks, kBlocksAChunk, [&](int64_t first, int64_t last) {
        at::parallel_for(first, last, kBlockGrainSize, draw_blocks);
    });
}

// draw(begin, end) draws from these rows, and returns whether all are distributions.
template <typename Draw>
bool for_rows(int64_t num_rows, int64_t elements_a_row, const Draw& draw) {
    constexpr int64_t kElementsOfThread = 1 << 23;  // between checks for signals
    std::atomic<bool> all_are_distributions{true};
    elements_a_row = std::max<int64_t>(elements_a_row, 1);
    const int64_t grain_size = std::max<int64_t>(kGrainSize / elements_a_row, 1);
    const int64_t rows_of_thread = std::max<int64_t>(kElementsOfThread / elements_a_row, 1);
    for_each_chunk(num_rows, rows_of_thread * at::get_num_threads(), [&](int64_t first, int64_t last) {
        at::parallel_for(first, last, grain_size, [&](int64_t begin, int64_t end) {
            if (!draw(begin, end)) all_are_distributions = false;
        });
    });
    return all_are_distributions;
}

template <typename scalar_t>
bool draw_all(const MultinomialKernelParams& params, int64_t num_rows, bool replacement) {
    if (params.num_samples == 1) {
        const auto kernel = BIGRAMX_DISPATCH_TARGET(draw_one_a_row_kernel<scalar_t>);
        return for_rows(num_rows, params.vocab_size,
                        [&](int64_t begin, int64_t end) { return kernel(params, begin, end); });
    }
    if (!replacement) {
        const auto kernel = BIGRAMX_DISPATCH_TARGET(draw_without_replacement_kernel<scalar_t>);
        const int64_t elements_a_row = params.vocab_size + kWeightsAtOnce * params.num_samples;
        return for_rows(num_rows, elements_a_row, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                if (!kernel(params, b)) return false;
            }
            return true;
        });
    }
    const auto kernel = BIGRAMX_DISPATCH_TARGET(cdf_kernel<scalar_t>);
    const auto find_kernel = BIGRAMX_DISPATCH_TARGET(find_token_kernel<scalar_t>);
    const auto draw_rows = [&](int64_t begin, int64_t end) {
        const Buffer<WeightSum> ends(num_weight_blocks(params.vocab_size));
        const Buffer<uint32_t> padded(padded_cdf(params.vocab_size));
        uint32_t* const cdf = padded.begin() + 1;
        pad_cdf(cdf, params.vocab_size);
        for (int64_t b = begin; b < end; ++b) {
            ProbRow row = params.row<scalar_t>(b);
            if (!kernel(row, params.vocab_size, ends.begin(), cdf)) return false;
            draw_with_replacement(params, b, cdf, [&](uint64_t r) {
                return find_kernel(row, params.vocab_size, ends.begin(), r);
            });
        }
        return true;
    };
    // Few rows, or many samples of each: one after the other, each by all threads.
    constexpr int64_t kManySamples = 1 << 22;
    if (num_rows < at::get_num_threads() || params.num_samples >= kManySamples) {
        bool all_are_distributions = true;
        for_each_chunk(num_rows, 1, [&](int64_t begin, int64_t end) {
            all_are_distributions = all_are_distributions && draw_rows(begin, end);
        });
        return all_are_distributions;
    }
    return for_rows(num_rows, params.vocab_size + params.num_samples, draw_rows);
}

// Returns false if a row is not a distribution; the samples are then undefined.
bool draw_by_philox(const at::Tensor& probs, bool replacement, uint64_t seed, const at::Tensor& samples) {
    bool all_are_distributions = false;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, probs.scalar_type(), kMultinomial, [&] {
        const MultinomialKernelParams params{probs.const_data_ptr(), probs.size(1), samples.size(1), seed,
                                             samples.data_ptr<int64_t>()};
        all_are_distributions = draw_all<scalar_t>(params, probs.size(0), replacement);
    });
    return all_are_distributions;
}

// ---------------------------------------------------------------------------------------------- torch

template <typename scalar_t>
[[noreturn]] void refuse_row(const scalar_t* probs, int64_t vocab_size, int64_t b) {
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double prob = static_cast<double>(probs[j]);
        TORCH_CHECK(prob >= 0 && prob < std::numeric_limits<double>::infinity(), kMultinomial,
                    ": " BIGRAMX_INVALID_PROBS ": probs holds ", prob, " in row ", b, " at position ", j);
    }
    TORCH_CHECK(false, kMultinomial, ": " BIGRAMX_ZERO_PROBS " in row ", b);
}

template <typename scalar_t>
void check_probs(const scalar_t* probs, int64_t num_rows, int64_t vocab_size) {
    const auto kernel = BIGRAMX_DISPATCH_TARGET(is_distribution_kernel<scalar_t>);
    SignalCheck signals;
    for (int64_t b = 0; b < num_rows; ++b) {
        const scalar_t* row = probs + b * vocab_size;
        if (!kernel(row, vocab_size)) refuse_row(row, vocab_size, b);
        signals.poll(vocab_size);
    }
}

template <typename scalar_t>
void sample_one(const at::Tensor& probs, const std::optional<at::Generator>& generator, at::Tensor& samples) {
    const int64_t num_rows = probs.size(0), vocab_size = probs.size(1);
    const scalar_t* row = probs.const_data_ptr<scalar_t>();
    int64_t* tokens = samples.data_ptr<int64_t>();
    with_exponential_race<scalar_t>(generator, vocab_size, num_rows, [&](auto& race) {
        for (int64_t b = 0; b < num_rows; ++b) tokens[b] = race.sample(row + b * vocab_size);
    });
}

// The largest probs / q of each row, as torch.multinomial computes them for the exponential race. q has the
// memory order of probs, in which it is drawn.
template <typename scalar_t>
void sample_largest(const at::Tensor& probs, const std::optional<at::Generator>& generator,
                    at::Tensor& samples) {
    const at::Tensor variates = at::empty_like(probs);
    draw_exponential<scalar_t>(variates, generator);
    for_each_chunk(probs.size(0), rows_a_chunk(probs), [&](int64_t begin, int64_t end) {
        const auto rows = [&](const at::Tensor& tensor) { return tensor.narrow(0, begin, end - begin); };
        const at::Tensor ratios = rows(probs) / rows(variates);
        rows(samples).copy_(samples.size(1) == 1 ? ratios.argmax(-1, /*keepdim=*/true)
                                                 : std::get<1>(ratios.topk(samples.size(1))));
    });
}

// The cumulative sums of a row. sum_t, as in ATen: float32 for 16-bit floats, else the dtype itself; float64
// where there are more categories than float32 can count, which ATen refuses.
template <typename sum_t>
class CumulativeSums {
  public:
    CumulativeSums(int64_t vocab_size, int64_t num_searches)
        : sums_(vocab_size), num_buckets_(num_buckets(vocab_size, num_searches)), guide_(num_buckets_ + 1) {}

    template <typename scalar_t>
    void set(const scalar_t* probs) {
        sum_t* const sums = sums_.begin();
        sum_t total = 0;
        for_each_chunk(sums_.size(), kElementsAChunk, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) sums[k] = total += static_cast<sum_t>(probs[k]);
        });
        for_each_chunk(sums_.size(), kElementsAChunk, [=](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) sums[k] /= total;
        });
        sums_[sums_.size() - 1] = 1;
        if (num_buckets_ == 0) return;
        fill_guide_table(sums_.size(), num_buckets_, guide_.begin(), [&](int64_t token) {
            const double bucket = static_cast<double>(sums_[token]) * static_cast<double>(num_buckets_);
            // Not for NaN, which sums that overflow leave: it is below nothing.
            return bucket < static_cast<double>(num_buckets_) ? static_cast<int64_t>(bucket) + 1
                                                              : num_buckets_;
        });
    }

    // The first token whose cumulative sum is at least u, 0 <= u < 1.
    int64_t find(double u) const {
        if (num_buckets_ == 0) {
            return std::lower_bound(sums_.begin(), sums_.end(), u,
                                    [](sum_t sum, double u) { return static_cast<double>(sum) < u; }) -
                   sums_.begin();
        }
        int64_t token = guide_[static_cast<int64_t>(u * static_cast<double>(num_buckets_))];
        token += below(token, u);  // two steps mostly suffice, and avoid mispredicted branches
        token += below(token, u);
        while (below(token, u)) ++token;
        return token;
    }

  private:
    // A power of two, so that its product with u is exact. 0 if a guide table would cost more than it saves.
    static int64_t num_buckets(int64_t vocab_size, int64_t num_searches) {
        if (num_searches <= vocab_size / 8) return 0;
        int64_t size = 1;
        while (size < vocab_size) size *= 2;
        return size;
    }

    bool below(int64_t token, double u) const { return static_cast<double>(sums_[token]) < u; }

    const Buffer<sum_t> sums_;
    const int64_t num_buckets_;  // 0: no guide table
    const Buffer<int64_t> guide_;
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
        stream.before_work(vocab_size);
        sums.set(probs.const_data_ptr<scalar_t>() + b * vocab_size);
        for (int64_t first = 0; first < num_samples; first += kBlock) {
            const int64_t count = std::min(kBlock, num_samples - first);
            draw_uniforms(stream, count, draws);
            for (int64_t k = 0; k < count; ++k) *sample++ = sums.find(draws[k]);
        }
    }
}

}  // namespace

at::Tensor multinomial_cpu(const MultinomialParams& params) {
    constexpr int64_t kFloatCounts = 1 << 24;
    const at::Tensor& probs = params.probs;
    const int64_t num_samples = params.num_samples;
    at::Tensor samples = at::empty({probs.size(0), num_samples}, probs.options().dtype(at::kLong));
    const at::Tensor rows = contiguous_rows(probs);
    const bool are_drawn = params.sampler == Sampler::philox &&
                           draw_by_philox(rows, params.replacement, draw_seed(params.generator), samples);
    if (are_drawn) return samples;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, probs.scalar_type(), kMultinomial, [&] {
        check_probs(rows.const_data_ptr<scalar_t>(), rows.size(0), rows.size(1));
        TORCH_CHECK(params.sampler != Sampler::philox, kMultinomial,
                    ": expected probs that nobody changes meanwhile");
        if (num_samples == 1 && (probs.is_contiguous() || at::empty_like(probs).is_contiguous())) {
            sample_one<scalar_t>(rows, params.generator, samples);
        } else if (num_samples == 1 || !params.replacement) {
            sample_largest<scalar_t>(probs, params.generator, samples);
        } else if (rows.size(1) <= kFloatCounts) {
            sample_with_replacement<scalar_t, opmath_t<scalar_t>>(rows, params.generator, samples);
        } else {
            sample_with_replacement<scalar_t, double>(rows, params.generator, samples);
        }
    });
    return samples;
}

}  // namespace bigramx
