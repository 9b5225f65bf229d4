#include "generate.h"

#include <ATen/Dispatch.h>

#include <vector>

#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/base/huge_pages.h"
#include "cpu/generate_chains.h"
#include "cpu/generate_rows.h"
#include "cpu/sampling/exponential_variates.h"
#include "sampling/generator.h"

namespace bigramx {

using namespace cpu;

namespace {

// Steps all chains together, the order in which the lecture's loop draws. next(token) draws the token that
// follows `token`. Returns the number of steps: fewer than num_steps if all chains meet a stop token.
template <typename Next>
int64_t run_in_step(const Chains& chains, const StopTokens& stop, const Next& next) {
    std::vector<char> stopped(chains.num_chains, false);
    int64_t num_running = chains.num_chains, t = 0;
    for (; t < chains.num_steps && num_running > 0; ++t) {
        for (int64_t b = 0; b < chains.num_chains; ++b) {
            const int64_t before = chains.before(b, t), token = next(before);
            *chains.at(b, t) = stopped[b] ? before : token;
            if (!stopped[b] && stop.contains(token)) {
                stopped[b] = true;
                --num_running;
            }
        }
    }
    return t;
}

int64_t generate_by_exponential_race(const GenerateParams& params, const Chains& chains) {
    ProbRows rows(params);
    int64_t length = 0;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, rows.dtype(), kGenerate, [&] {
        const auto run = [&](auto& race) {
            length = run_in_step(chains, params.stop, [&](int64_t token) {
                if (!rows.is_prepared(token)) {
                    race.before_work(ProbRows::kBlockElements);
                    rows.prepare(token);
                }
                return race.sample(rows.row<scalar_t>(token));
            });
        };
        with_exponential_race<scalar_t>(params.generator, params.weight.size(0), chains.num_chains, run);
    });
    return length;
}

int64_t generate_by_counter(const GenerateParams& params, const Chains& chains) {
    constexpr int64_t kMaxBytes = int64_t{1} << 30, kDrawsWorthAWholeRow = 32, kMaxVocabOfSureEntries = 200;
    const int64_t vocab_size = params.weight.size(0);
    const auto run = [&](auto&& rows, uint64_t seed) {
        return ChainRunner(rows, seed, chains, params.stop).run();
    };
    if (params.temperature == 0) return run(ArgmaxRows(params.weight), 0);
    const uint64_t seed = draw_seed(params.generator);
    const bool draws_many = chains.num_chains * chains.num_steps >= kDrawsWorthAWholeRow * vocab_size;
    if (!draws_many || WholeRows<false>::bytes(vocab_size) > kMaxBytes) return run(BlockRows(params), seed);
    if (vocab_size <= kMaxVocabOfSureEntries) return run(WholeRows<true>(params), seed);
    return run(WholeRows<false>(params), seed);
}

}  // namespace

void copy_prompt_cpu(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens) {
    constexpr int64_t kTokensOfPage = 512;  // a new page of memory takes long
    const int64_t num_sequences = idx.size(0), length = idx.size(1);
    const int64_t* token = idx.const_data_ptr<int64_t>();
    int64_t* to = tokens.data_ptr<int64_t>();
    advise_huge_pages(tokens);
    SignalCheck signals;
    for (int64_t b = 0; b < num_sequences; ++b, to += tokens.stride(0)) {
        for (int64_t t = 0; t < length; ++t, ++token) {
            TORCH_CHECK_INDEX(*token >= 0 && *token < vocab_size, kGenerate,
                              ": index out of range: idx holds ", *token, " at position ", b * length + t,
                              ", expected 0 <= idx < ", vocab_size);
            to[t] = *token;
            signals.poll(1);
        }
        signals.poll(kTokensOfPage);
    }
}

int64_t generate_cpu(const GenerateParams& params, const at::Tensor& tokens) {
    const Chains chains{tokens.data_ptr<int64_t>() + params.prompt_length, tokens.size(0),
                        tokens.size(1) - params.prompt_length, tokens.stride(0)};
    if (params.sampler == Sampler::philox || params.temperature == 0) {
        return generate_by_counter(params, chains);
    }
    return generate_by_exponential_race(params, chains);
}

}  // namespace bigramx
