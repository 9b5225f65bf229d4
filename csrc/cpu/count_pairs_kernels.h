// Counts pairs (row, column). Compiled once for each CPU capability (for_each_capability.h).

namespace bigramx::BIGRAMX_CAPABILITY {

constexpr int64_t kBlockOfPairs = 256;

// The entry of the table where each pair of a block counts. False where a row or a column is out of range.
template <typename token_t, typename count_t, typename entry_t>
bool find_entries(const CountJob<token_t, count_t>& job, int64_t begin, int64_t size, entry_t* entries) {
    using Unsigned = std::make_unsigned_t<token_t>;  // a negative one is too large
    const token_t* rows = job.rows + begin;
    const token_t* columns = job.columns + begin;
    const auto row_stride = static_cast<entry_t>(job.row_stride);
    Unsigned largest_row = 0, largest_column = 0;
    for (int64_t n = 0; n < size; ++n) {
        const auto row = static_cast<Unsigned>(rows[n]), column = static_cast<Unsigned>(columns[n]);
        largest_row = row > largest_row ? row : largest_row;
        largest_column = column > largest_column ? column : largest_column;
        entries[n] = static_cast<entry_t>(row) * row_stride + static_cast<entry_t>(column);
    }
    return largest_row < static_cast<uint64_t>(job.num_rows) &&
           largest_column < static_cast<uint64_t>(job.num_columns);
}

// Narrow counters keep the table in a near cache; that one wraps is rare.
template <typename count_t, typename entry_t>
inline __attribute__((always_inline)) void increment(count_t* table, entry_t entry, uint32_t*& wrapped) {
    const bool wraps = ++table[entry] == 0;
    if constexpr (sizeof(count_t) < 4) {
        if (__builtin_expect(wraps, false)) *wrapped++ = entry;
    }
}

// How many pairs were counted: all, or those before the first block with one that is out of range.
template <typename token_t, typename count_t>
int64_t count_pairs(CountJob<token_t, count_t>& job) {
    constexpr int64_t kStep = 8;
    constexpr int64_t kAhead = 4 * kBlockOfPairs;  // the processor does not foresee reads that come in bursts
    std::conditional_t<sizeof(count_t) == 8, uint64_t, uint32_t> entries[kBlockOfPairs];
    uint32_t* wrapped = job.wrapped;
    int64_t begin = 0;
    for (; begin < job.num_pairs; begin += kBlockOfPairs) {
        const int64_t size = std::min(kBlockOfPairs, job.num_pairs - begin);
        if (!find_entries(job, begin, size, entries)) break;
        int64_t n = 0;
        for (; n + kStep <= size; n += kStep) {
            __builtin_prefetch(job.columns + begin + n + kAhead);
            for (int64_t k = n; k < n + kStep; k += 2) {
                increment(job.even, entries[k], wrapped);
                increment(job.odd, entries[k + 1], wrapped);
            }
        }
        for (; n < size; ++n) increment(job.even, entries[n], wrapped);
    }
    job.wrapped = wrapped;
    return std::min(begin, job.num_pairs);
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
