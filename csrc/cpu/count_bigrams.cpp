#include "count_bigrams.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "base/checks.h"
#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/base/buffer.h"
#include "cpu/base/huge_pages.h"

namespace bigramx::cpu {

// The pairs that one call of the kernel counts, and its tables. All offsets are in elements.
template <typename token_t, typename count_t>
struct CountKernelParams {
    const token_t* tokens;  // (num_pairs + 1)
    int64_t num_pairs;
    int64_t vocab_size;
    // (V, V): the tables for pairs at even and at odd positions. Two tables, to be added, or the same one:
    // successive increments of one counter wait for each other. Fewer than 2^32 entries, except with 64-bit
    // counters.
    count_t* even;
    count_t* odd;
    // The end of the list of entries whose 8- or 16-bit counters have overflowed to 0.
    uint32_t* overflowed;
};

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "cpu/count_bigrams_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

// Between checks for signals.
constexpr int64_t kPairsAChunk = 1 << 21, kEntriesAChunk = 1 << 21;

template <typename token_t>
void check_range(const token_t* tokens, int64_t num_tokens, int64_t vocab_size) {
    SignalCheck signals;
    for (int64_t n = 0; n < num_tokens; ++n) {
        signals.poll(1);
        const auto token = static_cast<int64_t>(tokens[n]);
        TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, kCountBigrams, ": tokens holds ", token,
                          " at position ", n, ", expected 0 <= token < ", vocab_size);
    }
}

// The number of parts that the pairs are divided into, each with its own narrow counters, at most a byte per
// pair. 0: these would cost more than they save, so one thread counts in the result itself.
int64_t number_of_parts(int64_t num_pairs, int64_t num_entries) {
    constexpr int64_t kGrainSize = 1 << 17;
    if (num_entries > std::numeric_limits<uint32_t>::max()) return 0;
    return std::min<int64_t>(num_pairs / std::max(kGrainSize, num_entries), at::get_num_threads());
}

// Counts the pairs of a part from `begin` to `end`. Returns false if a token is out of range.
template <typename token_t, typename count_t>
bool run(CountKernelParams<token_t, count_t>& part, int64_t begin, int64_t end) {
    CountKernelParams<token_t, count_t> params = part;
    params.tokens += begin;
    params.num_pairs = end - begin;
    const int64_t num_counted = BIGRAMX_DISPATCH_TARGET(count_bigrams_kernel<token_t, count_t>)(params);
    part.overflowed = params.overflowed;
    return num_counted == params.num_pairs;
}

void fill_zeros(const at::Tensor& table) {
    for_each_chunk(table.numel(), kEntriesAChunk, [entries = table.view(-1)](int64_t begin, int64_t end) {
        entries.narrow(0, begin, end - begin).zero_();
    });
}

template <typename token_t>
bool count_in_result(const token_t* tokens, int64_t num_pairs, const at::Tensor& counts) {
    fill_zeros(counts);
    int64_t* table = counts.data_ptr<int64_t>();
    CountKernelParams<token_t, int64_t> all{tokens, num_pairs, counts.size(0), table, table, nullptr};
    bool in_range = true;
    for_each_chunk(num_pairs, kPairsAChunk / 4,  // each is a cache miss
                   [&](int64_t begin, int64_t end) { in_range = in_range && run(all, begin, end); });
    return in_range;
}

// counts = the sum of the tables.
template <typename count_t>
void sum_tables(const at::Tensor& tables, const at::Tensor& counts) {
    constexpr int64_t kGrainSize = 1 << 15;
    int64_t* sums = counts.data_ptr<int64_t>();
    const auto sum_entries = [&](int64_t begin, int64_t end) {
        std::fill(sums + begin, sums + end, 0);
        for (int64_t first = 0; first < tables.numel(); first += counts.numel()) {
            const count_t* table = tables.const_data_ptr<count_t>() + first;
            for (int64_t k = begin; k < end; ++k) sums[k] += table[k];
        }
    };
    for_each_chunk(counts.numel(), kEntriesAChunk, [&](int64_t begin, int64_t end) {
        at::parallel_for(begin, end, kGrainSize, sum_entries);
    });
}

// Each part has tables_per_part (1 or 2) tables of its own.
template <typename count_t, int64_t tables_per_part, typename token_t>
bool count_in_parts(const token_t* tokens, int64_t num_pairs, int64_t num_parts, const at::Tensor& counts) {
    constexpr int64_t kModulus = int64_t{std::numeric_limits<count_t>::max()} + 1;
    const int64_t vocab_size = counts.size(0), num_entries = counts.numel();
    const int64_t max_overflowed = (num_pairs / num_parts + 1) / kModulus;
    const at::Tensor tables = at::empty({num_parts, tables_per_part, vocab_size, vocab_size},
                                        at::dtype(c10::CppTypeToScalarType<count_t>::value));
    advise_huge_pages(tables);
    fill_zeros(tables);
    const Buffer<uint32_t> overflowed(num_parts * max_overflowed);
    std::vector<CountKernelParams<token_t, count_t>> parts(num_parts);
    for (int64_t k = 0; k < num_parts; ++k) {
        const int64_t begin = num_pairs * k / num_parts, end = num_pairs * (k + 1) / num_parts;
        count_t* even = tables.data_ptr<count_t>() + k * tables_per_part * num_entries;
        count_t* odd = even + (tables_per_part - 1) * num_entries;
        parts[k] = {tokens + begin, end - begin, vocab_size,
                    even,           odd,         overflowed.begin() + k * max_overflowed};
    }
    std::atomic<bool> in_range{true};
    for_each_chunk(num_pairs / num_parts + 1, kPairsAChunk, [&](int64_t begin, int64_t end) {
        at::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) {
                if (!run(parts[k], begin, std::min(end, parts[k].num_pairs))) in_range = false;
            }
        });
    });
    sum_tables<count_t>(tables, counts);
    int64_t* sums = counts.data_ptr<int64_t>();
    for (int64_t k = 0; k < num_parts; ++k) {
        for (const uint32_t* entry = overflowed.begin() + k * max_overflowed; entry != parts[k].overflowed;
             ++entry) {
            sums[*entry] += kModulus;
        }
    }
    return in_range;
}

template <typename token_t>
bool count(const token_t* tokens, int64_t num_pairs, const at::Tensor& counts) {
    constexpr int64_t kSmall = 1 << 14;  // two tables of 16-bit counters stay in the L1 cache
    const int64_t num_parts = number_of_parts(num_pairs, counts.numel());
    if (num_parts == 0) return count_in_result(tokens, num_pairs, counts);
    return counts.numel() <= kSmall ? count_in_parts<uint16_t, 2>(tokens, num_pairs, num_parts, counts)
                                    : count_in_parts<uint8_t, 1>(tokens, num_pairs, num_parts, counts);
}

}  // namespace

at::Tensor count_bigrams_cpu(const CountBigramsParams& params) {
    const at::Tensor& tokens = params.tokens;
    const int64_t vocab_size = params.vocab_size;
    at::Tensor counts = at::empty({vocab_size, vocab_size}, tokens.options().dtype(at::kLong));
    advise_huge_pages(counts);
    const int64_t num_tokens = tokens.numel();
    AT_DISPATCH_V2(tokens.scalar_type(), kCountBigrams, AT_WRAP([&] {
                       const scalar_t* begin = tokens.const_data_ptr<scalar_t>();
                       if (num_tokens > 1 && count(begin, num_tokens - 1, counts)) return;
                       check_range(begin, num_tokens, vocab_size);
                       if (num_tokens > 1) raise_changed(kCountBigrams, "tokens");
                       fill_zeros(counts);
                   }),
                   at::kByte, at::kUInt16, at::kUInt32, at::kInt, at::kLong);
    return counts;
}

}  // namespace bigramx
