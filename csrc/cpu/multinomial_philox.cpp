#include "multinomial_philox.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "../thresholds.h"
#include "buffer.h"
#include "draws.h"
#include "guide.h"
#include "weights.h"

namespace bigramx {

struct MultinomialJob {
    const void* probs;  // (B, V)
    int64_t vocab_size, num_samples;
    uint64_t seed;
    int64_t* samples;  // (B, num_samples)

    template <typename scalar_t>
    ProbRow row(int64_t b) const {
        return {static_cast<const scalar_t*>(probs) + b * vocab_size, 0};
    }
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "multinomial_philox_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

constexpr int64_t kElementsAThread = 1 << 15;

// As many buckets as pay: about one a draw, and no more than a few a token.
int guide_bits(const MultinomialJob& job) {
    constexpr int64_t kBucketsAToken = 2;
    int bits = 0;
    while (int64_t{1} << bits < std::min(job.num_samples, kBucketsAToken * job.vocab_size)) ++bits;
    return bits;
}

void draw_with_replacement(const MultinomialJob& job, int64_t b, const uint32_t* thresholds) {
    constexpr int64_t kBlock = 1 << 10, kBlocksAThread = 8;
    const int bits = guide_bits(job);
    const Buffer<uint32_t> guide((int64_t{1} << bits) + 1);
    make_guide(thresholds, job.vocab_size, bits, guide.begin());
    int64_t* samples = job.samples + b * job.num_samples;
    const int64_t num_blocks = (job.num_samples + kBlock - 1) / kBlock;
    at::parallel_for(0, num_blocks, kBlocksAThread, [&](int64_t first, int64_t last) {
        uint32_t draws[kBlock];
        for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, job.num_samples);
             begin += kBlock) {
            const int64_t count = std::min(kBlock, job.num_samples - begin);
            fill_draws(job.seed, b, begin, count, draws);
            for (int64_t k = 0; k < count; ++k) {
                const uint32_t first = guide[guide_bucket(draws[k], bits)];
                samples[begin + k] = search_thresholds(thresholds, first, draws[k]);
            }
        }
    });
}

// draw(begin, end): draws from these rows, and tells whether all are distributions.
template <typename Draw>
bool for_rows(int64_t num_rows, int64_t elements_a_row, const Draw& draw) {
    std::atomic<bool> all_are_distributions{true};
    const int64_t grain = std::max<int64_t>(kElementsAThread / std::max<int64_t>(elements_a_row, 1), 1);
    at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
        if (!draw(begin, end)) all_are_distributions = false;
    });
    return all_are_distributions;
}

template <typename scalar_t>
bool draw_all(const MultinomialJob& job, int64_t num_rows, bool replacement) {
    if (job.num_samples == 1) {
        const auto kernel = BIGRAMX_DISPATCH(draw_one_a_row<scalar_t>);
        return for_rows(num_rows, job.vocab_size,
                        [&](int64_t begin, int64_t end) { return kernel(job, begin, end); });
    }
    if (!replacement) {
        const auto kernel = BIGRAMX_DISPATCH(draw_without_replacement<scalar_t>);
        return for_rows(num_rows, job.vocab_size + job.num_samples, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                if (!kernel(job, b)) return false;
            }
            return true;
        });
    }
    const auto kernel = BIGRAMX_DISPATCH(make_prob_thresholds<scalar_t>);
    const auto draw_rows = [&](int64_t begin, int64_t end) {
        const Buffer<uint32_t> thresholds(padded_thresholds(job.vocab_size));
        pad_thresholds(thresholds.begin(), job.vocab_size);
        for (int64_t b = begin; b < end; ++b) {
            if (!kernel(job, b, thresholds.begin())) return false;
            draw_with_replacement(job, b, thresholds.begin());
        }
        return true;
    };
    // Few rows go one after the other, each with all threads.
    if (num_rows < at::get_num_threads()) return draw_rows(0, num_rows);
    return for_rows(num_rows, job.vocab_size + job.num_samples, draw_rows);
}

}  // namespace

bool multinomial_philox(const at::Tensor& probs, bool replacement, uint64_t seed, at::Tensor& samples) {
    bool all_are_distributions = false;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, probs.scalar_type(), "multinomial", [&] {
        const MultinomialJob job{probs.const_data_ptr(), probs.size(1), samples.size(1), seed,
                                 samples.data_ptr<int64_t>()};
        all_are_distributions = draw_all<scalar_t>(job, probs.size(0), replacement);
    });
    return all_are_distributions;
}

}  // namespace bigramx
