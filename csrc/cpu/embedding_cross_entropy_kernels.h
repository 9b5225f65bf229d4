// Rows of the table: their logsumexp, the losses of the pairs that start in them, their gradients. Compiled
// once for each CPU target (cpu/base/foreach_target.h), hence no include guard.

namespace bigramx::cpu::BIGRAMX_TARGET {

// Where the gradient of the rows goes: to memory, if it is wanted. fit has another one.
template <typename scalar_t>
class GradientInMemory {
  public:
    using acc_t = opmath_t<scalar_t>;

    explicit GradientInMemory(const EmbeddingCrossEntropyKernelParams& params) : params_(params) {}

    bool is_wanted() const { return params_.gradient != nullptr; }

    void fill(int64_t slot, acc_t value) const {
        std::fill(row(slot), row(slot) + params_.num_classes, static_cast<scalar_t>(value));
    }

    // gradient(lanes): a part of the row.
    template <typename Gradient>
    void write(int64_t slot, const Gradient& gradient) const {
        scalar_t* const to = row(slot);
        for_each_vector<acc_t>(params_.num_classes,
                               [&](Lanes<acc_t> lanes) { lanes.store(to, gradient(lanes)); });
    }

    // exponentials * scale, without a NaN.
    void write_numbers(int64_t slot, const acc_t* exponentials, acc_t scale) {
        if (params_.nontemporal_gradient) {
            outgoing_.start(row(slot), exponentials, params_.num_classes, scale);
        } else {
            write(slot, [exponentials, scale = broadcast(scale)](Lanes<acc_t> lanes) {
                return load(exponentials + lanes.begin) * scale;
            });
        }
    }

    // While the next row is computed, some of one leaves the scratch. A copy of its state is kept in
    // registers.
    NonTemporalRow<scalar_t> outgoing() const { return outgoing_; }
    void set_outgoing(const NonTemporalRow<scalar_t>& outgoing) { outgoing_ = outgoing; }

    void finish() {
        outgoing_.finish();
        if (params_.nontemporal_gradient) fence_nontemporal_stores();
    }

  private:
    scalar_t* row(int64_t slot) const {
        return static_cast<scalar_t*>(params_.gradient) + slot * params_.num_classes;
    }

    const EmbeddingCrossEntropyKernelParams& params_;
    NonTemporalRow<scalar_t> outgoing_;
};

// Processes a few short rows together, each step for all of them before the next step: the steps of one row
// depend on each other, those of different rows overlap. Together the rows fit into the L1 cache. A long row
// is processed alone, while the next one is prefetched.
template <typename scalar_t, typename Gradient>
class RowKernel {
  public:
    using acc_t = opmath_t<scalar_t>;

    RowKernel(const EmbeddingCrossEntropyKernelParams& params, const LossScratch& scratch, Gradient& gradient)
        : params_(params),
          gradient_(gradient),
          class_weight_(static_cast<const acc_t*>(params.class_weight)),
          grad_losses_(static_cast<const acc_t*>(params.grad_losses)),
          exponentials_(static_cast<acc_t*>(scratch.exponentials)),
          target_counts_(scratch.target_counts),
          is_plain_(class_weight_ == nullptr && grad_losses_ == nullptr &&
                    params.options.label_smoothing == 0 && params.options.z_loss == 0),
          rows_of_scratch_(rows_of_scratch(params)) {}

    // Adds the losses of the rows one after another: rows without pairs between them change nothing.
    void process(int64_t begin, int64_t end, LossSums& sums) {
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
        if (params_.want_loss) for_each_row([&](Row& row) { sums = sums + losses(row); });
        if (gradient_.is_wanted()) for_each_row([&](Row& row) { write_gradient(row); });
        for_each_row([&](Row& row) { clear_counts(row); });
    }

  private:
    struct Row {
        int64_t slot;
        int64_t index;            // in the table
        const scalar_t* weight;   // (C)
        const scalar_t* next;     // the next row, to prefetch
        int64_t begin, end;       // its pairs in the list
        int32_t* counts;          // (padded C): its pairs by target; or null
        acc_t* exponentials;      // (padded C): e^(W[i, j] - max)
        acc_t max, sum, log_sum;  // max: of W[i, :], or close to it; sum: of the exponentials
        int64_t num_pairs;        // not ignored
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
        row.slot = slot;
        row.num_pairs = 0;
        row.pairs = {};
        if (!find_pairs(row)) {
            if (gradient_.is_wanted()) gradient_.fill(slot, acc_t(0));
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
        return pairs.has_row(row.index);
    }

    template <typename Visit>
    void for_each_row(const Visit& visit) {
        for (int64_t k = 0; k < num_rows_; ++k) visit(rows_[k]);
    }

    // visit(k, target) for each pair that is not ignored; k: its position in the list.
    template <typename Visit>
    void for_each_target(const Row& row, const Visit& visit) const {
        const int32_t* targets = params_.pairs->targets.begin();
        for (int64_t k = row.begin; k < row.end; ++k) {
            if (targets[k] != Pairs::kIgnored) visit(k, static_cast<int64_t>(targets[k]));
        }
    }

    // Steps leave a vector per row in partial_. Reduces it to values, one per row, or to a member of each
    // row.
    template <typename Combine>
    void reduce(const Combine& combine, acc_t* values) {
        for (int64_t k = 0; k < num_rows_; k += kLanes<acc_t>) {
            store(values + k, reduce_each<acc_t>(partial_ + k, combine));
        }
    }

    template <typename Combine>
    void reduce(const Combine& combine, acc_t Row::* member) {
        alignas(BIGRAMX_VECTOR_BYTES) acc_t values[kMaxRowsAtOnce];
        reduce(combine, values);
        for (int64_t k = 0; k < num_rows_; ++k) rows_[k].*member = values[k];
    }

    // Sets max to the maximum of the first `size` logits of each row.
    void find_maxima(int64_t size) {
        for (int64_t k = 0; k < num_rows_; ++k) {
            const scalar_t* weight = rows_[k].weight;
            Vector<acc_t> largest = broadcast(kLowest);
            for_each_vector<acc_t>(
                size, [&](Lanes<acc_t> lanes) { largest = max(largest, lanes.load(weight, kLowest)); });
            partial_[k] = largest;
        }
        reduce([](Vector<acc_t> a, Vector<acc_t> b) { return max(a, b); }, &Row::max);
    }

    // Whether the maxima of the first parts are close enough to those of the rows. If not, the sums lose
    // digits, overflow, or are NaN.
    bool sums_are_moderate() const {
        const acc_t most = static_cast<acc_t>(16 * params_.num_classes);
        return std::all_of(rows_, rows_ + num_rows_, [&](const Row& row) { return row.sum < most; });
    }

    void exponentiate() {
        const auto add = [](Vector<acc_t> a, Vector<acc_t> b) { return a + b; };
        for (int64_t k = 0; k < num_rows_; ++k) {
            if (params_.pairs->counted) {
                exponentiate_counted(k);
            } else {
                auto outgoing = gradient_.outgoing();
                partial_[k] =
                    exponentials_of(rows_[k], [&](Lanes<acc_t>, Vector<acc_t>)
                                                  __attribute__((always_inline)) { outgoing.step(); });
                gradient_.set_outgoing(outgoing);
            }
        }
        alignas(BIGRAMX_VECTOR_BYTES) acc_t sums[kMaxRowsAtOnce];
        reduce(add, sums);
        for (int64_t k = 0; k < num_rows_; ++k) rows_[k].sum = sums[k];
        for (int64_t k = 0; k < num_rows_; k += kLanes<acc_t>) store(sums + k, log(load(sums + k)));
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

    // Fills row.exponentials, calls visit(lanes, W[i, j] - max), and returns the sums by lane. The row's
    // pointers are copied: they could alias what is stored.
    template <typename Visit>
    Vector<acc_t> exponentials_of(const Row& row, const Visit& visit) const {
        const scalar_t *weight = row.weight, *next = row.next;
        acc_t* const exponentials = row.exponentials;
        const Vector<acc_t> row_max = broadcast(row.max);
        Vector<acc_t> sums = broadcast(acc_t(0));
        for_each_places<acc_t, kTogether>(
            params_.num_classes, [&](const auto& places) __attribute__((always_inline)) {
                constexpr int64_t kSize = std::remove_reference_t<decltype(places)>::size;
                Vector<acc_t> e[kSize];
                for (int64_t k = 0; k < kSize; ++k) {
                    __builtin_prefetch(next + places[k].begin, 0, 2);
                    e[k] = places[k].load(weight, row.max) - row_max;
                    visit(places[k], e[k]);
                }
                exp_each(e);
                for (int64_t k = 0; k < kSize; ++k) {
                    store(exponentials + places[k].begin, e[k]);
                    sums += places[k].in_row(e[k]);
                }
            });
        return sums;
    }

    void exponentiate_counted(int64_t k) {
        const Row& row = rows_[k];
        const Vector<acc_t> none = broadcast(acc_t(0));
        Vector<acc_t> target_logits = none;
        partial_[k] = exponentials_of(
            row, [&](Lanes<acc_t> lanes, Vector<acc_t> logits) __attribute__((always_inline)) {
                const Vector<acc_t> counts = load_counts(row, lanes);
                target_logits += counts > none ? weigh(counts, lanes) * logits : none;
            });
        target_logits_[k] = target_logits;
    }

    void sum_class_weights(Row& row) const {
        if (row.counts == nullptr) return;
        Vector<acc_t> weighted = broadcast(acc_t(0));
        for_each_vector<acc_t>(params_.num_classes, [&](Lanes<acc_t> lanes) {
            weighted += weigh(load_counts(row, lanes), lanes);
        });
        row.pairs.weighted = horizontal_sum<acc_t>(weighted);
    }

    Vector<acc_t> load_counts(const Row& row, Lanes<acc_t> lanes) const {
        typedef int32_t Counts __attribute__((vector_size(kLanes<acc_t> * sizeof(int32_t))));
        Counts counts;
        std::memcpy(&counts, row.counts + lanes.begin, sizeof(counts));
        return __builtin_convertvector(counts, Vector<acc_t>);
    }

    Vector<acc_t> load_class_weights(Lanes<acc_t> lanes) const {
        return class_weight_ != nullptr ? lanes.load(class_weight_, acc_t(0)) : broadcast(acc_t(1));
    }

    // counts * class_weight; 0 where there are none, whatever the weight: 0 times an infinity would be NaN.
    Vector<acc_t> weigh(Vector<acc_t> counts, Lanes<acc_t> lanes) const {
        if (class_weight_ == nullptr) return counts;
        const Vector<acc_t> none = broadcast(acc_t(0));
        return counts > none ? counts * load_class_weights(lanes) : none;
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
        const scalar_t* const weight = row.weight;
        const int32_t* const targets = params_.pairs->targets.begin();
        double even = 0, odd = 0;  // two, in registers, as each addition waits for the one before
        int64_t num_pairs = 0;
        const auto add = [&, max = row.max](double& sum, int32_t target) {
            if (target == Pairs::kIgnored) return;
            sum += static_cast<acc_t>(weight[target]) - max;
            ++num_pairs;
        };
        int64_t k = row.begin;
        for (; k + 1 < row.end; k += 2) {
            add(even, targets[k]);
            add(odd, targets[k + 1]);
        }
        if (k < row.end) add(even, targets[k]);
        row.num_pairs = num_pairs;
        row.pairs.gradients = row.pairs.weighted = static_cast<double>(num_pairs);
        row.target_logits = even + odd;
    }

    void sum_weighted_pairs(Row& row) const {
        row.target_logits = 0;
        for_each_target(row, [&](int64_t k, int64_t target) {
            const double g = grad_losses_ != nullptr ? grad_losses_[params_.pairs->pair_indices[k]] : 1.0;
            const double class_weight = weight_of(target);
            row.num_pairs += 1;
            row.pairs.gradients += g;
            row.pairs.weighted += g * class_weight;
            row.target_logits += class_weight * (static_cast<acc_t>(row.weight[target]) - row.max);
        });
    }

    // sum_j class_weight[j] (lse - W[i, j])
    double class_losses(const Row& row) const {
        const Vector<acc_t> lse = broadcast(static_cast<acc_t>(row.lse()));
        Vector<acc_t> sums = broadcast(acc_t(0));
        for_each_vector<acc_t>(params_.num_classes, [&](Lanes<acc_t> lanes) {
            const Vector<acc_t> losses = lse - lanes.load(row.weight, static_cast<acc_t>(row.lse()));
            sums += load_class_weights(lanes) * losses;
        });
        return horizontal_sum<acc_t>(sums);
    }

    // The sum of class_weight[target] (lse - W[i, target]).
    double target_losses(const Row& row) const {
        if (class_weight_ != nullptr && !std::isfinite(row.pairs.weighted)) return infinite_losses(row);
        return row.pairs.weighted * row.log_sum - row.target_logits;
    }

    // The same, of a pair at a time: the sums have infinities that cancel.
    __attribute__((noinline)) double infinite_losses(const Row& row) const {
        double total = 0;
        const auto add = [&](int64_t target, double count) {
            const acc_t logit = static_cast<acc_t>(row.weight[target]) - row.max;
            total += count * weight_of(target) * (row.log_sum - logit);
        };
        if (row.counts == nullptr) {
            for_each_target(row, [&](int64_t, int64_t target) { add(target, 1); });
        } else {
            for (int64_t j = 0; j < params_.num_classes; ++j) {
                if (row.counts[j] > 0) add(j, row.counts[j]);
            }
        }
        return total;
    }

    LossSums losses(const Row& row) const {
        const double smoothing_loss = params_.options.label_smoothing > 0
                                          ? smoothing_loss_of_row(params_.options, class_losses(row))
                                          : 0.0;
        const double z_loss = z_loss_of_row(params_.options, row.lse());
        if (params_.losses != nullptr) write_losses(row, smoothing_loss + z_loss);
        if (row.num_pairs == 0) return {};
        return loss_of_row(params_.options, row.pairs, target_losses(row), smoothing_loss, z_loss);
    }

    // The loss of each pair. shared: what all pairs of the row have in common.
    void write_losses(const Row& row, double shared) const {
        acc_t* losses = static_cast<acc_t*>(params_.losses);
        const int64_t* pair_indices = params_.pairs->pair_indices.begin();
        for (int64_t k = row.begin; k < row.end; ++k) losses[pair_indices[k]] = 0;
        for_each_target(row, [&](int64_t k, int64_t target) {
            const acc_t logit = static_cast<acc_t>(row.weight[target]) - row.max;
            const double loss = loss_of_pair(params_.options, shared, weight_of(target), row.log_sum, logit);
            losses[pair_indices[k]] = static_cast<acc_t>(loss);
        });
    }

    // dW[i, j] = unit * (mass / sum * e^(W[i, j] - max) - class_weight[j] * (smoothing + target * s_j))
    void write_gradient(Row& row) {
        if (row.num_pairs == 0 || row.index == params_.padding_idx) {
            // Where all pairs are ignored the softmax counts 0 times, which is NaN if it is NaN.
            const acc_t none = row.index == params_.padding_idx ? 0 : 0 * row.sum;
            gradient_.fill(row.slot, none);
            return;
        }
        const RowGradient terms = gradient_of_row(params_.options, params_.scales, row.pairs, row.lse());
        acc_t* const exponentials = row.exponentials;
        const auto spread = [&, smoothing = broadcast(static_cast<acc_t>(terms.smoothing))](
                                Lanes<acc_t> lanes, Vector<acc_t> scale) {
            Vector<acc_t> result = load(exponentials + lanes.begin) * scale;
            if (terms.smoothing != 0) result -= load_class_weights(lanes) * smoothing;
            return result;
        };
        const double ratio = terms.mass / row.sum;
        const acc_t scale = static_cast<acc_t>(terms.unit * ratio);
        if (row.counts != nullptr) {
            write_counted_gradient(row, spread, terms, broadcast(static_cast<acc_t>(ratio)));
        } else if (is_plain_ && std::isnormal(scale) && std::isfinite(row.sum)) {
            subtract_targets(row, exponentials, terms.target, ratio);
            gradient_.write_numbers(row.slot, exponentials, scale);
        } else {
            for_each_vector<acc_t>(params_.num_classes, [&, scale = broadcast(scale)](Lanes<acc_t> lanes) {
                store(exponentials + lanes.begin, spread(lanes, scale));
            });
            subtract_targets(row, exponentials, terms.unit * terms.target, /*divisor=*/1);
            gradient_.write(row.slot, [&](Lanes<acc_t> lanes) { return load(exponentials + lanes.begin); });
        }
    }

    template <typename Spread>
    void write_counted_gradient(const Row& row, const Spread& spread, const RowGradient& terms,
                                Vector<acc_t> ratio) {
        const Vector<acc_t> target = broadcast(static_cast<acc_t>(terms.target));
        const Vector<acc_t> unit = broadcast(static_cast<acc_t>(terms.unit));
        gradient_.write(row.slot, [&](Lanes<acc_t> lanes) {
            const Vector<acc_t> counts = load_counts(row, lanes);
            return (spread(lanes, ratio) - weigh(counts, lanes) * target) * unit;
        });
    }

    // target_part / divisor: what a pair of class weight 1 subtracts at its target.
    void subtract_targets(const Row& row, acc_t* row_gradient, double target_part, double divisor) {
        if (grad_losses_ != nullptr) {
            for_each_target(row, [&](int64_t k, int64_t target) {
                const double g = grad_losses_[params_.pairs->pair_indices[k]];
                row_gradient[target] -= static_cast<acc_t>(target_part * g * weight_of(target) / divisor);
            });
            return;
        }
        // Equal pairs are counted first: sums of integers are exact in any order.
        int32_t* const counts = target_counts_;
        for_each_target(row, [&](int64_t, int64_t target) { ++counts[target]; });
        for_each_target(row, [&](int64_t, int64_t target) {
            const int32_t count = std::exchange(counts[target], 0);
            if (count > 0)
                row_gradient[target] -= static_cast<acc_t>(target_part * count * weight_of(target) / divisor);
        });
    }

    void clear_counts(const Row& row) const {
        if (row.counts == nullptr) return;
        for (int64_t k = 0; k < params_.pairs->stride; k += kLanes<int32_t>) {
            store(row.counts + k, Vector<int32_t>{});
        }
    }

    static constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
    // Any value close to the maximum can shift the exponents of a long row: the maximum of this many logits
    // saves a pass.
    static constexpr int64_t kFirstPart = 1 << 11;
    // Vectors that are exponentiated together. Of more than two cache lines, prefetches and non-temporal
    // stores come in bursts, which take a sixth longer at V=8192.
    static constexpr int64_t kTogether = BIGRAMX_VECTOR_BYTES == 64 ? 2 : 4;

    const EmbeddingCrossEntropyKernelParams& params_;
    Gradient& gradient_;
    const acc_t* class_weight_;
    const acc_t* grad_losses_;
    acc_t* exponentials_;     // (rows_of_scratch, padded C)
    int32_t* target_counts_;  // (C), all zero between rows
    const bool is_plain_;     // cross entropy alone, with equal weights for all pairs
    const int64_t rows_of_scratch_;
    int64_t next_scratch_ = 0;
    Row rows_[kMaxRowsAtOnce];
    Vector<acc_t> partial_[kMaxRowsAtOnce] = {};
    Vector<acc_t> target_logits_[kMaxRowsAtOnce];  // by lane, where the pairs are counted
    int64_t num_rows_ = 0;
};

template <typename scalar_t>
LossSums rows_kernel(const EmbeddingCrossEntropyKernelParams& params, const LossScratch& scratch,
                     int64_t begin, int64_t end) {
    GradientInMemory<scalar_t> gradient(params);
    RowKernel<scalar_t, GradientInMemory<scalar_t>> kernel(params, scratch, gradient);
    const int64_t step = rows_at_once(params.num_classes);
    LossSums sums;
    for (int64_t slot = begin; slot < end; slot += step)
        kernel.process(slot, std::min(end, slot + step), sums);
    gradient.finish();
    return sums;
}

// to (N, C) = the rows idx[n] of the table.
inline void gather_kernel(const GatherParams& params, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        copy_row(params.to + n * params.row_bytes, params.table + params.idx[n] * params.stride_bytes,
                 params.row_bytes);
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
