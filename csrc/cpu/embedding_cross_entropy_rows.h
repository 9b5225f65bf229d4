// The rows of the table that a batch meets, as the kernels of embedding_cross_entropy are given them; also
// for fit, whose kernel updates each row at once.
#pragma once

#include <ATen/OpMathType.h>

#include <algorithm>
#include <cstdint>

#include "cpu/base/buffer.h"
#include "cpu/base/partition.h"
#include "cpu/embedding_cross_entropy_pairs.h"
#include "embedding_cross_entropy.h"
#include "embedding_cross_entropy_row.h"

namespace bigramx::cpu {

// What one call computes for the rows. acc_t: the accumulation dtype. All offsets are in elements.
struct EmbeddingCrossEntropyKernelParams {
    const void* weight;  // (R, C)
    int64_t row_stride;
    int64_t num_classes;
    const Pairs* pairs;
    const void* class_weight;  // (C) of acc_t, or null: all ones
    int64_t padding_idx;
    RowLossOptions options;

    const int64_t* rows;  // (num_slots): the row of each slot; null: slot i is row i
    int64_t num_slots;
    bool want_loss;
    void* losses;               // (N) of acc_t, or null: only their sum
    void* gradient;             // (num_slots, C), or null
    bool nontemporal_gradient;  // whether it is written by non-temporal stores
    const void* grad_losses;    // (N) of acc_t, or null: all ones
    LossScales scales;          // multiplied by the gradient of the loss
};

constexpr int64_t kMaxRowsAtOnce = 16;

// The number of rows that a kernel processes together: as many as fit into the L1 cache.
inline int64_t rows_at_once(int64_t num_classes) {
    constexpr int64_t kElements = 2048;
    return std::clamp<int64_t>(kElements / std::max<int64_t>(num_classes, 1), 1, kMaxRowsAtOnce);
}

// One more for non-temporal stores: a row leaves its scratch while the next rows are computed.
inline int64_t rows_of_scratch(const EmbeddingCrossEntropyKernelParams& params) {
    return rows_at_once(params.num_classes) + (params.nontemporal_gradient ? 1 : 0);
}

struct LossScratch {
    void* exponentials;      // (rows_of_scratch, padded C) of acc_t
    int32_t* target_counts;  // (C), zero before and after
};

struct GatherParams {
    const int64_t* idx;  // (N)
    const char* table;
    int64_t stride_bytes;
    int64_t row_bytes;
    char* to;  // (N, row_bytes)
};

// The scratch memory of embedding_cross_entropy, which a call may reuse.
struct LossWorkspace {
    Pairs pairs;
    Buffer<char> exponentials;       // for each thread, of the rows that it works on
    Buffer<int32_t> target_counts;   // (threads, C), all zero between rows
    Buffer<int64_t> block_begins;    // (blocks + 1), in slots
    Buffer<LossSums> sums_of_block;  // (blocks)
};

// The first slot of each block, and the end. A block has the slots of the same rows whether the rows that do
// not occur have slots or not: they add nothing to its sum.
void divide_slots(const EmbeddingCrossEntropyKernelParams& params, Buffer<int64_t>& block_begins);

// Sums kernel(scratch, begin, end), the losses of these slots, over blocks of slots.
template <typename scalar_t, typename Kernel>
LossSums sum_over_slots(const EmbeddingCrossEntropyKernelParams& params, LossWorkspace& workspace,
                        const Kernel& kernel) {
    if (params.num_slots == 0) return {};
    divide_slots(params, workspace.block_begins);
    const int64_t* const begins = workspace.block_begins.begin();
    const int64_t num_blocks = workspace.block_begins.size() - 1, num_threads = num_threads_for(num_blocks);
    const int64_t exponentials = rows_of_scratch(params) * padded(params.num_classes) *
                                 static_cast<int64_t>(sizeof(at::opmath_type<scalar_t>));
    workspace.exponentials.resize(num_threads * exponentials);
    workspace.target_counts.resize_zeros(num_threads * params.num_classes);
    workspace.sums_of_block.resize(num_blocks);
    for_each_block(num_blocks, [&](int64_t thread, int64_t block) {
        const LossScratch scratch{workspace.exponentials.begin() + thread * exponentials,
                                  workspace.target_counts.begin() + thread * params.num_classes};
        workspace.sums_of_block[block] = kernel(scratch, begins[block], begins[block + 1]);
    });
    LossSums total;
    for (const LossSums& sums : workspace.sums_of_block) total = total + sums;
    return total;
}

// The distinct rows, ascending, except that the padding row is last: the gradient leaves it out.
at::Tensor occurring_rows(const Pairs& pairs, int64_t num_rows, int64_t padding_idx);

// Without the slots, which are all rows or those that occur, and without the results.
EmbeddingCrossEntropyKernelParams kernel_params(const EmbeddingCrossEntropyParams& params,
                                                const Pairs& pairs);

}  // namespace bigramx::cpu
