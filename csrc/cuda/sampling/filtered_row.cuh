// A row of logits in the hands of a block, of which top-k, top-p and min-p keep some tokens
// (sampling/token_filter.h).
#pragma once

#include "cuda/sampling/weighted_row.cuh"
#include "sampling/token_filter.h"

namespace bigramx::cuda {

// Divided in the accumulation dtype.
template <typename scalar_t_>
struct FilteredLogits : Logits<scalar_t_> {
    using acc_t = opmath_t<scalar_t_>;

    KeptTokens<acc_t> kept = {};
    float min_weight = 0;

    __device__ acc_t scaled(acc_t logit) const {
        return this->temperature == 1 ? logit : logit / this->temperature;
    }
    __device__ uint64_t weight(acc_t logit, int64_t token, acc_t largest) const {
        const float scaled = scaled_exponential(static_cast<float>(logit - largest));
        return kept.contains(logit, token) && scaled >= min_weight ? round_down(scaled) : 0;
    }
};

// The bits of an element, in an order that is monotonic in the elements. All but NaN.
template <typename scalar_t>
struct OrderedBits {
    using Key = std::conditional_t<sizeof(scalar_t) == 8, uint64_t, uint32_t>;
    using Bits = std::conditional_t<sizeof(scalar_t) == 2, uint16_t, Key>;
    static constexpr Key kSign = Key{1} << (8 * sizeof(scalar_t) - 1);

    __device__ static Key key(scalar_t element) {
        Bits bits;
        memcpy(&bits, &element, sizeof(bits));
        return (bits & kSign) != 0 ? static_cast<Bits>(~bits) : bits | kSign;
    }
    __device__ static scalar_t element(Key key) {
        const auto bits = static_cast<Bits>((key & kSign) != 0 ? key ^ kSign : ~key);
        scalar_t element;
        memcpy(&element, &bits, sizeof(element));
        return element;
    }
};

// What was kept of the rows that blocks have met. The first block that knows it of a row tells it the others;
// until then each finds it itself. For one thread of a block.
template <typename acc_t>
struct KeptOfRows {
    enum State : unsigned { kUnknown, kBeingWritten, kKnown };

    KeptTokens<acc_t>* kept;  // (V)
    unsigned* states;         // (V)

    __device__ bool find(int64_t row, KeptTokens<acc_t>* found) const {
        if (atomicAdd(states + row, 0u) != kKnown) return false;
        __threadfence();
        *found = kept[row];
        return true;
    }

    __device__ void tell(int64_t row, const KeptTokens<acc_t>& found) const {
        if (atomicCAS(states + row, unsigned{kUnknown}, unsigned{kBeingWritten}) != kUnknown) return;
        kept[row] = found;
        __threadfence();
        atomicExch(states + row, unsigned{kKnown});
    }
};

template <typename scalar_t_>
class FilteredRow : public WeightedRow<FilteredLogits<scalar_t_>> {
  public:
    using scalar_t = scalar_t_;
    using acc_t = opmath_t<scalar_t>;
    using WeightedRow<FilteredLogits<scalar_t>>::WeightedRow;

    // Filters the row, which is a distribution, and has this index; before, all tokens are kept.
    __device__ void filter(const TokenFilter& filter, const KeptOfRows<acc_t>& rows, int64_t index) {
        KeptTokens<acc_t>* const found = this->memory_.kept;
        if (__syncthreads_or(threadIdx.x == 0 && rows.find(index, found)) != 0) return keep(*found, filter);
        const KeptTokens<acc_t> selected = select(filter);
        if (threadIdx.x == 0) rows.tell(index, selected);
        keep(selected, filter);
    }

  private:
    __device__ void keep(const KeptTokens<acc_t>& kept, const TokenFilter& filter) {
        this->elements_.kept = kept;
        this->elements_.min_weight = filter.min_weight;
    }

    __device__ acc_t logit(int64_t token) const { return this->elements_.scaled(widen(this->row_[token])); }
    __device__ uint64_t weight(int64_t token) const {
        return WeightedRow<FilteredLogits<scalar_t>>::weight(token, this->largest_);
    }

    __device__ KeptTokens<acc_t> select(const TokenFilter& filter) const {
        const int64_t size = this->vocab_size_;
        KeptTokens<acc_t> kept;
        if (filter.top_k < size) {
            const auto count = [](int64_t) { return 1; };
            kept.least = least_logit(static_cast<WeightSum>(filter.top_k), count);
        }
        if (filter.top_p == TokenFilter::kAllMass) return kept;
        const WeightSum total =
            sum_over_row([&](int64_t token) { return logit(token) >= kept.least ? weight(token) : 0; });
        WeightSum target_sum = block_target_sum(total, filter.top_p, this->memory_);
        kept.least = least_logit(target_sum, [&](int64_t token) { return weight(token); });
        target_sum -=
            sum_over_row([&](int64_t token) { return logit(token) > kept.least ? weight(token) : 0; });
        kept.last = size - 1 -
                    radix_select(
                        uint64_t{1} << (bit_length(size) - 1), target_sum,
                        [&](int64_t token) { return static_cast<uint64_t>(size - 1 - token); },
                        [&](int64_t token) { return logit(token) == kept.least ? weight(token) : 0; });
        return kept;
    }

    // The logit at which, in descending order, the sum of the values reaches the target.
    template <typename ValueOf>
    __device__ acc_t least_logit(WeightSum target_sum, const ValueOf& value_of) const {
        using Order = OrderedBits<scalar_t>;
        const auto key = radix_select(
            Order::kSign, target_sum, [&](int64_t token) { return Order::key(this->row_[token]); }, value_of);
        return this->elements_.scaled(widen(Order::element(key)));
    }

    // The key at which, in descending order, the sum of the values reaches the target. Each pass over the row
    // decides a bit, from `bit` down.
    template <typename Key, typename KeyOf, typename ValueOf>
    __device__ Key radix_select(Key bit, WeightSum target_sum, const KeyOf& key_of,
                                const ValueOf& value_of) const {
        Key key = 0;  // its bits so far
        for (; bit != 0; bit >>= 1) {
            const WeightSum sum = sum_over_row([&](int64_t token) {
                return ((key_of(token) ^ key) & ~(bit - 1)) == bit ? value_of(token) : 0;
            });
            if (sum < target_sum) {
                target_sum -= sum;
            } else {
                key |= bit;
            }
        }
        return key;
    }

    template <typename ValueOf>
    __device__ WeightSum sum_over_row(const ValueOf& value_of) const {
        const auto size = static_cast<unsigned>(this->vocab_size_);
        WeightSum sum = 0;
        for (unsigned token = threadIdx.x; token < size; token += blockDim.x) sum += value_of(token);
        return block_sum(sum, this->memory_.sums);
    }
};

}  // namespace bigramx::cuda
