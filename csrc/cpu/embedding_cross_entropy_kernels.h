// Rows of the table: their logsumexp, the losses of the pairs that start in them, their gradients.
// Compiled once for each CPU target (cpu/base/foreach_target.h); hence no include guard.

namespace bigramx::cpu::BIGRAMX_TARGET {

// Works on a few short rows at a time, one step for all of them before the next step: the steps of one row
// wait for each other, those of different rows overlap. Together the rows stay in the first-level cache; a
// long row goes alone, and the next one is fetched meanwhile.
template <typename scalar_t>
class RowKernel {
  public:
    using T = opmath_t<scalar_t>;

    RowKernel(const EmbeddingCrossEntropyKernelParams& params, const LossScratch& scratch)
        : params_(params),
          class_weight_(static_cast<const T*>(params.class_weight)),
          grad_losses_(static_cast<const T*>(params.grad_losses)),
          exponentials_(static_cast<T*>(scratch.exponentials)),
          target_counts_(scratch.target_counts),
          is_plain_(class_weight_ == nullptr && grad_losses_ == nullptr &&
                    params.options.label_smoothing == 0 && params.options.z_loss == 0),
          rows_of_scratch_(rows_of_scratch(params)) {}

    LossSums process(int64_t begin, int64_t end) {
        num_rows_ = 0;
        for (int64_t slot = begin; slot < end; ++slot) add_row(slot);
        find_maxima(std::min(params_.num_classes, kFirstPart));
        exponentiate();
        if (kFirstPart < params_.num_classes && !sums_are_moderate()) {
            find_maxima(params_.num_classes);
            exponentiate();
        }
        if (class_weight_ != nullptr) for_each_row([&](Row& row) { sum_class_weights(row); });
        if (!params_.pairs->counted) for_each_row([&](Row& row) { sum_listed_pairs(row); });
        LossSums sums;
        if (params_.want_loss) for_each_row([&](Row& row) { sums = sums + losses(row); });
        if (params_.gradient != nullptr) for_each_row([&](Row& row) { write_gradient(row); });
        for_each_row([&](Row& row) { clear_counts(row); });
        return sums;
    }

    void finish() {
        outgoing_.finish();
        if (params_.nontemporal_gradient) fence_nontemporal_stores();
    }

  private:
    struct Row {
        int64_t index;           // in the table
        const scalar_t* weight;  // (C)
        const scalar_t* next;    // the row that comes after it
        scalar_t* gradient;      // (C), or null
        int64_t begin, end;      // its pairs in the list
        int32_t* counts;         // (padded C): of its pairs by target; or null
        T* exponentials;         // (padded C): e^(W[i, j] - max)
        T max, sum, log_sum;     // of W[i, :], or near it; of the exponentials
        int64_t num_pairs;       // that are not ignored
        PairSums pairs;
        double target_logits;  // the sum of class_weight[target] (W[i, target] - max)

        double lse() const { return static_cast<double>(max) + log_sum; }
    };

    const scalar_t* weight_of_slot(int64_t slot) const {
        const int64_t index = params_.rows != nullptr ? params_.rows[slot] : slot;
        return static_cast<const scalar_t*>(params_.weight) + index * params_.row_stride;
    }

    // A row without pairs has no losses, and its gradient is zero.
    void add_row(int64_t slot) {
        Row& row = rows_[num_rows_];
        row.index = params_.rows != nullptr ? params_.rows[slot] : slot;
        row.gradient = params_.gradient != nullptr
                           ? static_cast<scalar_t*>(params_.gradient) + slot * params_.num_classes
                           : nullptr;
        row.num_pairs = 0;
        row.pairs = {};
        if (!find_pairs(row)) {
            if (row.gradient != nullptr)
                std::fill(row.gradient, row.gradient + params_.num_classes, scalar_t(0));
            return;
        }
        row.weight = weight_of_slot(slot);
        row.next = weight_of_slot(std::min(slot + 1, params_.num_slots - 1));
        row.exponentials = exponentials_ + next_scratch_ * padded(params_.num_classes);
        if (++next_scratch_ == rows_of_scratch_) next_scratch_ = 0;
        ++num_rows_;
    }

    bool find_pairs(Row& row) const {
        const Pairs& pairs = *params_.pairs;
        row.counts = nullptr;
        if (!pairs.counted) {
            row.begin = pairs.row_begin[row.index];
            row.end = pairs.row_begin[row.index + 1];
            return row.begin < row.end;
        }
        row.counts = pairs.counts.begin() + row.index * pairs.stride;
        row.num_pairs = pairs.num_counted(row.index);
        return row.num_pairs > 0;
    }

    template <typename Visit>
    void for_each_row(const Visit& visit) {
        for (int64_t k = 0; k < num_rows_; ++k) visit(rows_[k]);
    }

    // visit(k, target), k being the pair's place in the list.
    template <typename Visit>
    void for_each_target(const Row& row, const Visit& visit) const {
        const int32_t* targets = params_.pairs->targets.begin();
        for (int64_t k = row.begin; k < row.end; ++k) {
            if (targets[k] != Pairs::kIgnored) visit(k, static_cast<int64_t>(targets[k]));
        }
    }

    // Steps of all rows keep a vector a row in partial_; then reduce(combine) gives each row's number.
    template <typename Combine>
    void reduce(const Combine& combine, T* numbers) {
        for (int64_t k = 0; k < num_rows_; k += kLanes<T>) {
            store(numbers + k, reduce_each<T>(partial_ + k, combine));
        }
    }

    template <typename Combine>
    void reduce(const Combine& combine, T Row::* number) {
        alignas(BIGRAMX_VECTOR_BYTES) T numbers[kMaxRowsAtOnce];
        reduce(combine, numbers);
        for (int64_t k = 0; k < num_rows_; ++k) rows_[k].*number = numbers[k];
    }

    // Of the first `size` logits of each row.
    void find_maxima(int64_t size) {
        for (int64_t k = 0; k < num_rows_; ++k) {
            const scalar_t* weight = rows_[k].weight;
            Vector<T> largest = broadcast(kLowest);
            for_each_vector<T>(size,
                               [&](Lanes<T> lanes) { largest = max(largest, lanes.load(weight, kLowest)); });
            partial_[k] = largest;
        }
        reduce([](Vector<T> a, Vector<T> b) { return max(a, b); }, &Row::max);
    }

    // Whether the maxima of the first parts are near enough to those of the rows. If not, sums lose digits;
    // or overflow, or are NaN.
    bool sums_are_moderate() const {
        const T most = static_cast<T>(16 * params_.num_classes);
        return std::all_of(rows_, rows_ + num_rows_, [&](const Row& row) { return row.sum < most; });
    }

    void exponentiate() {
        const auto add = [](Vector<T> a, Vector<T> b) { return a + b; };
        for (int64_t k = 0; k < num_rows_; ++k) {
            if (params_.pairs->counted) {
                exponentiate_counted(k);
            } else {
                NonTemporalRow<scalar_t> outgoing = outgoing_;  // a copy, for registers
                partial_[k] = exponentials_of(rows_[k], [&](Lanes<T>, Vector<T>) { outgoing.step(); });
                outgoing_ = outgoing;
            }
        }
        alignas(BIGRAMX_VECTOR_BYTES) T sums[kMaxRowsAtOnce];
        reduce(add, sums);
        for (int64_t k = 0; k < num_rows_; ++k) rows_[k].sum = sums[k];
        for (int64_t k = 0; k < num_rows_; k += kLanes<T>) store(sums + k, log(load(sums + k)));
        for (int64_t k = 0; k < num_rows_; ++k) rows_[k].log_sum = sums[k];
        if (!params_.pairs->counted) return;
        std::copy(target_logits_, target_logits_ + num_rows_, partial_);
        reduce(add, sums);
        for (int64_t k = 0; k < num_rows_; ++k) {
            Row& row = rows_[k];
            row.pairs.gradients = row.pairs.weighted = static_cast<double>(row.num_pairs);
            row.target_logits = sums[k];
        }
    }

    // Their sums by lane; visit(lanes, W[i, j] - max) meanwhile. The row's pointers are copied, for what is
    // stored might else be one of them.
    template <typename Visit>
    Vector<T> exponentials_of(const Row& row, const Visit& visit) const {
        const scalar_t *weight = row.weight, *next = row.next;
        T* const exponentials = row.exponentials;
        const Vector<T> row_max = broadcast(row.max);
        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
            __builtin_prefetch(next + lanes.begin, 0, 2);
            const Vector<T> logits = lanes.load(weight, kLowest) - row_max;
            const Vector<T> e = exp(logits);
            store(exponentials + lanes.begin, e);
            sums += e;  // beyond the tail: e^(-inf) = 0
            visit(lanes, logits);
        });
        return sums;
    }

    void exponentiate_counted(int64_t k) {
        const Row& row = rows_[k];
        const Vector<T> none = broadcast(T(0));
        Vector<T> target_logits = none;
        partial_[k] = exponentials_of(row, [&](Lanes<T> lanes, Vector<T> logits) {
            const Vector<T> counts = load_counts(row, lanes);
            const Vector<T> weights = class_weight_ != nullptr ? counts * load_class_weights(lanes) : counts;
            target_logits += counts > none ? weights * logits : none;  // 0 times an infinity is none
        });
        target_logits_[k] = target_logits;
    }

    void sum_class_weights(Row& row) const {
        if (row.counts == nullptr) return;
        Vector<T> weighted = broadcast(T(0));
        for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
            weighted += load_counts(row, lanes) * load_class_weights(lanes);
        });
        row.pairs.weighted = horizontal_sum<T>(weighted);
    }

    Vector<T> load_counts(const Row& row, Lanes<T> lanes) const {
        typedef int32_t Counts __attribute__((vector_size(kLanes<T> * sizeof(int32_t))));
        Counts counts;
        std::memcpy(&counts, row.counts + lanes.begin, sizeof(counts));
        return __builtin_convertvector(counts, Vector<T>);
    }

    Vector<T> load_class_weights(Lanes<T> lanes) const {
        return class_weight_ != nullptr ? lanes.load(class_weight_, T(0)) : broadcast(T(1));
    }

    double weight_of(int64_t target) const { return class_weight_ != nullptr ? class_weight_[target] : 1.0; }

    void sum_listed_pairs(Row& row) const {
        if (grad_losses_ == nullptr && class_weight_ == nullptr) {
            sum_plain_pairs(row);
        } else {
            sum_weighted_pairs(row);
        }
    }

    void sum_plain_pairs(Row& row) const {
        const scalar_t* weight = row.weight;
        double logits[2] = {};  // two, for each addition waits for the one before
        int64_t num_pairs = 0;
        for_each_target(row, [&](int64_t k, int64_t target) {
            logits[k % 2] += static_cast<T>(weight[target]) - row.max;
            ++num_pairs;
        });
        row.num_pairs = num_pairs;
        row.pairs.gradients = row.pairs.weighted = static_cast<double>(num_pairs);
        row.target_logits = logits[0] + logits[1];
    }

    void sum_weighted_pairs(Row& row) const {
        row.target_logits = 0;
        for_each_target(row, [&](int64_t k, int64_t target) {
            const double g = grad_losses_ != nullptr ? grad_losses_[params_.pairs->pair_indices[k]] : 1.0;
            const double class_weight = weight_of(target);
            row.num_pairs += 1;
            row.pairs.gradients += g;
            row.pairs.weighted += g * class_weight;
            row.target_logits += class_weight * (static_cast<T>(row.weight[target]) - row.max);
        });
    }

    // sum_j class_weight[j] (lse - W[i, j])
    double class_losses(const Row& row) const {
        const Vector<T> lse = broadcast(static_cast<T>(row.lse()));
        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> losses = lse - lanes.load(row.weight, static_cast<T>(row.lse()));
            sums += load_class_weights(lanes) * losses;
        });
        return horizontal_sum<T>(sums);
    }

    LossSums losses(const Row& row) const {
        const double smoothing_loss = params_.options.label_smoothing > 0
                                          ? smoothing_loss_of_row(params_.options, class_losses(row))
                                          : 0.0;
        const double z_loss = z_loss_of_row(params_.options, row.lse());
        if (params_.losses != nullptr) write_losses(row, smoothing_loss + z_loss);
        if (row.num_pairs == 0) return {};
        return loss_of_row(params_.options, row.pairs, row.log_sum, row.target_logits, smoothing_loss,
                           z_loss);
    }

    // The loss of each pair; `shared`: what all pairs of the row have alike.
    void write_losses(const Row& row, double shared) const {
        scalar_t* losses = static_cast<scalar_t*>(params_.losses);
        const int64_t* pair_indices = params_.pairs->pair_indices.begin();
        for (int64_t k = row.begin; k < row.end; ++k) losses[pair_indices[k]] = 0;
        for_each_target(row, [&](int64_t k, int64_t target) {
            const T logit = static_cast<T>(row.weight[target]) - row.max;
            const double loss = loss_of_pair(params_.options, shared, weight_of(target), row.log_sum, logit);
            losses[pair_indices[k]] = static_cast<scalar_t>(static_cast<T>(loss));
        });
    }

    // dW[i, j] = scale * e^(W[i, j] - max) - smooth * class_weight[j] - (what falls on j as a target)
    void write_gradient(Row& row) {
        if (row.num_pairs == 0 || row.index == params_.padding_idx) {
            std::fill(row.gradient, row.gradient + params_.num_classes, scalar_t(0));
            return;
        }
        const RowGradient terms = gradient_of_row(params_.options, params_.scales, row.pairs, row.lse());
        const T scale = static_cast<T>(terms.mass / row.sum);
        T* const exponentials = row.exponentials;
        const auto spread = [&, scale = broadcast(scale),
                             smoothing = broadcast(static_cast<T>(terms.smoothing))](Lanes<T> lanes) {
            Vector<T> result = load(exponentials + lanes.begin) * scale;
            if (terms.smoothing != 0) result -= load_class_weights(lanes) * smoothing;
            return result;
        };
        if (row.counts != nullptr) {
            write_counted_gradient(row, spread, terms.target);
        } else if (is_plain_ && std::isnormal(scale) && std::isfinite(row.sum)) {
            subtract_targets(row, exponentials, terms.target / scale);
            write_numbers(row, scale);
        } else {
            for_each_vector<T>(params_.num_classes,
                               [&](Lanes<T> lanes) { store(exponentials + lanes.begin, spread(lanes)); });
            subtract_targets(row, exponentials, terms.target);
            for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
                lanes.store(row.gradient, load(exponentials + lanes.begin));
            });
        }
    }

    template <typename Spread>
    void write_counted_gradient(const Row& row, const Spread& spread, double target) const {
        scalar_t* const gradient = row.gradient;
        const Vector<T> target_part = broadcast(static_cast<T>(target));
        for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> counts = load_counts(row, lanes);
            lanes.store(gradient, spread(lanes) - counts * load_class_weights(lanes) * target_part);
        });
    }

    // gradient = scratch * scale, none of it NaN
    void write_numbers(const Row& row, T scale) {
        if (params_.nontemporal_gradient) {
            outgoing_.start(row.gradient, row.exponentials, params_.num_classes, scale);
        } else {
            for_each_vector<T>(params_.num_classes, [&](Lanes<T> lanes) {
                lanes.store(row.gradient, load(row.exponentials + lanes.begin) * broadcast(scale));
            });
        }
    }

    // target_part: what a pair of class weight 1 takes from its target.
    void subtract_targets(const Row& row, T* row_gradient, double target_part) {
        if (grad_losses_ != nullptr) {
            for_each_target(row, [&](int64_t k, int64_t target) {
                const double g = grad_losses_[params_.pairs->pair_indices[k]];
                row_gradient[target] -= static_cast<T>(target_part * g * weight_of(target));
            });
            return;
        }
        // All pairs weigh the same, so equal ones are counted first: integers, exact in any order.
        int32_t* const counts = target_counts_;
        for_each_target(row, [&](int64_t, int64_t target) { ++counts[target]; });
        for_each_target(row, [&](int64_t, int64_t target) {
            const int32_t count = std::exchange(counts[target], 0);
            if (count > 0) row_gradient[target] -= static_cast<T>(target_part * count * weight_of(target));
        });
    }

    void clear_counts(const Row& row) const {
        if (row.counts == nullptr) return;
        for (int64_t k = 0; k < params_.pairs->stride; k += kLanes<int32_t>) {
            store(row.counts + k, Vector<int32_t>{});
        }
    }

    static constexpr T kLowest = -std::numeric_limits<T>::infinity();
    // Any number near its maximum will do to shift a long row: that of this many logits, to save a pass.
    static constexpr int64_t kFirstPart = 1 << 11;

    const EmbeddingCrossEntropyKernelParams& params_;
    const T* class_weight_;
    const T* grad_losses_;
    T* exponentials_;                    // (rows_of_scratch, padded C)
    int32_t* target_counts_;             // (C), all zero between rows
    NonTemporalRow<scalar_t> outgoing_;  // a gradient row, which leaves while the next row is computed
    const bool is_plain_;  // all pairs weigh the same, and nothing is added to the cross entropy
    const int64_t rows_of_scratch_;
    int64_t next_scratch_ = 0;
    Row rows_[kMaxRowsAtOnce];
    Vector<T> partial_[kMaxRowsAtOnce] = {};
    Vector<T> target_logits_[kMaxRowsAtOnce];  // by lane, where the pairs are counted
    int64_t num_rows_ = 0;
};

template <typename scalar_t>
LossSums rows_kernel(const EmbeddingCrossEntropyKernelParams& params, const LossScratch& scratch,
                     int64_t begin, int64_t end) {
    RowKernel<scalar_t> kernel(params, scratch);
    const int64_t step = rows_at_once(params.num_classes);
    LossSums sums;
    for (int64_t slot = begin; slot < end; slot += step)
        sums = sums + kernel.process(slot, std::min(end, slot + step));
    kernel.finish();
    return sums;
}

// (N, C): the rows of the table that idx names.
inline void gather_kernel(const GatherParams& params, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        copy_row(params.to + n * params.row_bytes, params.table + params.idx[n] * params.stride_bytes,
                 params.row_bytes);
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
