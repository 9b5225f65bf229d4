#include "cpu/generate_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "base/op_names.h"
#include "cpu/base/huge_pages.h"
#include "cpu/sampling/kept_tokens.h"
#include "sampling/distribution_errors.h"
#include "sampling/fixed_point_cdf.h"

#define BIGRAMX_KERNELS "cpu/generate_rows_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx::cpu {
namespace {

// The kernel that `choose` selects for the table's dtype.
template <typename Choose>
auto kernel_for(const at::Tensor& weight, const Choose& choose) {
    decltype(choose(float{})) kernel = nullptr;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), kGenerate,
                                    [&] { kernel = choose(scalar_t{}); });
    return kernel;
}

// (..., V) logits -> logits divided by the temperature, which is not 0, with -inf for the tokens that the
// filters remove. The filters depend on the previous token alone, so this is done once per row of the table,
// not per step.
at::Tensor filter_logits(at::Tensor logits, const GenerateParams& params) {
    constexpr double kRemoved = -std::numeric_limits<double>::infinity();
    logits = logits.to(filtered_dtype(params));
    if (params.temperature != 1) logits = logits / params.temperature;
    if (params.top_k.has_value()) {
        const int64_t k = std::min(*params.top_k, logits.size(-1));
        const at::Tensor smallest_kept = std::get<0>(logits.topk(k)).narrow(-1, k - 1, 1);
        logits = logits.masked_fill(logits < smallest_kept, kRemoved);
    }
    if (params.top_p.has_value()) {
        const auto [sorted, order] =
            logits.softmax(-1).sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
        const at::Tensor sums = sorted.cumsum(-1, at::kDouble);
        const at::Tensor total = sums.narrow(-1, -1, 1);  // of long rows not quite 1, as softmax rounds
        const at::Tensor removed = sums - sorted >= total * *params.top_p;
        logits = logits.masked_fill(at::zeros_like(removed).scatter(-1, order, removed), kRemoved);
    }
    if (params.min_p.has_value()) {
        const at::Tensor probs = logits.softmax(-1);
        logits = logits.masked_fill(probs < probs.amax(-1, /*keepdim=*/true) * *params.min_p, kRemoved);
    }
    return logits;
}

}  // namespace

void check_distribution(bool is_distribution, int64_t token) {
    TORCH_CHECK(is_distribution, kGenerate, ": " BIGRAMX_INVALID_PROBS ": row ", token,
                " of weight, " BIGRAMX_INVALID_LOGITS);
}

ProbRows::ProbRows(const GenerateParams& params)
    : params_(params),
      vocab_size_(params.weight.size(0)),
      rows_per_block_(
          std::clamp<int64_t>(kBlockElements / std::max<int64_t>(vocab_size_, 1), 1, vocab_size_)),
      blocks_((vocab_size_ + rows_per_block_ - 1) / rows_per_block_) {}

void ProbRows::prepare(int64_t token) {
    const int64_t first_row = token / rows_per_block_ * rows_per_block_;
    const int64_t num_rows = std::min(rows_per_block_, vocab_size_ - first_row);
    const int64_t bytes = num_rows * vocab_size_ * static_cast<int64_t>(c10::elementSize(dtype()));
    if (bytes_ + bytes > kMaxBytes) {
        std::fill(blocks_.begin(), blocks_.end(), Block());
        bytes_ = 0;
    }
    Block& block = blocks_[token / rows_per_block_];
    block.probs = filter_logits(params_.weight.narrow(0, first_row, num_rows), params_).softmax(-1);
    block.are_distributions = at::isfinite(block.probs.sum(-1));
    bytes_ += bytes;
}

LogitRows::LogitRows(const GenerateParams& params)
    : weight_(params.weight.stride(1) == 1 ? params.weight : params.weight.contiguous()),
      vocab_size_(weight_.size(0)),
      temperature_(params.temperature),
      is_filtered_(params.removes_tokens()),
      filter_(token_filter(params)),
      kept_(is_filtered_ ? vocab_size_ : 0),
      weigh_(kernel_for(
          weight_, [](auto zero) { return BIGRAMX_DISPATCH_TARGET(logit_weights_kernel<decltype(zero)>); })),
      logits_(static_cast<const char*>(weight_.const_data_ptr())),
      row_bytes_(weight_.stride(0) * weight_.element_size()),
      states_(vocab_size_) {}

LogitRows::State LogitRows::prepare(int64_t token) {
    if (slice.ends()) return State::unprepared;
    const std::lock_guard<std::mutex> lock(mutexes_[token % kNumMutexes]);
    if (states_[token].load(std::memory_order_relaxed) == State::unprepared) {
        if (is_filtered_) kept_[token] = select(token);
        LogitRow prepared = row(token);
        const bool is_distribution = prepare_row(token, prepared);
        if (!is_distribution) any_is_invalid_.store(true, std::memory_order_relaxed);
        states_[token].store(is_distribution ? State::distribution : State::invalid,
                             std::memory_order_release);
    }
    return states_[token].load(std::memory_order_relaxed);
}

KeptTokens<double> LogitRows::select(int64_t token) const {
    LogitRow whole{logits_ + token * row_bytes_, temperature_, 0, true};
    std::vector<double> logits(vocab_size_);
    std::vector<uint64_t> weights(vocab_size_);
    if (!weigh_(whole, vocab_size_, logits.data(), weights.data())) return {};
    return select_tokens(filter_, logits.data(), weights.data(), vocab_size_);
}

template <bool has_sure_entries>
int WholeRows<has_sure_entries>::guide_bits(int64_t vocab_size) {
    if (has_sure_entries) return kSureGuideBits;
    int bits = 0;
    while (int64_t{2} << bits < vocab_size) ++bits;  // a bucket for two tokens
    return bits;
}

template <bool has_sure_entries>
WholeRows<has_sure_entries>::WholeRows(const GenerateParams& params)
    : LogitRows(params),
      fill_cdf_(kernel_for(
          weight_, [](auto zero) { return BIGRAMX_DISPATCH_TARGET(logit_cdf_kernel<decltype(zero)>); })),
      find_(kernel_for(
          weight_,
          [](auto zero) { return BIGRAMX_DISPATCH_TARGET(find_in_logit_row_kernel<decltype(zero)>); })),
      guide_bits_(guide_bits(vocab_size_)),
      cdf_(vocab_size_ * padded_cdf(vocab_size_)),
      guide_(vocab_size_ << guide_bits_) {
    advise_huge_pages(cdf_.begin(), cdf_.size() * sizeof(uint32_t));
    advise_huge_pages(guide_.begin(), guide_.size() * sizeof(uint16_t));
    std::fill(guide_.begin(), guide_.end(), kUnprepared);
}

template <bool has_sure_entries>
int64_t WholeRows<has_sure_entries>::bytes(int64_t vocab_size) {
    return vocab_size * (padded_cdf(vocab_size) * static_cast<int64_t>(sizeof(uint32_t)) +
                         (static_cast<int64_t>(sizeof(uint16_t)) << guide_bits(vocab_size)));
}

template <bool has_sure_entries>
bool WholeRows<has_sure_entries>::prepare_row(int64_t token, LogitRow& row) {
    if (!fill_cdf_(row, vocab_size_, cdf(token))) return false;
    pad_cdf(cdf(token), vocab_size_);
    if (has_sure_entries) {
        publish_sure_entries(token);
    } else {
        std::vector<uint16_t> entries((int64_t{1} << guide_bits_) + 1);
        fill_guide_table(cdf(token), vocab_size_, guide_bits_, entries.data());
        entries.pop_back();
        uint16_t* entry = guide(token);
        for (const uint16_t made : entries) publish(entry++, made);
    }
    return true;
}

// An entry is sure if the high bits of a bucket's first draw are beyond the tokens before, and those of its
// last within this one.
template <bool has_sure_entries>
void WholeRows<has_sure_entries>::publish_sure_entries(int64_t token) {
    const int shift = kHighDrawBits - guide_bits_;
    const uint32_t* const cdf_row = cdf(token);
    uint16_t* const entries = guide(token);
    int64_t bucket = 0;  // the first without an entry
    for (int64_t drawn = 0; drawn < vocab_size_; ++drawn) {
        const auto entry = static_cast<uint16_t>(drawn);
        const int64_t end = cdf_row[drawn] >> shift;
        for (; bucket < end; ++bucket) publish(entries + bucket, entry);
        const bool may_draw_more = bucket << shift < int64_t{cdf_row[drawn]} + 2;
        if (may_draw_more && bucket < int64_t{1} << guide_bits_) publish(entries + bucket++, entry | kMixed);
    }
}

template <bool has_sure_entries>
uint32_t WholeRows<has_sure_entries>::prepare_and_search(uint32_t token, const DrawBlock& draws, int64_t k) {
    if (!is_distribution(token)) return 0;
    const uint16_t entry = guide(token)[guide_bucket(draws.high[k], guide_bits_)];
    return search(token, entry & ~kMixed, draws, k);
}

template <bool has_sure_entries>
uint32_t WholeRows<has_sure_entries>::find_exactly(uint32_t token, uint64_t r) const {
    LogitRow exact = row(token);
    return static_cast<uint32_t>(find_(exact, vocab_size_, r));
}

template class WholeRows<true>;
template class WholeRows<false>;

BlockRows::BlockRows(const GenerateParams& params)
    : LogitRows(params),
      sum_blocks_(kernel_for(
          weight_,
          [](auto zero) { return BIGRAMX_DISPATCH_TARGET(logit_block_sums_kernel<decltype(zero)>); })),
      find_in_block_(kernel_for(
          weight_,
          [](auto zero) { return BIGRAMX_DISPATCH_TARGET(find_in_logit_block_kernel<decltype(zero)>); })),
      num_blocks_(num_weight_blocks(vocab_size_)),
      block_bytes_(kWeightsAtOnce * static_cast<int64_t>(weight_.element_size())),
      ends_(vocab_size_ * num_blocks_),
      max_(vocab_size_) {}

bool BlockRows::prepare_row(int64_t token, LogitRow& row) {
    const bool is_distribution = sum_blocks_(row, vocab_size_, ends_.begin() + token * num_blocks_);
    max_[token] = row.max;
    return is_distribution;
}

BlockRows::Place BlockRows::locate(uint32_t token, const DrawBlock& draws, int64_t k) {
    if (!is_distribution(token)) return {token, 0, 0};
    const WeightSum* ends = ends_.begin() + token * num_blocks_;
    const WeightSum target_sum = FixedPointCdf(ends[num_blocks_ - 1]).target_sum(draws.at(k));
    int64_t block = 0;  // bisection without branches, as these would be mispredicted
    for (int64_t count = num_blocks_; count > 1;) {
        const int64_t half = count / 2;
        block += ends[block + half - 1] < target_sum ? half : 0;
        count -= half;
    }
    if (num_blocks_ > 1) {
        const auto* logits = static_cast<const char*>(row(token).logits) + block * block_bytes_;
        for (int64_t k = 0; k < block_bytes_; k += 64) __builtin_prefetch(logits + k);
    }
    return {token, block, static_cast<uint64_t>(target_sum - (block > 0 ? ends[block - 1] : 0))};
}

uint32_t BlockRows::find(const Place& place) const {
    if (place.target_sum == 0) return 0;
    LogitRow row = this->row(place.row);
    row.max = max_[place.row];
    return find_in_block_(row, vocab_size_, place.block, place.target_sum);
}

uint32_t ArgmaxRows::compute(uint32_t token) {
    if (slice.ends()) return 0;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // thread-local, and any thread may get here
    const auto argmax = static_cast<uint32_t>(weight_.select(0, token).argmax().item<int64_t>());
    argmax_[token].store(argmax + 1, std::memory_order_relaxed);
    return argmax;
}

}  // namespace bigramx::cpu
