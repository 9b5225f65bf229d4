// One row of the table at a time: its logsumexp, the losses of the pairs that start in it, its gradient.
// Compiled once for each CPU capability (for_each_capability.h); hence no include guard.

namespace bigramx::BIGRAMX_CAPABILITY {

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

    LossSums process(int64_t slot) {
        const int64_t row = job_.rows != nullptr ? job_.rows[slot] : slot;
        weight_ = static_cast<const scalar_t*>(job_.weight) + row * job_.row_stride;
        begin_ = job_.row_begin[row];
        end_ = job_.row_begin[row + 1];
        scalar_t* gradient = job_.gradient != nullptr
                                 ? static_cast<scalar_t*>(job_.gradient) + slot * job_.num_classes
                                 : nullptr;

        LossSums sums;
        if (begin_ < end_) {
            exponentiate();
            if (job_.want_loss) sums = losses();
            if (job_.logits != nullptr) copy_logits();
        }
        if (gradient != nullptr) write_gradient(row, gradient);
        return sums;
    }

  private:
    // Leaves e^(W[i, j] - max) in `exponentials_`, and the row's lse.
    void exponentiate() {
        constexpr T lowest = -std::numeric_limits<T>::infinity();
        Vector<T> largest = broadcast(lowest);
        for_each_vector<T>(job_.num_classes,
                           [&](Lanes<T> lanes) { largest = max(largest, lanes.load(weight_, lowest)); });
        const T row_max = horizontal_max<T>(largest);

        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> e = exp(lanes.load(weight_, lowest) - broadcast(row_max));
            store(exponentials_ + lanes.begin, e);
            sums += e;  // beyond the tail: e^(-inf) = 0
        });
        sum_ = horizontal_sum<T>(sums);
        lse_ = row_max + std::log(static_cast<double>(sum_));
    }

    double weight_of(int64_t target) const { return class_weight_ != nullptr ? class_weight_[target] : 1.0; }

    // sum_c class_weight[c] * (lse - W[i, c]): what label smoothing spreads over the classes.
    double smooth_loss() const {
        const Vector<T> lse = broadcast(static_cast<T>(lse_));
        Vector<T> sums = broadcast(T(0));
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            const Vector<T> surprise = lse - lanes.load(weight_, static_cast<T>(lse_));
            sums += class_weight_ != nullptr ? surprise * lanes.load(class_weight_, T(0)) : surprise;
        });
        return horizontal_sum<T>(sums);
    }

    LossSums losses() {
        const double epsilon = job_.label_smoothing;
        const double smooth = epsilon > 0 ? epsilon / job_.num_classes * smooth_loss() : 0.0;
        const double z_loss = job_.z_loss * lse_ * lse_;
        LossSums sums;
        for (int64_t k = begin_; k < end_; ++k) {
            const int64_t n = job_.order[k];
            const int64_t target = job_.targets[n];
            if (target == job_.ignore_index) {
                if (job_.losses != nullptr) static_cast<scalar_t*>(job_.losses)[n] = 0;
                continue;
            }
            const double surprise = lse_ - static_cast<double>(weight_[target]);
            double loss = smooth;
            if (epsilon < 1) loss += (1 - epsilon) * weight_of(target) * surprise;
            sums.cross_entropy += loss;
            sums.z_loss += z_loss;
            if (job_.losses != nullptr)
                static_cast<scalar_t*>(job_.losses)[n] = static_cast<scalar_t>(static_cast<T>(loss + z_loss));
        }
        return sums;
    }

    void copy_logits() const {
        for (int64_t k = begin_; k < end_; ++k) {
            std::copy(weight_, weight_ + job_.num_classes,
                      static_cast<scalar_t*>(job_.logits) + job_.order[k] * job_.num_classes);
        }
    }

    // The sums over the pairs of this row of the gradients that reach them.
    struct PairSums {
        double plain = 0, weighted = 0, z_loss = 0;
        bool any = false;
    };

    PairSums sum_pairs() const {
        PairSums sums;
        for (int64_t k = begin_; k < end_; ++k) {
            const int64_t n = job_.order[k];
            const int64_t target = job_.targets[n];
            if (target == job_.ignore_index) continue;
            const double g = grad_losses_ != nullptr ? grad_losses_[n] : 1.0;
            sums.any = true;
            sums.plain += g;
            sums.weighted += g * weight_of(target);
        }
        sums.z_loss = sums.plain * job_.z_loss_scale;
        sums.plain *= job_.loss_scale;
        sums.weighted *= job_.loss_scale;
        return sums;
    }

    // dW[i, j] = scale * e^(W[i, j] - max) - smooth * class_weight[j] - (what falls on j as a target)
    void write_gradient(int64_t row, scalar_t* gradient) {
        const PairSums pairs = row == job_.padding_idx ? PairSums() : sum_pairs();
        if (!pairs.any) {
            std::fill(gradient, gradient + job_.num_classes, scalar_t(0));
            return;
        }
        const double epsilon = job_.label_smoothing;
        const double smooth = epsilon / job_.num_classes * pairs.plain;
        const double mass = (1 - epsilon) * pairs.weighted + smooth * job_.class_weight_sum +
                            2 * job_.z_loss * lse_ * pairs.z_loss;
        const Vector<T> scale = broadcast(static_cast<T>(mass / sum_));

        T* row_gradient = exponentials_;
        if constexpr (std::is_same_v<scalar_t, T>) row_gradient = gradient;
        for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
            Vector<T> result = load(exponentials_ + lanes.begin) * scale;
            if (smooth != 0) {
                const Vector<T> class_weight =
                    class_weight_ != nullptr ? lanes.load(class_weight_, T(0)) : broadcast(T(1));
                result -= class_weight * broadcast(static_cast<T>(smooth));
            }
            if constexpr (std::is_same_v<scalar_t, T>) {
                lanes.store(gradient, result);
            } else {
                store(exponentials_ + lanes.begin, result);
            }
        });
        subtract_targets(row_gradient);
        if constexpr (!std::is_same_v<scalar_t, T>) {
            for_each_vector<T>(job_.num_classes, [&](Lanes<T> lanes) {
                lanes.store(gradient, load(exponentials_ + lanes.begin));
            });
        }
    }

    void subtract_targets(T* row_gradient) {
        const double unit = (1 - job_.label_smoothing) * job_.loss_scale;
        if (grad_losses_ != nullptr) {
            for_each_target([&](int64_t n, int64_t target) {
                row_gradient[target] -= static_cast<T>(unit * grad_losses_[n] * weight_of(target));
            });
            return;
        }
        // All pairs weigh the same, so equal ones are counted first: integers, exact in any order.
        for_each_target([&](int64_t, int64_t target) { ++target_counts_[target]; });
        for_each_target([&](int64_t, int64_t target) {
            const double count = static_cast<double>(target_counts_[target]);
            if (count == 0) return;
            row_gradient[target] -= static_cast<T>(unit * count * weight_of(target));
            target_counts_[target] = 0;
        });
    }

    template <typename Visit>
    void for_each_target(const Visit& visit) const {
        for (int64_t k = begin_; k < end_; ++k) {
            const int64_t n = job_.order[k];
            if (job_.targets[n] != job_.ignore_index) visit(n, job_.targets[n]);
        }
    }

    const LossJob& job_;
    const T* class_weight_;
    const T* grad_losses_;
    T* exponentials_;  // (C), padded to whole vectors: a partial store could not be forwarded to the next
                       // load
    int32_t* target_counts_;  // (C), all zero between rows

    const scalar_t* weight_ = nullptr;  // the row
    int64_t begin_ = 0, end_ = 0;       // its pairs, in `order`
    T sum_ = 0;                         // sum_j e^(W[i, j] - max)
    double lse_ = 0;
};

template <typename scalar_t>
LossSums process_rows(const LossJob& job, const LossScratch& scratch, int64_t begin, int64_t end) {
    RowKernel<scalar_t> kernel(job, scratch);
    LossSums sums;
    for (int64_t slot = begin; slot < end; ++slot) sums += kernel.process(slot);
    return sums;
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
