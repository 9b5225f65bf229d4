// How the rows of a table are divided among threads. Blocks of fixed size, whose sums are added in order,
// make a result independent of the number of threads. Runs of blocks, which threads take one after another,
// balance the load, as rows differ in cost.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace bigramx::cpu {

inline int64_t rows_of_block(int64_t num_columns) {
    constexpr int64_t kElements = 1 << 15;  // the grain size
    return std::max<int64_t>(1, kElements / std::max<int64_t>(1, num_columns));
}

inline int64_t num_threads_for(int64_t num_blocks) {
    return std::min<int64_t>(num_blocks, at::get_num_threads());
}

// Calls visit(thread, block) for all blocks; thread: from 0 to num_threads_for(num_blocks) - 1.
template <typename Visit>
void for_each_block(int64_t num_blocks, const Visit& visit) {
    constexpr int64_t kRunsOfThread = 8;
    const int64_t num_threads = num_threads_for(num_blocks);
    if (num_blocks == 0) return;
    const int64_t run = std::max<int64_t>(1, num_blocks / (kRunsOfThread * num_threads));  // in blocks
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, num_threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t thread = first; thread < last; ++thread) {
            for (int64_t begin; (begin = next.fetch_add(run)) < num_blocks;) {
                const int64_t end = std::min(begin + run, num_blocks);
                for (int64_t block = begin; block < end; ++block) visit(thread, block);
            }
        }
    });
}

}  // namespace bigramx::cpu
