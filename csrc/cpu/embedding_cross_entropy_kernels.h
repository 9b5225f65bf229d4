// Rows of the table: their logsumexp, the losses of the pairs that start in them, their gradients.
// Compiled once for each CPU capability (for_each_capability.h); hence no include guard.

namespace bigramx::BIGRAMX_CAPABILITY {

// Works on a few short rows at a time, one step for all of them before the next step: the steps of one row
// wait for each other, those of different rows overlap. Together the rows stay in the first-level cache; a
// long row goes alone.
template <typename scalar_t>
class RowKernel {
  public:
    using T = Accumulator<scalar_t>;

    RowKernel(const LossJob& job, const LossScratch& scratch)
        : job_(job),
          class_weight_(static_cast<const T*>(job.class_weight)),
          grad_losses_(static_cast<const T*>(job.grad_losses)),
          exponentials_(static_cast<T*>(scratch.exponentials)),
          target_counts_(scratch.target_counts) {}

    LossSums process(int64_t begin, int64_t end) {
        num_rows_ = 0;
        for (int64_t slot = begin; slot < end; ++slot) add_row(slot);
        for_each_row([&](Row& row) { find_max(row); });
        for_each_row([&](Row& row) { exponentiate(row); });
        for_each_row([&](Row& row) { row.lse = row.max + std::log(static_cast<double>(row.sum)); });
        LossSums sums;
        if (job_.want_loss) for_each_row([&](Row& row) { sums += losses(row); });
        if (job_.gradient != nullptr) for_each_row([&](Row& row) { write_gradient(row); });
        return sums;
    }

  private:
    struct Row {
        int64_t number;          // in the table
        const scalar_t* weight;  // (C)
        scalar_t* gradient;      // (C), or null
        int64_t begin, end;      // its pairs, in `order`
        const int32_t* counts;   // (padded C): of its pairs by target; or null
        T* exponentials;         // (C): e^(W[i, j] - max)
        T max, sum;              // of W[i, :], of the exponentials
        double lse;
    };

    // A row without pairs has no losses, and its gradient is zero.
    void add_row(int64_t slot) {
        const int64_t number = job_.rows != nullptr ? job_.rows[slot] : slot;
        scalar_t* gradient = job_.gradient != nullptr
                                 ? static_cast<scalar_t*>(job_.gradient) + slot * job_.num_classes
                                 : nullptr;
        const int64_t begin = job_.row_begin[number], end = job_.row_begin[number + 1];
        if (begin == end) {
            if (gradient != nullptr) std::fill(gradient, gradient + job_.num_classes, scalar_t(0));
            return;
        }
        Row& row = rows_[num_rows_];
        row.number = number;
        row.weight = static_cast<const scalar_t*>(job_.weight) + number * job_.row_stride;
        row.gradient = gradient;
        row.counts =
            job_.pair_counts != nullptr ? job_.pair_counts + number * padded(job_.num_classes) : nullptr;
        row.begin = begin;
        row.end = end;
        row.exponentials = exponentials_ + num_rows_ * padded(job_.num_classes);
        ++num_rows_;
    }

    template <typename Visit>
    void for_each_row(const Visit& visit) {
        for (int64_t k = 0; k < num_rows_; ++k) visit(rows_[k]);
    }

    template <typename Visit>
    void for_each_target(const Row& row, const Visit& visit) const {
        for (int64_t k = row.begin; k < row.end; ++k) {
            const int64_t n = job_.order[k];
            if (job_.targets[n] != job_.ignore_index) visit(n, job_.targets[n]);
        }
    }

    void find_max(Row& row) const {
        Vector<T> largest = broadcast(kLowest);
        for_each_vector<T>(job_.num_classes,
                           [&](Lanes<T> lanes) { largest = max(largest, lanes.load(row.weight, kLowest)); });
        row.max = horizontal_max<T>(largest);
    }

    void exponentiate(Row& row) const {
        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> e = exp(lanes.load(row.weight, kLowest) - broadcast(row.max));
            store(row.exponentials + lanes.begin, e);
            sums += e;  // beyond the tail: e^(-inf) = 0
        });
        row.sum = horizontal_sum<T>(sums);
    }

    double weight_of(int64_t target) const { return class_weight_ != nullptr ? class_weight_[target] : 1.0; }

    // sum_c class_weight[c] * (lse - W[i, c]): what label smoothing spreads over the classes.
    double smooth_loss(const Row& row) const {
        const Vector<T> lse = broadcast(static_cast<T>(row.lse));
        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> surprise = lse - lanes.load(row.weight, static_cast<T>(row.lse));
            sums += load_class_weights(lanes) * surprise;
        });
        return horizontal_sum<T>(sums);
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

    LossSums losses(const Row& row) const {
        return row.counts != nullptr ? counted_losses(row) : listed_losses(row);
    }

    LossSums counted_losses(const Row& row) const {
        const double epsilon = job_.label_smoothing;
        const Vector<T> lse = broadcast(static_cast<T>(row.lse)), none = broadcast(T(0));
        Vector<T> pairs = none, surprises = none;
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> counts = load_counts(row, lanes);
            const Vector<T> surprise =
                counts * load_class_weights(lanes) * (lse - lanes.load(row.weight, static_cast<T>(row.lse)));
            pairs += counts;
            surprises += counts > none ? surprise : none;  // 0 times an infinity is none
        });
        const double num_pairs = horizontal_sum<T>(pairs);
        if (num_pairs == 0) return {};
        LossSums sums;
        if (epsilon < 1) sums.cross_entropy += (1 - epsilon) * horizontal_sum<T>(surprises);
        if (epsilon > 0) sums.cross_entropy += num_pairs * epsilon / job_.num_classes * smooth_loss(row);
        sums.z_loss = num_pairs * job_.z_loss * row.lse * row.lse;
        return sums;
    }

    LossSums listed_losses(const Row& row) const {
        const double epsilon = job_.label_smoothing;
        const double smooth = epsilon > 0 ? epsilon / job_.num_classes * smooth_loss(row) : 0.0;
        const double z_loss = job_.z_loss * row.lse * row.lse;
        scalar_t* losses = static_cast<scalar_t*>(job_.losses);
        if (losses != nullptr) {
            for (int64_t k = row.begin; k < row.end; ++k) losses[job_.order[k]] = 0;
        }
        LossSums sums;
        for_each_target(row, [&](int64_t n, int64_t target) {
            double loss = smooth;
            if (epsilon < 1) {
                loss +=
                    (1 - epsilon) * weight_of(target) * (row.lse - static_cast<double>(row.weight[target]));
            }
            sums.cross_entropy += loss;
            sums.z_loss += z_loss;
            if (losses != nullptr) losses[n] = static_cast<scalar_t>(static_cast<T>(loss + z_loss));
        });
        return sums;
    }

    // The sums over the pairs of a row of the gradients that reach them.
    struct PairSums {
        double plain = 0, weighted = 0, z_loss = 0;
        bool any = false;
    };

    PairSums sum_pairs(const Row& row) const {
        PairSums sums;
        if (row.counts != nullptr) {
            Vector<T> plain = broadcast(T(0)), weighted = plain;
            for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
                const Vector<T> counts = load_counts(row, lanes);
                plain += counts;
                weighted += counts * load_class_weights(lanes);
            });
            sums.plain = horizontal_sum<T>(plain);
            sums.weighted = horizontal_sum<T>(weighted);
            sums.any = sums.plain > 0;
        } else {
            for_each_target(row, [&](int64_t n, int64_t target) {
                const double g = grad_losses_ != nullptr ? grad_losses_[n] : 1.0;
                sums.any = true;
                sums.plain += g;
                sums.weighted += g * weight_of(target);
            });
        }
        sums.z_loss = sums.plain * job_.z_loss_scale;
        sums.plain *= job_.loss_scale;
        sums.weighted *= job_.loss_scale;
        return sums;
    }

    // dW[i, j] = scale * e^(W[i, j] - max) - smooth * class_weight[j] - (what falls on j as a target)
    void write_gradient(Row& row) {
        const PairSums pairs = row.number == job_.padding_idx ? PairSums() : sum_pairs(row);
        if (!pairs.any) {
            std::fill(row.gradient, row.gradient + job_.num_classes, scalar_t(0));
            return;
        }
        const double epsilon = job_.label_smoothing;
        const double smooth = epsilon / job_.num_classes * pairs.plain;
        const double mass = (1 - epsilon) * pairs.weighted + smooth * job_.class_weight_sum +
                            2 * job_.z_loss * row.lse * pairs.z_loss;
        const Vector<T> scale = broadcast(static_cast<T>(mass / row.sum));
        const Vector<T> smooth_part = broadcast(static_cast<T>(smooth));
        const Vector<T> target_part = broadcast(static_cast<T>(target_unit()));

        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            Vector<T> result = load(row.exponentials + lanes.begin) * scale;
            if (smooth != 0) result -= load_class_weights(lanes) * smooth_part;
            if (row.counts != nullptr) {
                result -= load_counts(row, lanes) * load_class_weights(lanes) * target_part;
            }
            if constexpr (kInPlace) {
                lanes.store(row.gradient, result);
            } else {
                store(row.exponentials + lanes.begin, result);
            }
        });
        if constexpr (kInPlace) {
            subtract_targets(row, row.gradient);
        } else {
            subtract_targets(row, row.exponentials);
            for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
                lanes.store(row.gradient, load(row.exponentials + lanes.begin));
            });
        }
    }

    // What a pair of class weight 1 takes from its target.
    double target_unit() const { return (1 - job_.label_smoothing) * job_.loss_scale; }

    void subtract_targets(const Row& row, T* row_gradient) {
        if (row.counts != nullptr) return;  // done
        const double unit = target_unit();
        if (grad_losses_ != nullptr) {
            for_each_target(row, [&](int64_t n, int64_t target) {
                row_gradient[target] -= static_cast<T>(unit * grad_losses_[n] * weight_of(target));
            });
            return;
        }
        // All pairs weigh the same, so equal ones are counted first: integers, exact in any order.
        for_each_target(row, [&](int64_t, int64_t target) { ++target_counts_[target]; });
        for_each_target(row, [&](int64_t, int64_t target) {
            const double count = static_cast<double>(target_counts_[target]);
            if (count == 0) return;
            row_gradient[target] -= static_cast<T>(unit * count * weight_of(target));
            target_counts_[target] = 0;
        });
    }

    static constexpr T kLowest = -std::numeric_limits<T>::infinity();
    static constexpr bool kInPlace = std::is_same_v<scalar_t, T>;  // the gradient holds what is accumulated

    const LossJob& job_;
    const T* class_weight_;
    const T* grad_losses_;
    T* exponentials_;         // (rows, padded C)
    int32_t* target_counts_;  // (C), all zero between rows
    Row rows_[kMaxRowsAtOnce];
    int64_t num_rows_ = 0;
};

template <typename scalar_t>
LossSums process_rows(const LossJob& job, const LossScratch& scratch, int64_t begin, int64_t end) {
    RowKernel<scalar_t> kernel(job, scratch);
    const int64_t step = rows_at_once(job.num_classes);
    LossSums sums;
    for (int64_t slot = begin; slot < end; slot += step)
        sums += kernel.process(slot, std::min(end, slot + step));
    return sums;
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
