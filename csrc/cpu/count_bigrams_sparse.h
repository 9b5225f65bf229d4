// Pair counts that take memory in proportion to the distinct pairs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/count_bigrams_runs.h"

namespace bigramx::cpu {

// As in a log-structured merge tree, each block of rows has a few runs, of which the longest are merged least
// often. All methods may be called by several threads at once. No lock is held while handlers of signals run;
// where these raise, or memory is short, the counts are as before.
class PairCounter {
  public:
    // eot: a token whose pairs with the next one are not counted. Raises ValueError for one out of range.
    PairCounter(int64_t vocab_size, std::optional<int64_t> eot);

    // Counts the pairs (n, n + 1), begin <= n < end, of (N) uint8, uint16, uint32, int32 or int64 tokens.
    // Raises IndexError for a token out of range. Keeps its scratch memory for the next call.
    void update(const at::Tensor& tokens, int64_t begin, int64_t end);

    // Adds the counts of another, with which it then shares memory. Raises OverflowError where the sum of the
    // counts does not fit 63 bits.
    void merge(PairCounter& other);

    // Adds counts: crow_indices (V + 1) int64; col_indices and values, one for each pair, int32 or int64.
    // Raises ValueError where the columns of a row do not ascend, or a count is negative.
    void add_csr(const at::Tensor& crow_indices, const at::Tensor& col_indices, const at::Tensor& values);

    int64_t num_pairs();
    int64_t num_distinct();
    bool equals(PairCounter& other);

    // The rows from begin to before end, (end - begin, V) int64, as sparse_csr. releases: the counter has no
    // counts when this returns; their memory is given back meanwhile.
    at::Tensor csr(int64_t begin, int64_t end, bool releases);

    // All counts as add_csr takes them: columns in int32, and values too where they fit.
    std::tuple<at::Tensor, at::Tensor, at::Tensor> parts();

  private:
    void update_few(const at::Tensor& tokens, int64_t position);
    void update_many(const at::Tensor& tokens, int64_t position);
    void flush();
    bool try_flush(int64_t end);
    void add(const std::vector<Runs>& added, int64_t num_flushed = 0);
    std::vector<Runs> merged(int64_t ratio);
    std::vector<Runs> released();

    const PairFormat format_;
    const std::optional<int64_t> eot_;
    std::mutex mutex_;                     // of what follows
    std::vector<Runs> blocks_;             // one for each block
    int64_t num_pairs_ = 0;                // in these
    std::vector<uint32_t> pending_;        // tokens of short sequences, a separator after each
    int64_t num_flushed_ = 0;              // of all that were pending
    std::unique_ptr<RunCounter> scratch_;  // null while an update uses it
};

}  // namespace bigramx::cpu
