#include "interpolated_bigram.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "base/checks.h"
#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/generate_chains.h"
#include "cpu/interpolated_bigram_rows.h"
#include "sampling/generator.h"

namespace bigramx {

using namespace cpu;

namespace {

// The place of a pair among those of its row, which lie from `begin` to `end` in ascending order: the first
// whose column is not less. It goes on from the place of the pair before, in steps that double: pairs that
// come in the order of their rows and columns are merged with the model's.
int64_t place_of(const int32_t* columns, int64_t begin, int64_t end, int64_t hint, int64_t column) {
    if (begin < hint && hint <= end && columns[hint - 1] < column) begin = hint;
    int64_t step = 1;
    while (begin + step < end && columns[begin + step] < column) {
        begin += step;
        step *= 2;
    }
    return std::lower_bound(columns + begin, columns + std::min(begin + step + 1, end), column) - columns;
}

}  // namespace

void interpolated_bigram_cpu(const InterpolatedBigramParams& params, const at::Tensor& idx,
                             const at::Tensor& targets, const at::Tensor& probs, const at::Tensor& is_seen) {
    constexpr int64_t kGrainSize = 1 << 11, kPairsBetweenSignals = 1 << 22;
    const InterpolatedBigram model(params);
    const int64_t vocab_size = model.vocab_size(), num_wanted = idx.numel();
    const int64_t *const rows = idx.const_data_ptr<int64_t>(), *const columns =
                                                                   targets.const_data_ptr<int64_t>();
    double* const prob = probs.data_ptr<double>();
    bool* const seen = is_seen.data_ptr<bool>();
    std::atomic<int64_t> first_wrong{num_wanted};
    const auto find = [&](int64_t first, int64_t last) {
        int64_t place = 0;
        for (int64_t n = first; n < last; ++n) {
            const int64_t i = rows[n], j = columns[n];
            if (i < 0 || i >= vocab_size || j < 0 || j >= vocab_size) {
                int64_t before = first_wrong.load();
                while (n < before && !first_wrong.compare_exchange_weak(before, n)) {
                }
                return;
            }
            const int64_t end = model.end(i);
            place = place_of(model.columns(), model.begin(i), end, place, j);
            seen[n] = place < end && model.column(place) == j;
            const double own = seen[n] ? model.pair_prob(place) : 0;
            prob[n] = own + model.backoff(i) * model.unigram(j);
        }
    };
    for_each_chunk(num_wanted, kPairsBetweenSignals,
                   [&](int64_t first, int64_t last) { at::parallel_for(first, last, kGrainSize, find); });
    const int64_t n = first_wrong.load();
    if (n == num_wanted) return;
    for (const auto& [name, token] : {std::pair("idx", rows[n]), std::pair("targets", columns[n])}) {
        TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, kInterpolatedBigram,
                          ": index out of range: ", name, " holds ", token, " at position ", n,
                          ", expected 0 <= ", name, " < ", vocab_size);
    }
    raise_changed(kInterpolatedBigram, "idx and targets");
}

int64_t interpolated_bigram_generate_cpu(const InterpolatedBigramParams& params,
                                         const GenerateParams& options, const at::Tensor& tokens) {
    const Chains chains{tokens.data_ptr<int64_t>() + options.prompt_length, tokens.size(0),
                        tokens.size(1) - options.prompt_length, tokens.stride(0)};
    InterpolatedRows rows(params, options, chains.num_chains * chains.num_steps);
    const uint64_t seed = options.temperature == 0 ? 0 : draw_seed(options.generator);
    return ChainRunner(rows, seed, chains, options.stop).run();
}

}  // namespace bigramx
