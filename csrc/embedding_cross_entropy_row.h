// The formulas of a row of the table, for host and device: the losses of the pairs that start in it, and its
// gradient.
//
// For a row W of C logits, pairs n with targets y_n, class weights c, label smoothing e and z-loss z:
//
//     lse    = max + log(sum),    sum = sum_j e^(W_j - max)
//     loss_n = (1 - e) c[y_n] (lse - W[y_n]) + e/C sum_j c_j (lse - W_j) + z lse^2
//
// With g_n the gradient of loss_n, before the scale of the reduction, and s_j the sum of g_n over the pairs
// with target j:
//
//     dW_j = unit (mass / sum * e^(W_j - max) - c_j (smoothing + target s_j))
//
// where unit mass is the total that the pairs put on the softmax of the row.
#pragma once

#include "base/host_device.h"

namespace bigramx {

struct RowLossOptions {
    double label_smoothing;
    double smoothing_of_class;  // label_smoothing / C
    double z_loss;
};

// The scales of the reduction, the same for all rows; known once the pairs are counted.
struct LossScales {
    double loss;              // 1 (sum), or 1 / the sum of the class weights of the targets (mean)
    double z_loss;            // 1 (sum), or 1 / the number of pairs (mean)
    double class_weight_sum;  // over all classes
};

// Sums over the pairs of a row that are not ignored.
struct PairSums {
    double gradients = 0;  // of g
    double weighted = 0;   // of g class_weight[target]
};

BIGRAMX_HOST_DEVICE PairSums operator+(const PairSums& a, const PairSums& b) {
    return {a.gradients + b.gradients, a.weighted + b.weighted};
}

// Sums over the pairs of some rows, before the scale of the reduction.
struct LossSums {
    double targets = 0, smoothing = 0, z_loss = 0;
};

BIGRAMX_HOST_DEVICE LossSums operator+(const LossSums& a, const LossSums& b) {
    return {a.targets + b.targets, a.smoothing + b.smoothing, a.z_loss + b.z_loss};
}

BIGRAMX_HOST_DEVICE double reduced_loss(const LossSums& sums, const LossScales& scales) {
    // The scale is infinite where the class weights of the targets sum to 0.
    const double smoothing = sums.smoothing != 0 ? sums.smoothing * scales.loss : 0;
    return sums.targets * scales.loss + smoothing + sums.z_loss * scales.z_loss;
}

BIGRAMX_HOST_DEVICE double z_loss_of_row(const RowLossOptions& options, double lse) {
    return options.z_loss * lse * lse;
}

// class_losses: sum_j c_j (lse - W_j).
BIGRAMX_HOST_DEVICE double smoothing_loss_of_row(const RowLossOptions& options, double class_losses) {
    return options.smoothing_of_class * class_losses;
}

// target_losses: the sum of g_n c[y_n] (lse - W[y_n]).
BIGRAMX_HOST_DEVICE LossSums loss_of_row(const RowLossOptions& options, const PairSums& pairs,
                                         double target_losses, double smoothing_loss, double z_loss) {
    LossSums sums;
    sums.z_loss = pairs.gradients * z_loss;
    sums.targets = (1 - options.label_smoothing) * target_losses;
    if (options.label_smoothing > 0) sums.smoothing = pairs.gradients * smoothing_loss;
    return sums;
}

// shared: what all pairs of the row have in common, label smoothing and z-loss. target_logit: W[y_n] - max.
BIGRAMX_HOST_DEVICE double loss_of_pair(const RowLossOptions& options, double shared, double class_weight,
                                        double log_sum, double target_logit) {
    return shared + (1 - options.label_smoothing) * class_weight * (log_sum - target_logit);
}

// In units of what a pair of class weight 1 takes from its target, so that an element whose softmax is 1 is 0
// as in PyTorch, not a rounding of the scale that AdamW would make a step of. But with a z-loss, whose
// product may then overflow, or label smoothing, the unit is 1.
struct RowGradient {
    double unit;
    double mass;
    double smoothing;
    double target;  // what a pair of class weight 1 and gradient 1 takes from its target
};

BIGRAMX_HOST_DEVICE RowGradient gradient_of_row(const RowLossOptions& options, const LossScales& scales,
                                                const PairSums& pairs, double lse) {
    constexpr double kLeast = 0x1p-126, kMost = 0x1p+127;  // whose float is normal
    const bool is_plain = options.z_loss == 0 && options.label_smoothing == 0;
    const double size = scales.loss < 0 ? -scales.loss : scales.loss;  // of a loss that is maximised
    if (is_plain && size >= kLeast && size <= kMost) return {scales.loss, pairs.weighted, 0, 1};
    const double smoothing = options.smoothing_of_class * pairs.gradients * scales.loss;
    double mass = (1 - options.label_smoothing) * pairs.weighted * scales.loss;
    // In the order of PyTorch: other products of a large z_loss may overflow. Without z_loss 0 would meet
    // what may be infinite, 2 lse or the scale.
    if (options.z_loss != 0) mass += pairs.gradients * scales.z_loss * options.z_loss * (2 * lse);
    // Without label smoothing the weight of a class that does not occur is no number to multiply by 0.
    if (options.label_smoothing > 0) mass += smoothing * scales.class_weight_sum;
    const double target = (1 - options.label_smoothing) * scales.loss;
    return {1, mass, smoothing, target};
}

}  // namespace bigramx
