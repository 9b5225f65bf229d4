// The N pairs of a batch, grouped by row: as a table of counts where that is small, else as a list.
#pragma once

#include <cstdint>

#include "cpu/base/buffer.h"
#include "embedding_cross_entropy.h"

namespace bigramx::cpu {

// A row of scratch holds whole vectors: a partial store could not be forwarded to the load that follows it.
inline int64_t padded(int64_t num_classes) {
    constexpr int64_t kLongestVector = 16;
    return (num_classes + kLongestVector - 1) / kLongestVector * kLongestVector;
}

struct Pairs {
    static constexpr int32_t kIgnored = -1;

    // Groups them anew; memory is kept from one batch to the next. The counts of a row must be zero again by
    // then. Raises an IndexError for a row or a target out of range.
    void group(const EmbeddingCrossEntropyParams& params);

    // The pairs of a row that are not ignored, where they are counted.
    int64_t num_counted(int64_t row) const { return totals_[row] - ignored_[row]; }

    bool has_row(int64_t row) const {
        return counted ? totals_[row] > 0 : row_begin[row] < row_begin[row + 1];
    }

    bool counted = false;
    // Counted: how often row i meets target j, (R, stride); then in how many pairs the row is, (R); then how
    // many of those have an ignored target, (R).
    Buffer<int32_t> counts;
    int64_t stride = 0;
    // Listed: the targets of row i are those from row_begin[i] to row_begin[i + 1], kIgnored among them, in
    // the order in which the batch has them.
    Buffer<int64_t> row_begin;     // (R + 1)
    Buffer<int32_t> targets;       // (N)
    Buffer<int64_t> pair_indices;  // (N): which pair of the batch each is; (0) where the losses are reduced

    int64_t num_targets = 0;   // those that are not ignored
    double target_weight = 0;  // the sum of their class weights

  private:
    void count(const EmbeddingCrossEntropyParams& params);
    template <typename cursor_t>
    void list(const EmbeddingCrossEntropyParams& params, Buffer<cursor_t>& cursors);

    int32_t *totals_ = nullptr, *ignored_ = nullptr;  // in counts
    Buffer<int32_t> counts_of_chunks_;
    Buffer<uint32_t> cursors_;
    Buffer<int64_t> long_cursors_;
};

}  // namespace bigramx::cpu
