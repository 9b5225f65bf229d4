// What count_pairs_kernels.h counts, and where.
#pragma once

#include <cstdint>

namespace bigramx {

// Plain pointers, all offsets in elements.
template <typename token_t, typename count_t>
struct CountJob {
    const token_t* rows;     // (N)
    const token_t* columns;  // (N); of consecutive tokens, rows + 1
    int64_t num_pairs;
    int64_t num_rows, num_columns;
    int64_t row_stride;
    // (num_rows, row_stride), where pairs at even and at odd positions count: one table, or two to be added,
    // as increments of one counter wait for each other. Fewer than 2^32 entries, but for 64-bit counters.
    count_t* even;
    count_t* odd;
    // Where a list grows of the entries whose 8- or 16-bit counters went back to 0.
    uint32_t* wrapped;
};

}  // namespace bigramx
