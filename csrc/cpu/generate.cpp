#include "../generate.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <vector>

#include "../thresholds.h"
#include "noise.h"

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

PreparedRows prepare_thresholds(const at::Tensor& logits) {
    const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
    const PreparedRows rows{at::empty({num_rows, vocab_size}, at::dtype(at::kUInt32)),
                            at::empty({num_rows}, at::dtype(at::kBool))};
    uint32_t* thresholds = rows.entries.data_ptr<uint32_t>();
    bool* valid = rows.valid.data_ptr<bool>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "generate", [&] {
        const at::Tensor rows_of_logits = logits.contiguous();
        const scalar_t* row = rows_of_logits.const_data_ptr<scalar_t>();
        for (int64_t i = 0; i < num_rows; ++i) {
            valid[i] = make_thresholds(row + i * vocab_size, vocab_size, thresholds + i * vocab_size);
        }
    });
    return rows;
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
// next(b, t, token): the token that follows `token` in chain b at step t.
template <typename Next>
void run_chains(const at::Tensor& starts, const SamplingOptions& options, const Next& next,
                at::Tensor& chains) {
    const int64_t num_chains = chains.size(0), num_steps = chains.size(1);
    int64_t* tokens = chains.data_ptr<int64_t>();
    std::vector<int64_t> last(starts.const_data_ptr<int64_t>(),
                              starts.const_data_ptr<int64_t>() + num_chains);
    std::vector<char> stopped(num_chains, false);
    int64_t num_running = num_chains;
    for (int64_t t = 0; t < num_steps; ++t) {
        if (num_running == 0) {
            chains.narrow(1, t, num_steps - t).fill_(options.stop.value_or(0));
            return;
        }
        for (int64_t b = 0; b < num_chains; ++b) {
            last[b] = next(b, t, last[b]);
            if (stopped[b]) last[b] = *options.stop;
            if (!stopped[b] && options.stop.has_value() && last[b] == *options.stop) {
                stopped[b] = true;
                --num_running;
            }
            tokens[b * num_steps + t] = last[b];
        }
    }
}

uint64_t draw_seed(const std::optional<at::Generator>& generator) {
    at::CPUGeneratorImpl* impl = cpu_generator(generator);
    const std::lock_guard<std::mutex> lock(impl->mutex_);
    return impl->random64();
}

void generate_by_thresholds(const at::Tensor& starts, const at::Tensor& weight,
                            const SamplingOptions& options, const std::optional<at::Generator>& generator,
                            at::Tensor& chains) {
    const bool greedy = options.temperature == 0;
    const uint64_t seed = greedy ? 0 : draw_seed(generator);
    RowCache<uint32_t> rows(weight, options, &prepare_thresholds);
    const auto next = [&](int64_t b, int64_t t, int64_t token) {
        const uint32_t r = greedy ? 0 : philox(seed, b, t) >> (32 - kThresholdBits);
        return find_token(rows.row(token), weight.size(0), r);
    };
    run_chains(starts, options, next, chains);
}

void generate_by_noise(const at::Tensor& starts, const at::Tensor& weight, const SamplingOptions& options,
                       const std::optional<at::Generator>& generator, at::Tensor& chains) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "generate", [&] {
        RowCache<scalar_t> rows(weight, options, &prepare_probs);
        with_noise<scalar_t>(generator, weight.size(0), chains.size(0), [&](auto& noise) {
            const auto next = [&](int64_t, int64_t, int64_t token) { return noise.sample(rows.row(token)); };
            run_chains(starts, options, next, chains);
        });
    });
}

}  // namespace

at::Tensor generate_cpu(const at::Tensor& starts, const at::Tensor& weight, int64_t max_new_tokens,
                        const SamplingOptions& options, const std::optional<at::Generator>& generator) {
    at::Tensor chains = at::empty({starts.numel(), max_new_tokens}, starts.options());
    if (chains.numel() == 0) return chains;
    if (options.sampler == Sampler::philox || options.temperature == 0) {
        generate_by_thresholds(starts, weight, options, generator, chains);
    } else {
        generate_by_noise(starts, weight, options, generator, chains);
    }
    return chains;
}

}  // namespace bigramx
