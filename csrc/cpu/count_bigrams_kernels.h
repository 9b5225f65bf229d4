// Counts pairs of consecutive tokens. Compiled once for each CPU target (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

constexpr int64_t kBlockOfPairs = 256;

// The table entry of each pair of a block. Returns false if a token is out of range.
template <typename token_t, typename count_t, typename entry_t>
bool find_entries(const CountKernelParams<token_t, count_t>& params, int64_t begin, int64_t size,
                  entry_t* entries) {
    using Unsigned = std::make_unsigned_t<token_t>;  // negative tokens become too large
    const token_t* tokens = params.tokens + begin;
    const auto vocab_size = static_cast<entry_t>(params.vocab_size);
    Unsigned largest = static_cast<Unsigned>(tokens[0]);
    for (int64_t n = 0; n < size; ++n) {
        const auto token = static_cast<Unsigned>(tokens[n]), next = static_cast<Unsigned>(tokens[n + 1]);
        largest = next > largest ? next : largest;
        entries[n] = static_cast<entry_t>(token) * vocab_size + static_cast<entry_t>(next);
    }
    return largest < static_cast<uint64_t>(params.vocab_size);
}

// Narrow counters keep the table in the L1 cache, and rarely overflow.
template <typename count_t, typename entry_t>
inline __attribute__((always_inline)) void increment(count_t* table, entry_t entry, uint32_t*& overflowed) {
    const bool overflows = ++table[entry] == 0;
    if constexpr (sizeof(count_t) < 4) {
        if (__builtin_expect(overflows, false)) *overflowed++ = entry;
    }
}

// Returns the number of pairs counted: all, or those before the first block with a token out of range.
template <typename token_t, typename count_t>
int64_t count_bigrams_kernel(CountKernelParams<token_t, count_t>& params) {
    constexpr int64_t kStep = 8;
    constexpr int64_t kAhead = 4 * kBlockOfPairs;  // hardware prefetchers do not handle reads in bursts
    std::conditional_t<sizeof(count_t) == 8, uint64_t, uint32_t> entries[kBlockOfPairs];
    uint32_t* overflowed = params.overflowed;
    int64_t begin = 0;
    for (; begin < params.num_pairs; begin += kBlockOfPairs) {
        const int64_t size = std::min(kBlockOfPairs, params.num_pairs - begin);
        if (!find_entries(params, begin, size, entries)) break;
        int64_t n = 0;
        for (; n + kStep <= size; n += kStep) {
            __builtin_prefetch(params.tokens + begin + n + kAhead);
            for (int64_t k = n; k < n + kStep; k += 2) {
                increment(params.even, entries[k], overflowed);
                increment(params.odd, entries[k + 1], overflowed);
            }
        }
        for (; n < size; ++n) increment(params.even, entries[n], overflowed);
    }
    params.overflowed = overflowed;
    return std::min(begin, params.num_pairs);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
