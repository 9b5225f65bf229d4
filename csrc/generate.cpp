#include "generate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.h"
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include "cuda/generate.h"
#endif

namespace bigramx {

at::Tensor filter_logits(at::Tensor logits, const SamplingOptions& options) {
    constexpr double kRemoved = -std::numeric_limits<double>::infinity();
    if (options.temperature != 1) logits = logits / options.temperature;
    if (options.top_k.has_value()) {
        const int64_t k = std::min(*options.top_k, logits.size(-1));
        const at::Tensor smallest_kept = std::get<0>(logits.topk(k)).narrow(-1, k - 1, 1);
        logits = logits.masked_fill(logits < smallest_kept, kRemoved);
    }
    if (options.top_p.has_value()) {
        const auto [sorted, order] =
            logits.softmax(-1).sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
        const at::Tensor removed = sorted.cumsum(-1) - sorted >= *options.top_p;
        logits = logits.masked_fill(at::zeros_like(removed).scatter(-1, order, removed), kRemoved);
    }
    if (options.min_p.has_value()) {
        const at::Tensor probs = logits.softmax(-1);
        logits = logits.masked_fill(probs < probs.amax(-1, /*keepdim=*/true) * *options.min_p, kRemoved);
    }
    return logits;
}

namespace {

constexpr const char* kName = "generate";

void check_options(const SamplingOptions& options, int64_t vocab_size) {
    TORCH_CHECK_VALUE(options.temperature >= 0 && std::isfinite(options.temperature), kName,
                      ": expected temperature to be finite and >= 0, got ", options.temperature);
    TORCH_CHECK_VALUE(options.top_k.value_or(1) >= 1, kName, ": expected top_k >= 1, got ",
                      options.top_k.value_or(1));
    const double top_p = options.top_p.value_or(1), min_p = options.min_p.value_or(0),
                 stop = options.stop.value_or(0);
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, kName, ": expected 0 < top_p <= 1, got ", top_p);
    TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, kName, ": expected 0 <= min_p <= 1, got ", min_p);
    TORCH_CHECK_VALUE(stop >= 0 && stop < static_cast<double>(std::max<int64_t>(vocab_size, 1)), kName,
                      ": expected 0 <= stop < ", vocab_size, ", got ", stop);
}

void check_idx(const at::Tensor& idx, const at::Tensor& weight) {
    check_dtype(kName, "idx", idx, {at::kLong, at::kInt});
    check_same_device(kName, "idx", idx, "weight", weight);
    TORCH_CHECK(idx.dim() == 2, kName, ": expected idx to be 2-D, (B, T), got shape ", idx.sizes());
    TORCH_CHECK_INDEX(idx.size(1) > 0 || idx.size(0) == 0, kName,
                      ": expected idx to hold at least one token a sequence, got shape ", idx.sizes());
}

// idx (B, T) -> the first T of tokens.
void copy_idx_cpu(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens) {
    const at::Tensor given = contiguous_int64(idx);
    const int64_t* token = given.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < given.numel(); ++n) {
        TORCH_CHECK_INDEX(token[n] >= 0 && token[n] < vocab_size, kName, ": index out of range: idx holds ",
                          token[n], " at position ", n, ", expected 0 <= idx < ", vocab_size);
    }
    tokens.narrow(1, 0, idx.size(1)).copy_(given);
}

#if defined(BIGRAMX_CUDA)

void copy_idx_cuda(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens) {
    const GpuScope scope(tokens);
    const at::Tensor given = contiguous_int64(idx);
    TORCH_CHECK_INDEX(vocab_size > 0 || given.numel() == 0, kName,
                      ": index out of range: expected weight to have rows, got none");
    launch_copy_idx(given.const_data_ptr<int64_t>(), given.size(0), given.size(1), vocab_size,
                    tokens.data_ptr<int64_t>(), tokens.stride(0), scope.stream());
}

// The chains of a call, and the memory that their kernels share.
class GpuChains {
  public:
    GpuChains(const at::Tensor& weight, const SamplingOptions& options, int64_t num_given,
              const at::Tensor& tokens)
        : scope_(tokens),
          weight_(weight.stride(1) == 1 ? weight : weight.contiguous()),
          vocab_size_(weight.size(0)),
          options_(options),
          removes_tokens_(options.top_k.has_value() || options.top_p.has_value() ||
                          options.min_p.has_value()),
          num_given_(num_given),
          tokens_(tokens),
          invalid_(words({1 + vocab_size_}, /*zeros=*/true)) {
        job_.tokens = tokens.data_ptr<int64_t>() + num_given;
        job_.num_chains = tokens.size(0);
        job_.num_steps = tokens.size(1) - num_given;
        job_.stride = tokens.stride(0);
        job_.num_segments = 1;
        job_.steps_a_segment = job_.num_steps;
    }

    void take_likeliest() {
        const at::Tensor likeliest = weight_.argmax(-1);
        launch_follow_likeliest(job_, likeliest.const_data_ptr<int64_t>(), scope_.stream());
    }

    void draw(const Seed& seed) {
        job_.seed = seed;
        if (removes_tokens_ && meets_few_rows()) {
            draw_step_by_step();
        } else if (is_worth_thresholds()) {
            draw_by_thresholds();
        } else {
            draw_by_logits();
        }
    }

    // Returns how many steps the longest chain took. Only with `stop` this waits for the GPU.
    int64_t finish() {
        if (!options_.stop.has_value()) {
            launch_check_rows(job_, pointer<unsigned>(invalid_), nullptr, scope_.stream());
            return job_.num_steps;
        }
        const at::Tensor lengths = at::full({job_.num_chains}, job_.num_steps, tokens_.options());
        auto* const length = lengths.data_ptr<int64_t>();
        launch_stop_chains(job_, *options_.stop, length, scope_.stream());
        launch_check_rows(job_, pointer<unsigned>(invalid_), length, scope_.stream());
        return lengths.max().item<int64_t>();
    }

  private:
    at::Tensor words(at::IntArrayRef sizes, bool zeros = false) const {
        const at::TensorOptions options = tokens_.options().dtype(at::kInt);
        return zeros ? at::zeros(sizes, options) : at::empty(sizes, options);
    }

    template <typename T>
    static T* pointer(const at::Tensor& words) {
        return static_cast<T*>(words.data_ptr());
    }

    // Whether to filter, at each step, the rows that the chains have come to is less than to filter the whole
    // table: the few tokens that are asked of a large vocabulary shall not wait for that.
    bool meets_few_rows() const {
        constexpr int64_t kLaunchesOfAStep = 1 << 18;  // take as long as so many elements
        return job_.num_steps * (job_.num_chains * vocab_size_ + kLaunchesOfAStep) <
               vocab_size_ * vocab_size_;
    }

    bool is_worth_thresholds() const {
        constexpr int64_t kMaxElements = 1 << 28, kSmallVocab = 256;
        return vocab_size_ * vocab_size_ <= kMaxElements &&
               (vocab_size_ <= kSmallVocab || job_.num_chains * job_.num_steps >= vocab_size_);
    }

    // Some rows with -inf for the tokens that the filters remove. The kernels divide by the temperature: on
    // a GPU ATen multiplies by its reciprocal, which rounds otherwise than the CPU.
    at::Tensor filter(const at::Tensor& rows) const {
        constexpr double kRemoved = -std::numeric_limits<double>::infinity();
        return removes_tokens_ ? rows.masked_fill(filter_logits(rows, options_).isneginf(), kRemoved) : rows;
    }

    LogitsJob logits_job(const at::Tensor& rows) const {
        return {float_type(rows),     rows.const_data_ptr(),      rows.size(0), vocab_size_, rows.stride(0),
                options_.temperature, pointer<unsigned>(invalid_)};
    }

    // visit(first, rows): for some rows of the table at a time, filtered.
    template <typename Visit>
    void for_filtered_rows(const Visit& visit) const {
        constexpr int64_t kElementsAtOnce = 1 << 26;  // the filters take several times their memory
        const int64_t rows_at_once =
            removes_tokens_ ? std::max<int64_t>(kElementsAtOnce / vocab_size_, 1) : vocab_size_;
        for (int64_t first = 0; first < vocab_size_; first += rows_at_once) {
            visit(first, filter(weight_.narrow(0, first, std::min(rows_at_once, vocab_size_ - first))));
        }
    }

    void cut(Follower follower) {
        cut_chains(follower, &job_);
        if (job_.num_segments == 1) return;
        joints_ = words({2, job_.num_chains, job_.num_segments});
        unmet_ = words({job_.num_chains}, /*zeros=*/true);
        job_.entries = pointer<uint32_t>(joints_);
        job_.exits = job_.entries + job_.num_chains * job_.num_segments;
        job_.unmet = pointer<unsigned>(unmet_);
    }

    void draw_by_thresholds() {
        const at::Tensor thresholds = words({vocab_size_, vocab_size_});
        for_filtered_rows([&](int64_t first, const at::Tensor& rows) {
            launch_write_thresholds(logits_job(rows), first,
                                    pointer<uint32_t>(thresholds) + first * vocab_size_, scope_.stream());
        });
        cut(Follower::thread);
        launch_follow_thresholds(job_, pointer<uint32_t>(thresholds), vocab_size_, scope_.stream());
    }

    void draw_by_logits() {
        at::Tensor table = weight_;
        if (removes_tokens_) {
            table = at::empty({vocab_size_, vocab_size_}, weight_.options());
            for_filtered_rows([&](int64_t first, const at::Tensor& rows) {
                table.narrow(0, first, rows.size(0)).copy_(rows);
            });
        }
        cut(Follower::block);
        launch_follow_logits(job_, logits_job(table), scope_.stream());
    }

    void draw_step_by_step() {
        for (int64_t step = 0; step < job_.num_steps; ++step) {
            const at::Tensor last = tokens_.select(1, num_given_ + step - 1);
            launch_draw_step(job_, logits_job(filter(weight_.index_select(0, last))), step, scope_.stream());
        }
    }

    const GpuScope scope_;
    const at::Tensor weight_;  // (V, V), each row contiguous
    const int64_t vocab_size_;
    const SamplingOptions options_;
    const bool removes_tokens_;
    const int64_t num_given_;
    const at::Tensor tokens_;
    const at::Tensor invalid_;
    at::Tensor joints_, unmet_;
    ChainsJob job_{};
};

int64_t generate_cuda(const at::Tensor& weight, const SamplingOptions& options,
                      const std::optional<at::Generator>& generator, int64_t num_given,
                      const at::Tensor& tokens) {
    GpuChains chains(weight, options, num_given, tokens);
    if (options.temperature == 0) {
        chains.take_likeliest();
    } else {
        chains.draw(draw_gpu_seed(generator));
    }
    return chains.finish();
}

#endif

at::Tensor generate_op(const at::Tensor& idx, const at::Tensor& weight, int64_t max_new_tokens,
                       double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                       std::optional<double> min_p, std::optional<int64_t> stop,
                       std::optional<c10::string_view> sampler,
                       const std::optional<at::Generator>& generator) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // tokens have no gradient
    check_defined(kName, "weight", weight);
    const SamplingOptions options{temperature, top_k, top_p,
                                  min_p,       stop,  choose_sampler(kName, sampler, weight)};
    check_square(kName, "weight", weight);
    check_floating(kName, "weight", weight);
    check_options(options, weight.size(0));
    check_idx(idx, weight);
    TORCH_CHECK_VALUE(max_new_tokens >= 0, kName, ": expected max_new_tokens >= 0, got ", max_new_tokens);
    const int64_t num_given = idx.size(1);
    at::Tensor tokens = at::empty({idx.size(0), num_given + max_new_tokens}, idx.options().dtype(at::kLong));
    BIGRAMX_BY_DEVICE(weight, copy_idx, idx, weight.size(0), tokens);
    int64_t num_filled = stop.has_value() ? 0 : max_new_tokens;
    if (idx.size(0) > 0 && max_new_tokens > 0) {
        num_filled = BIGRAMX_BY_DEVICE(weight, generate, weight, options, generator, num_given, tokens);
    }
    const at::Tensor filled = tokens.narrow(1, 0, num_given + num_filled);
    return num_filled == max_new_tokens ? tokens : filled.clone(at::MemoryFormat::Contiguous);
}

void register_ops(torch::Library& m) { m.impl("generate", &generate_op); }
BIGRAMX_REGISTER(register_ops)

}  // namespace
}  // namespace bigramx
