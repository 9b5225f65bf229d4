#include "../count_bigrams.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "buffer.h"
#include "huge_pages.h"

namespace bigramx {

// What the kernel counts, and where; plain pointers, all offsets in elements.
template <typename token_t, typename count_t>
struct CountJob {
    const token_t* tokens;  // (num_pairs + 1)
    int64_t num_pairs;
    int64_t vocab_size;
    // (V, V), where pairs at even and at odd positions count: one table, or two to be added, as increments of
    // one counter wait for each other. Fewer than 2^32 entries, but for 64-bit counters.
    count_t* even;
    count_t* odd;
    // Where a list grows of the entries whose 8- or 16-bit counters went back to 0.
    uint32_t* wrapped;
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "count_bigrams_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

template <typename token_t>
void check_range(const token_t* tokens, int64_t num_tokens, int64_t vocab_size) {
    for (int64_t n = 0; n < num_tokens; ++n) {
        const auto token = static_cast<int64_t>(tokens[n]);
        TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, "count_bigrams: tokens holds ", token,
                          " at position ", n, ", expected 0 <= token < ", vocab_size);
    }
}

// How many jobs share the pairs, each with narrow counters of its own, a byte for each pair at most. 0: those
// would cost more than they spare, and one thread counts in the result itself.
int64_t number_of_jobs(int64_t num_pairs, int64_t num_entries) {
    constexpr int64_t kMinPairs = 1 << 17;  // what a thread is worth waking for
    if (num_entries > std::numeric_limits<uint32_t>::max()) return 0;
    return std::min<int64_t>(num_pairs / std::max(kMinPairs, num_entries), at::get_num_threads());
}

// Returns false where a token is out of range.
template <typename token_t, typename count_t>
bool run(CountJob<token_t, count_t>& job) {
    return BIGRAMX_DISPATCH(count_bigrams<token_t, count_t>)(job) == job.num_pairs;
}

template <typename token_t>
bool count_in_result(const token_t* tokens, int64_t num_pairs, const at::Tensor& counts) {
    int64_t* table = counts.zero_().data_ptr<int64_t>();
    CountJob<token_t, int64_t> job{tokens, num_pairs, counts.size(0), table, table, nullptr};
    return run(job);
}

// counts = the sum of the tables.
template <typename count_t>
void sum_tables(const at::Tensor& tables, const at::Tensor& counts) {
    constexpr int64_t kGrain = 1 << 15;
    int64_t* sums = counts.data_ptr<int64_t>();
    at::parallel_for(0, counts.numel(), kGrain, [&](int64_t begin, int64_t end) {
        std::fill(sums + begin, sums + end, 0);
        for (int64_t first = 0; first < tables.numel(); first += counts.numel()) {
            const count_t* table = tables.const_data_ptr<count_t>() + first;
            for (int64_t k = begin; k < end; ++k) sums[k] += table[k];
        }
    });
}

// Each job has tables_per_job tables, 1 or 2, to itself.
template <typename count_t, int64_t tables_per_job, typename token_t>
bool count_in_jobs(const token_t* tokens, int64_t num_pairs, int64_t num_jobs, const at::Tensor& counts) {
    constexpr int64_t kWrap = int64_t{std::numeric_limits<count_t>::max()} + 1;
    const int64_t vocab_size = counts.size(0), num_entries = counts.numel();
    const int64_t max_wrapped = (num_pairs / num_jobs + 1) / kWrap;
    const at::Tensor tables = at::empty({num_jobs, tables_per_job, vocab_size, vocab_size},
                                        at::dtype(c10::CppTypeToScalarType<count_t>::value));
    advise_huge_pages(tables);
    const Buffer<uint32_t> wrapped(num_jobs * max_wrapped);
    std::vector<CountJob<token_t, count_t>> jobs(num_jobs);
    std::atomic<bool> in_range{true};
    at::parallel_for(0, num_jobs, 1, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
            const int64_t begin = num_pairs * k / num_jobs, end = num_pairs * (k + 1) / num_jobs;
            count_t* even = tables.data_ptr<count_t>() + k * tables_per_job * num_entries;
            count_t* odd = even + (tables_per_job - 1) * num_entries;
            std::fill(even, odd + num_entries, 0);
            jobs[k] = {tokens + begin, end - begin, vocab_size, even, odd, wrapped.begin() + k * max_wrapped};
            if (!run(jobs[k])) in_range = false;
        }
    });
    sum_tables<count_t>(tables, counts);
    int64_t* sums = counts.data_ptr<int64_t>();
    for (int64_t k = 0; k < num_jobs; ++k) {
        for (const uint32_t* entry = wrapped.begin() + k * max_wrapped; entry != jobs[k].wrapped; ++entry) {
            sums[*entry] += kWrap;
        }
    }
    return in_range;
}

template <typename token_t>
bool count(const token_t* tokens, int64_t num_pairs, const at::Tensor& counts) {
    constexpr int64_t kSmall = 1 << 14;  // two tables of 16-bit counters stay in a near cache
    const int64_t num_jobs = number_of_jobs(num_pairs, counts.numel());
    if (num_jobs == 0) return count_in_result(tokens, num_pairs, counts);
    return counts.numel() <= kSmall ? count_in_jobs<uint16_t, 2>(tokens, num_pairs, num_jobs, counts)
                                    : count_in_jobs<uint8_t, 1>(tokens, num_pairs, num_jobs, counts);
}

}  // namespace

at::Tensor count_bigrams_cpu(const at::Tensor& tokens, int64_t vocab_size) {
    at::Tensor counts = at::empty({vocab_size, vocab_size}, tokens.options().dtype(at::kLong));
    advise_huge_pages(counts);
    const int64_t num_tokens = tokens.numel();
    AT_DISPATCH_V2(tokens.scalar_type(), "count_bigrams", AT_WRAP([&] {
                       const scalar_t* begin = tokens.const_data_ptr<scalar_t>();
                       if (num_tokens > 1 && count(begin, num_tokens - 1, counts)) return;
                       check_range(begin, num_tokens, vocab_size);
                       counts.zero_();  // fewer than two tokens
                   }),
                   at::kByte, at::kUInt16, at::kInt, at::kLong);
    return counts;
}

}  // namespace bigramx
