#include "../generate.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <vector>

#include "chains.h"
#include "generator.h"
#include "huge_pages.h"
#include "noise.h"
#include "threshold_rows.h"

namespace bigramx {
namespace {

// What a step reads of some rows of the table, and which of them are distributions.
struct PreparedRows {
    at::Tensor entries;  // (rows, V)
    at::Tensor valid;    // (rows) bool
};

PreparedRows prepare_probs(const at::Tensor& logits) {
    const at::Tensor probs = logits.softmax(-1);
    return {probs, at::isfinite(probs.sum(-1))};
}

// The rows of the table, each prepared when a chain first meets it, in blocks of a size that is worth a call.
template <typename entry_t>
class RowCache {
  public:
    RowCache(const at::Tensor& weight, const SamplingOptions& options,
             PreparedRows (*prepare)(const at::Tensor&))
        : weight_(weight),
          options_(options),
          prepare_(prepare),
          vocab_size_(weight.size(0)),
          rows_per_block_(
              std::clamp<int64_t>(kBlockElements / std::max<int64_t>(vocab_size_, 1), 1, vocab_size_)),
          blocks_((vocab_size_ + rows_per_block_ - 1) / rows_per_block_) {}

    const entry_t* row(int64_t token) {
        PreparedRows& block = blocks_[token / rows_per_block_];
        if (!block.entries.defined()) fill(block, token / rows_per_block_ * rows_per_block_);
        const int64_t row = token % rows_per_block_;
        TORCH_CHECK(block.valid.const_data_ptr<bool>()[row],
                    "generate: probability tensor contains either `inf`, `nan` or element < 0: row ", token,
                    " of weight, divided by the temperature, holds a NaN, an infinity, or nothing but "
                    "negative infinities");
        return block.entries.const_data_ptr<entry_t>() + row * vocab_size_;
    }

  private:
    static constexpr int64_t kBlockElements = 1 << 16;
    static constexpr int64_t kMaxBytes = int64_t{1} << 30;  // all rows are dropped where they would take more

    void fill(PreparedRows& block, int64_t first_row) {
        const int64_t num_rows = std::min(rows_per_block_, vocab_size_ - first_row);
        const int64_t bytes = num_rows * vocab_size_ * static_cast<int64_t>(sizeof(entry_t));
        if (bytes_ + bytes > kMaxBytes) {
            std::fill(blocks_.begin(), blocks_.end(), PreparedRows());
            bytes_ = 0;
        }
        block = prepare_(filter_logits(weight_.narrow(0, first_row, num_rows), options_));
        bytes_ += bytes;
    }

    const at::Tensor weight_;
    const SamplingOptions options_;
    PreparedRows (*const prepare_)(const at::Tensor&);
    const int64_t vocab_size_;
    const int64_t rows_per_block_;
    std::vector<PreparedRows> blocks_;
    int64_t bytes_ = 0;
};

// All chains take a step before any takes the next: the order in which the lecture's loop draws.
// next(token): the token that follows `token`, drawn. Returns how many steps it took: fewer than there are
// where all chains met `stop`.
template <typename Next>
int64_t run_in_step(const Chains& chains, std::optional<int64_t> stop, const Next& next) {
    std::vector<char> stopped(chains.num_chains, false);
    int64_t num_running = chains.num_chains, t = 0;
    for (; t < chains.num_steps && num_running > 0; ++t) {
        for (int64_t b = 0; b < chains.num_chains; ++b) {
            const int64_t token = next(chains.before(b, t));
            *chains.at(b, t) = stopped[b] ? *stop : token;
            if (!stopped[b] && token == stop) {
                stopped[b] = true;
                --num_running;
            }
        }
    }
    return t;
}

int64_t generate_by_noise(const at::Tensor& weight, const SamplingOptions& options,
                          const std::optional<at::Generator>& generator, const Chains& chains) {
    int64_t length = 0;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "generate", [&] {
        RowCache<scalar_t> rows(weight, options, &prepare_probs);
        with_noise<scalar_t>(generator, weight.size(0), chains.num_chains, [&](auto& noise) {
            length = run_in_step(chains, options.stop,
                                 [&](int64_t token) { return noise.sample(rows.row(token)); });
        });
    });
    return length;
}

int64_t generate_by_thresholds(const at::Tensor& weight, const SamplingOptions& options,
                               const std::optional<at::Generator>& generator, const Chains& chains) {
    constexpr int64_t kMaxBytes = int64_t{1} << 30, kDrawsWorthAWholeRow = 32, kMaxVocabOfSureEntries = 200;
    const int64_t vocab_size = weight.size(0);
    const auto run = [&](auto&& rows, uint64_t seed) {
        return ChainRunner(rows, seed, chains, options.stop).run();
    };
    if (options.temperature == 0) return run(GreedyRows(weight), 0);
    const uint64_t seed = draw_seed(generator);
    const bool draws_many = chains.num_chains * chains.num_steps >= kDrawsWorthAWholeRow * vocab_size;
    if (!draws_many || WholeRows<false>::bytes(vocab_size) > kMaxBytes) {
        return run(BlockRows(weight, options), seed);
    }
    if (vocab_size <= kMaxVocabOfSureEntries) return run(WholeRows<true>(weight, options), seed);
    return run(WholeRows<false>(weight, options), seed);
}

}  // namespace

int64_t generate_cpu(const at::Tensor& weight, const SamplingOptions& options,
                     const std::optional<at::Generator>& generator, int64_t num_given, at::Tensor& tokens) {
    const Chains chains{tokens.data_ptr<int64_t>() + num_given, tokens.size(0), tokens.size(1) - num_given,
                        tokens.stride(0)};
    advise_huge_pages(tokens);
    if (options.sampler == Sampler::philox || options.temperature == 0) {
        return generate_by_thresholds(weight, options, generator, chains);
    }
    return generate_by_noise(weight, options, generator, chains);
}

}  // namespace bigramx
