#include "generate.h"

#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "base/op_names.h"
#include "cuda/base/device.h"
#include "cuda/generate_kernels.h"

namespace bigramx {
namespace {

// The chains of a call, and the memory that their kernels share.
class ChainsOfCall {
  public:
    ChainsOfCall(const GenerateParams& params, const at::Tensor& tokens)
        : guard_(tokens),
          params_(params),
          weight_(params.weight.stride(1) == 1 ? params.weight : params.weight.contiguous()),
          vocab_size_(weight_.size(0)),
          tokens_(tokens),
          invalid_(words({1 + vocab_size_}, /*zeros=*/true)) {
        chains_.tokens = tokens.data_ptr<int64_t>() + params.prompt_length;
        chains_.num_chains = tokens.size(0);
        chains_.num_steps = tokens.size(1) - params.prompt_length;
        chains_.stride = tokens.stride(0);
        chains_.num_segments = 1;
        chains_.steps_a_segment = chains_.num_steps;
    }

    void take_argmax() {
        const at::Tensor argmax = weight_.argmax(-1);
        launch_chains_by_argmax(chains_, argmax.const_data_ptr<int64_t>(), guard_.stream());
    }

    void draw(const cuda::Seed& seed) {
        chains_.seed = seed;
        if (params_.removes_tokens()) {
            kept_ =
                at::empty({vocab_size_, cuda::FilteredRows::kKeptBytes}, tokens_.options().dtype(at::kByte));
            kept_states_ = words({vocab_size_}, /*zeros=*/true);
        }
        if (is_worth_cdf()) {
            draw_by_cdf();
        } else {
            draw_by_logits();
        }
    }

    // Returns how many steps the longest chain took. Only with stop tokens this waits for the GPU.
    int64_t finish() {
        if (!params_.stop.any()) {
            launch_check_rows(chains_, pointer<unsigned>(invalid_), nullptr, guard_.stream());
            return chains_.num_steps;
        }
        const at::Tensor lengths = at::full({chains_.num_chains}, chains_.num_steps, tokens_.options());
        auto* const length = lengths.data_ptr<int64_t>();
        const at::Tensor several = several_stops();
        launch_stop_chains(chains_, {params_.stop.one.value_or(0), pointer<int8_t>(several)}, length,
                           guard_.stream());
        launch_check_rows(chains_, pointer<unsigned>(invalid_), length, guard_.stream());
        return lengths.max().item<int64_t>();
    }

  private:
    at::Tensor words(at::IntArrayRef sizes, bool zeros = false) const {
        const at::TensorOptions options = tokens_.options().dtype(at::kInt);
        return zeros ? at::zeros(sizes, options) : at::empty(sizes, options);
    }

    // (V) on the GPU: whether a token is one of several stop tokens; or (0).
    at::Tensor several_stops() const {
        return at::tensor(at::ArrayRef<int8_t>(params_.stop.several), tokens_.options().dtype(at::kChar));
    }

    template <typename T>
    static T* pointer(const at::Tensor& words) {
        return static_cast<T*>(words.data_ptr());
    }

    bool is_worth_cdf() const {
        constexpr int64_t kMaxElements = 1 << 27, kSmallVocab = 256;
        return vocab_size_ * vocab_size_ <= kMaxElements &&
               (vocab_size_ <= kSmallVocab || chains_.num_chains * chains_.num_steps >= vocab_size_);
    }

    cuda::LogitsParams table() const {
        cuda::LogitsParams table{cuda::float_type(weight_), weight_.const_data_ptr(), vocab_size_,
                                 weight_.stride(0), params_.temperature};
        if (params_.removes_tokens()) {
            table.is_filtered = true;
            table.filter = token_filter(params_);
            table.filtered = {kept_.data_ptr(), pointer<unsigned>(kept_states_)};
        }
        table.invalid = pointer<unsigned>(invalid_);
        return table;
    }

    void cut(cuda::Granularity granularity) {
        cut_chains(granularity, &chains_);
        if (chains_.num_segments == 1) return;
        boundaries_ = words({2, chains_.num_chains, chains_.num_segments});
        uncoalesced_ = words({chains_.num_chains}, /*zeros=*/true);
        chains_.entries = pointer<uint32_t>(boundaries_);
        chains_.exits = chains_.entries + chains_.num_chains * chains_.num_segments;
        chains_.uncoalesced = pointer<unsigned>(uncoalesced_);
    }

    void draw_by_cdf() {
        const at::Tensor memory = at::empty({vocab_size_, vocab_size_}, tokens_.options());
        auto* const cdf = reinterpret_cast<uint64_t*>(memory.data_ptr<int64_t>());
        launch_write_cdf(table(), cdf, guard_.stream());
        cut(cuda::Granularity::thread);
        launch_chains_by_cdf(chains_, cdf, vocab_size_, guard_.stream());
    }

    void draw_by_logits() {
        cut(cuda::Granularity::block);
        launch_chains_by_logits(chains_, table(), guard_.stream());
    }

    const cuda::StreamGuard guard_;
    const GenerateParams params_;
    const at::Tensor weight_;  // (V, V), each row contiguous
    const int64_t vocab_size_;
    const at::Tensor tokens_;
    const at::Tensor invalid_;
    at::Tensor boundaries_, uncoalesced_;
    at::Tensor kept_, kept_states_;  // where filters remove tokens
    cuda::ChainsParams chains_{};
};

}  // namespace

void copy_prompt_cuda(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens) {
    const cuda::StreamGuard guard(tokens);
    TORCH_CHECK_INDEX(vocab_size > 0 || idx.numel() == 0, kGenerate,
                      ": index out of range: expected weight to have rows, got none");
    cuda::launch_copy_prompt(idx.const_data_ptr<int64_t>(), idx.size(0), idx.size(1), vocab_size,
                             tokens.data_ptr<int64_t>(), tokens.stride(0), guard.stream());
}

int64_t generate_cuda(const GenerateParams& params, const at::Tensor& tokens) {
    ChainsOfCall chains(params, tokens);
    if (params.temperature == 0) {
        chains.take_argmax();
    } else {
        chains.draw(cuda::draw_cuda_seed(kGenerate, params.generator));
    }
    return chains.finish();
}

}  // namespace bigramx
