// The rows of an interpolated bigram model, prepared for draws of the sampler "philox". A row is prepared
// when a chain first meets it, in memory in proportion to its pairs.
//
// A draw takes two steps. The first is by a row's own fixed-point CDF: of its pairs and, last, of the weight
// of the unigram. Where it falls there, a second draw is by the CDF of the unigram, which all rows share.
//
// Temperature t keeps this form, with (a + b u)^(1/t) - (b u)^(1/t) for a pair, b^(1/t) for a row and
// u^(1/t) for the unigram. So do the filters: what they keep are the most likely tokens of a row. Where the
// unigram is in descending order, those of them that were not seen are among its first ones; the row draws
// from these, and has all the weight of the pairs behind them itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/interrupt.h"
#include "cpu/base/buffer.h"
#include "cpu/sampling/philox_fill.h"
#include "interpolated_bigram.h"
#include "sampling/fixed_point_cdf.h"

namespace bigramx::cpu {

// The memory of InterpolatedBigramParams; floats are read as doubles.
class InterpolatedBigram {
  public:
    // Raises if the pairs of the rows do not follow each other.
    explicit InterpolatedBigram(const InterpolatedBigramParams& params);

    // The pairs of a row.
    int64_t begin(int64_t row) const { return crow_[row]; }
    int64_t end(int64_t row) const { return crow_[row + 1]; }

    int32_t column(int64_t pair) const { return columns_[pair]; }
    const int32_t* columns() const { return columns_; }
    double pair_prob(int64_t pair) const { return pair_probs_(pair); }
    double backoff(int64_t row) const { return backoff_(row); }
    double unigram(int64_t token) const { return unigram_(token); }
    int64_t vocab_size() const { return vocab_size_; }
    int64_t num_pairs() const { return num_pairs_; }

  private:
    class Numbers {
      public:
        explicit Numbers(const at::Tensor& tensor);
        double operator()(int64_t k) const { return single_ != nullptr ? single_[k] : double_[k]; }

      private:
        const float* single_ = nullptr;
        const double* double_ = nullptr;
    };

    const int64_t vocab_size_, num_pairs_;
    const int64_t* const crow_;
    const int32_t* const columns_;
    const Numbers pair_probs_, backoff_, unigram_;
};

// The weights (u / largest u)^(1/t) of the unigram in descending order, and the fixed-point CDF of any number
// of the first of them.
class UnigramCdf {
  public:
    UnigramCdf(const InterpolatedBigram& model, double exponent);

    double largest() const { return largest_; }  // u

    uint32_t token(int64_t rank) const { return entries_[rank].token; }
    int64_t rank(int64_t token) const { return ranks_[token]; }
    double weight(int64_t rank) const { return weights_[rank]; }

    // Of the first so many of them.
    double sum(int64_t count) const {
        return count > 0 ? static_cast<double>(entries_[count - 1].cdf) * unit_ : 0;
    }

    // What the second of the draws k draws from the first so many of them, whose sum is not 0.
    uint32_t find(int64_t count, const DrawBlock& draws, int64_t k) const {
        const uint64_t last = entries_[count - 1].cdf;
        const uint64_t first = join_draw(draws.second_high(k), 0), least = share_of_total(first, last);
        const uint64_t most = share_of_total(first | ~uint32_t{0}, last);
        const Entry* const entry = find(least);
        return __builtin_expect(entry->cdf > most, true)
                   ? entry->token
                   : find(share_of_total(draws.complete_second(k), last))->token;
    }

  private:
    struct Entry {
        uint64_t cdf;
        uint32_t token;
    };

    const Entry* find(uint64_t target) const {
        const Entry* entry = &entries_[guide_[target >> guide_shift_]];
        while (entry->cdf <= target) ++entry;
        return entry;
    }
    void make_cdf();

    double largest_ = 0;
    double unit_ = 1;              // of the cdf
    int guide_shift_ = 0;          // from the cdf to buckets of the guide table
    std::vector<Entry> entries_;   // (V), by rank
    std::vector<double> weights_;  // (V), by rank
    std::vector<uint32_t> ranks_;  // (V), by token
    std::vector<uint32_t> guide_;  // for each bucket, the rank that its first number draws
};

// Of a row: the weights of its pairs, by column, and of the unigram.
struct RowWeights {
    struct Pair {
        double weight;
        uint32_t token;
    };

    std::vector<Pair> pairs;
    double unigram = 0;
    int64_t unigram_count = 0;  // how many tokens of the unigram it draws from, the first ones
};

class InterpolatedRows {
  public:
    static constexpr int kLanes = 16;
    static constexpr int64_t kGrainSize = 1 << 12;
    static constexpr bool kNeedsLowBits = false, kNeedsSecondDraws = true;

    // num_draws: how many there will be.
    InterpolatedRows(const InterpolatedBigramParams& params, const GenerateParams& options,
                     int64_t num_draws);

    // As those of LogitRows.
    TimeSlice slice;
    bool is_distribution(int64_t token);
    void check(int64_t token);
    bool all_are_distributions() const { return !any_is_invalid_.load(std::memory_order_relaxed); }

    struct Entry {
        uint32_t cdf;  // of the high bits of a draw
        uint32_t token;
    };
    struct Place {
        const Entry* entry;  // null where the row is not a distribution
        const DrawBlock* draws;
        int64_t k;
        uint32_t row;
    };

    Place locate(uint32_t token, const DrawBlock& draws, int64_t k) {
        const Row& row = rows_[token];
        // Another thread may be preparing the row: it publishes this after all else.
        int shift = __atomic_load_n(&row.guide_shift, __ATOMIC_ACQUIRE);
        if (__builtin_expect(shift < 0, false)) {
            if (!is_distribution(token)) return {nullptr, &draws, k, token};
            shift = row.guide_shift;
        }
        const int64_t guide = shift == kHighDrawBits ? 0 : row.begin;
        const uint32_t first = guide_[guide + (draws.high[k] >> shift)];
        const Entry* const entry = entries_.begin() + row.begin + first;
        __builtin_prefetch(entry);
        return {entry, &draws, k, token};
    }

    uint32_t find(const Place& place) const {
        if (__builtin_expect(place.entry == nullptr, false)) return 0;
        const uint32_t r = place.draws->high[place.k];
        const Entry* const entry = first_above(place.entry, r);
        uint32_t token = entry->token;
        if (__builtin_expect(r - entry[-1].cdf < 2, false)) token = find_exactly(place);
        return token == kUnigram ? draw_unigram(place) : token;
    }

  private:
    static constexpr uint32_t kUnigram = ~uint32_t{0};
    static constexpr int kUnprepared = -1, kInvalid = -2;
    static constexpr int64_t kNumMutexes = 64;
    static constexpr int kSearchWidth = 4;
    // Of a row, beside its pairs: one before the first; that of the unigram, and what the search reads
    // behind.
    static constexpr int64_t kOtherEntries = 1 + kSearchWidth;

    struct Row {
        int64_t begin;           // of its entries and, unless it has a single bucket, of its guide table
        int32_t guide_shift;     // from the high bits of a draw to its bucket; or one of the marks
        uint32_t unigram_count;  // it draws from the first so many tokens of the unigram
    };

    // A linear search: mostly one step from a guide table. It has no branch for each entry, as these would be
    // mispredicted.
    static const Entry* first_above(const Entry* entry, uint32_t r) {
        for (;;) {
            int count = 0;
            for (int k = 0; k < kSearchWidth; ++k) count += entry[k].cdf <= r;
            entry += count;
            if (__builtin_expect(count < kSearchWidth, true)) return entry;
        }
    }

    bool prepare(int64_t token);
    // Without pairs and unigram where it is not a distribution.
    RowWeights weights_of(int64_t row) const;
    uint32_t find_exactly(const Place& place) const;
    uint32_t draw_unigram(const Place& place) const {
        return unigram_.find(rows_[place.row].unigram_count, *place.draws, place.k);
    }

    const InterpolatedBigramParams params_;  // keeps the memory
    const GenerateParams options_;
    const InterpolatedBigram model_;
    const double exponent_;  // 1 / temperature
    const bool removes_tokens_;
    const UnigramCdf unigram_;
    std::vector<Row> rows_;         // (V)
    const Buffer<Entry> entries_;   // those of a row follow each other, of the row i from begin on
    const Buffer<uint32_t> guide_;  // likewise; the first one is the table of all rows with a single bucket
    std::mutex mutexes_[kNumMutexes];
    std::atomic<bool> any_is_invalid_{false};
};

}  // namespace bigramx::cpu
