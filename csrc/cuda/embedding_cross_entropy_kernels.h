// Embedding lookup and cross entropy in one, on the GPU, and the gradient of the table.
#pragma once

#include "cuda/base/types.h"

namespace bigramx::cuda {

// All pointers are to device memory. scalar_t: `type`; acc_t: float, or double for float64.
struct EmbeddingCrossEntropyKernelParams {
    FloatType type;
    const void* weight;  // (R, C) of scalar_t, unit stride along a row
    int64_t row_stride;
    int64_t num_rows, num_classes;
    const int64_t* idx;      // (N)
    const int64_t* targets;  // (N)
    int64_t num_pairs;
    const void* class_weight;  // (C) of acc_t, or null: all ones

    int64_t ignore_index;
    bool is_mean;     // of the reduction
    bool is_reduced;  // false: the losses of the pairs
    double label_smoothing, z_loss;
    int64_t padding_idx;  // -1: none

    // Outputs, each null where it is not wanted.
    void* loss;             // () of acc_t, or (N) where it is not reduced
    const void* grad_loss;  // the shape of loss; null: ones
    void* gradient;         // (R, C) of scalar_t; sparse: (min(N, R), C)
    int64_t* grad_rows;     // (min(N, R)); not null: the gradient is sparse
    void* logits;           // (N, C) of scalar_t: weight[idx]; null unless can_copy_logits
    bool unless_one;        // leave the gradient as it is where *grad_loss is 1
};

// Whether the launch can write the logits without taking much longer: for the smallest batches.
bool can_copy_logits(const EmbeddingCrossEntropyKernelParams& params);

// The scratch memory that the launch needs, in bytes.
int64_t embedding_cross_entropy_scratch_bytes(const EmbeddingCrossEntropyKernelParams& params);

void launch_embedding_cross_entropy(const EmbeddingCrossEntropyKernelParams& params, void* scratch,
                                    cudaStream_t stream);

// gradient (size), of `type`, *= *grad_loss, of its acc_t. Zeros stay zero, whatever the factor.
void launch_scale_gradient(FloatType type, void* gradient, int64_t size, const void* grad_loss,
                           cudaStream_t stream);

}  // namespace bigramx::cuda
