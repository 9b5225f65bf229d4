// The rows of a table of logits, prepared for draws. A row is prepared when a chain first meets it, by the
// thread that meets it.
//
// ProbRows serve the sampler "torch", the others "philox": find(locate(token, draws, k)) is the token that
// the k-th of the draws draws from the row of `token`, the same for all kinds of rows. There are two steps so
// that other lanes can be located while one waits for memory. kNeedsLowBits: of all draws. kNeedsSecondDraws:
// DrawBlock::second_high().
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "base/interrupt.h"
#include "cpu/base/buffer.h"
#include "cpu/sampling/fixed_point_weights.h"
#include "cpu/sampling/guide_table.h"
#include "cpu/sampling/philox_fill.h"
#include "generate.h"
#include "sampling/fixed_point_cdf.h"

namespace bigramx::cpu {

// Raises the error of a row that is not a distribution.
void check_distribution(bool is_distribution, int64_t token);

// The probabilities by ATen's softmax, in blocks of rows that are large enough to amortise the call.
class ProbRows {
  public:
    explicit ProbRows(const GenerateParams& params);

    static constexpr int64_t kBlockElements = 1 << 16;  // at least one row

    // Of the probabilities.
    at::ScalarType dtype() const { return filtered_dtype(params_); }

    bool is_prepared(int64_t token) const { return blocks_[token / rows_per_block_].probs.defined(); }

    // Prepares the block of this row.
    void prepare(int64_t token);

    template <typename scalar_t>
    const scalar_t* row(int64_t token) const {
        const Block& block = blocks_[token / rows_per_block_];
        const int64_t row = token % rows_per_block_;
        check_distribution(block.are_distributions.const_data_ptr<bool>()[row], token);
        return block.probs.const_data_ptr<scalar_t>() + row * vocab_size_;
    }

  private:
    struct Block {
        at::Tensor probs;              // (rows, V)
        at::Tensor are_distributions;  // (rows) bool
    };
    static constexpr int64_t kMaxBytes = int64_t{1} << 30;  // all rows are dropped before they exceed it

    const GenerateParams params_;
    const int64_t vocab_size_;
    const int64_t rows_per_block_;
    std::vector<Block> blocks_;
    int64_t bytes_ = 0;
};

// The base of the rows for "philox": the table, the filters, and the states of the rows.
class LogitRows {
  public:
    virtual ~LogitRows() = default;

    // Once it is over no more rows are prepared, and those that are not draw token 0.
    TimeSlice slice;

    // A row with a NaN or an infinity, or with negative infinities alone, is not a distribution. It draws
    // token 0.
    bool is_distribution(int64_t token) {
        const State state = states_[token].load(std::memory_order_acquire);
        return (state == State::unprepared ? prepare(token) : state) == State::distribution;
    }

    // Raises if it is not.
    void check(int64_t token) { check_distribution(is_distribution(token), token); }

    // Over the rows that were met.
    bool all_are_distributions() const { return !any_is_invalid_.load(std::memory_order_relaxed); }

  protected:
    explicit LogitRows(const GenerateParams& params);

    // Sets row.max, and stores what draws need. Returns false if the row is not a distribution.
    virtual bool prepare_row(int64_t token, LogitRow& row) = 0;

    LogitRow row(int64_t token) const {
        return {logits_ + token * row_bytes_,
                temperature_,
                0,
                is_filtered_,
                is_filtered_ ? kept_[token] : KeptTokens<double>(),
                filter_.min_weight};
    }

    const at::Tensor weight_;  // (V, V), each row contiguous
    const int64_t vocab_size_;

  private:
    enum class State : uint8_t { unprepared, distribution, invalid };
    static constexpr int64_t kNumMutexes = 64;

    State prepare(int64_t token);
    KeptTokens<double> select(int64_t token) const;

    const double temperature_;
    const bool is_filtered_;
    const TokenFilter filter_;
    const Buffer<KeptTokens<double>> kept_;  // (V), of the rows that are prepared; or (0)
    bool (*const weigh_)(LogitRow&, int64_t, double*, uint64_t*);
    const char* const logits_;
    const int64_t row_bytes_;
    std::vector<std::atomic<State>> states_;
    std::mutex mutexes_[kNumMutexes];
    std::atomic<bool> any_is_invalid_{false};
};

// The fixed-point CDF of each row, and a guide table to it (Chen, Asau, 1974). For many draws per row.
//
// has_sure_entries: the guide table is so fine that most buckets draw a single token, which takes one load;
// the entries of the other buckets are marked as mixed. For small vocabularies: in large ones most buckets
// would be mixed, and mispredicted branches on the mark would cost more than a search for each draw.
template <bool has_sure_entries>
class WholeRows : public LogitRows {
  public:
    static constexpr int kLanes = 8;
    static constexpr int64_t kGrainSize = 1 << 14;
    static constexpr bool kNeedsLowBits = false, kNeedsSecondDraws = false;

    // V < 2^15: a token and a mark share an entry.
    explicit WholeRows(const GenerateParams& params);

    static int64_t bytes(int64_t vocab_size);

    using Place = uint32_t;  // the token itself

    Place locate(uint32_t token, const DrawBlock& draws, int64_t k) {
        // Another thread may be preparing the row: it publishes the entries after the cdf.
        const uint16_t entry =
            __atomic_load_n(guide(token) + guide_bucket(draws.high[k], guide_bits_), __ATOMIC_ACQUIRE);
        if (__builtin_expect(entry >= kMixed, false)) return prepare_and_search(token, draws, k);
        return has_sure_entries ? entry : search(token, entry, draws, k);
    }
    uint32_t find(Place place) const { return place; }

  private:
    static constexpr int kSureGuideBits = 11;
    static constexpr uint16_t kMixed = 1 << 15, kUnprepared = std::numeric_limits<uint16_t>::max();

    bool prepare_row(int64_t token, LogitRow& row) override;
    uint32_t prepare_and_search(uint32_t token, const DrawBlock& draws, int64_t k);

    // From the token `first` on.
    uint32_t search(uint32_t token, int64_t first, const DrawBlock& draws, int64_t k) const {
        const uint32_t r = draws.high[k];
        const int64_t found = search_cdf(cdf(token), first, r);
        if (__builtin_expect(is_undecided(cdf(token), found, r), false)) {
            return find_exactly(token, draws.complete(k));
        }
        return static_cast<uint32_t>(found);
    }
    uint32_t find_exactly(uint32_t token, uint64_t r) const;

    static int guide_bits(int64_t vocab_size);
    static void publish(uint16_t* entry, int value) {
        __atomic_store_n(entry, static_cast<uint16_t>(value), __ATOMIC_RELEASE);
    }
    void publish_sure_entries(int64_t token);

    uint32_t* cdf(int64_t token) const { return cdf_.begin() + token * padded_cdf(vocab_size_) + 1; }
    uint16_t* guide(int64_t token) const { return guide_.begin() + (token << guide_bits_); }

    bool (*const fill_cdf_)(LogitRow&, int64_t, uint32_t*);
    int64_t (*const find_)(LogitRow&, int64_t, uint64_t);
    const int guide_bits_;
    const Buffer<uint32_t> cdf_;    // (V, padded V)
    const Buffer<uint16_t> guide_;  // (V, 2^guide_bits)
};

// The cumulative sums after each block of kWeightsAtOnce weights, 16 bytes each. A draw computes the weights
// of one block again. For few draws per row, and for large tables.
class BlockRows : public LogitRows {
  public:
    static constexpr int kLanes = 4;
    static constexpr int64_t kGrainSize = 1 << 8;
    static constexpr bool kNeedsLowBits = true, kNeedsSecondDraws = false;

    explicit BlockRows(const GenerateParams& params);

    struct Place {
        uint32_t row;
        int64_t block;
        uint64_t target_sum;  // within the block; 0 where the row is not a distribution
    };

    Place locate(uint32_t token, const DrawBlock& draws, int64_t k);
    uint32_t find(const Place& place) const;

  private:
    bool prepare_row(int64_t token, LogitRow& row) override;

    bool (*const sum_blocks_)(LogitRow&, int64_t, WeightSum*);
    int64_t (*const find_in_block_)(const LogitRow&, int64_t, int64_t, uint64_t);
    const int64_t num_blocks_, block_bytes_;
    const Buffer<WeightSum> ends_;  // (V, blocks): the cumulative sums
    const Buffer<double> max_;      // (V)
};

// The argmax, whatever r is.
class ArgmaxRows {
  public:
    static constexpr int kLanes = 8;
    static constexpr int64_t kGrainSize = 1 << 14;
    static constexpr bool kNeedsLowBits = false, kNeedsSecondDraws = false;

    explicit ArgmaxRows(const at::Tensor& weight) : weight_(weight), argmax_(weight.size(0)) {}

    TimeSlice slice;  // as that of LogitRows

    using Place = uint32_t;  // the token itself

    Place locate(uint32_t token, const DrawBlock&, int64_t) {
        const uint32_t seen = argmax_[token].load(std::memory_order_relaxed);
        return seen != 0 ? seen - 1 : compute(token);
    }
    uint32_t find(Place place) const { return place; }

    void check(int64_t) const {}
    bool all_are_distributions() const { return true; }

  private:
    uint32_t compute(uint32_t token);

    const at::Tensor weight_;
    std::vector<std::atomic<uint32_t>> argmax_;  // (V): the argmax + 1; 0: not met yet
};

}  // namespace bigramx::cpu
