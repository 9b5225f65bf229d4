// The N pairs of a batch by row: counted in a table where that is small, else listed by a counting sort.
#pragma once

#include <cstdint>

#include "cpu/base/buffer.h"
#include "embedding_cross_entropy.h"

namespace bigramx::cpu {

// Rows of scratch hold whole vectors: loads after partial stores would stall, as these cannot be forwarded.
inline int64_t padded(int64_t num_classes) {
    constexpr int64_t kLongestVector = 16;
    return (num_classes + kLongestVector - 1) / kLongestVector * kLongestVector;
}

struct Pairs {
    static constexpr int32_t kIgnored = -1;

    // Groups the pairs of a batch, and reuses the memory of the last one, whose counts must be zero again.
    // Raises IndexError for a row or a target out of range.
    void group(const EmbeddingCrossEntropyParams& params);

    // The number of pairs of a row that are not ignored. For counted pairs.
    int64_t num_counted(int64_t row) const { return totals_[row] - ignored_[row]; }

    bool has_row(int64_t row) const {
        return counted ? totals_[row] > 0 : row_begin[row] < row_begin[row + 1];
    }

    bool counted = false;
    // Counted: the pairs of row i with target j, (R, stride); then all pairs of each row, (R); then its
    // ignored pairs, (R).
    Buffer<int32_t> counts;
    int64_t stride = 0;
    // Listed: the targets of row i are targets[row_begin[i] : row_begin[i + 1]], kIgnored among them, in the
    // order of the batch.
    Buffer<int64_t> row_begin;     // (R + 1)
    Buffer<int32_t> targets;       // (N)
    Buffer<int64_t> pair_indices;  // (N): the index of each pair in the batch; (0) for a reduced loss

    int64_t num_targets = 0;   // pairs that are not ignored
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
