// Random blocks of a text and what follows each of their tokens: the draws of the lecture's get_batch.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace bigramx {

struct BatchShape {
    int64_t batch_size;  // B
    int64_t block_size;  // T
};

// Raises where tokens is not 1-D, of another dtype than uint8, uint16, int32 or int64, or too short for one
// block.
void check_batch(const char* op, const at::Tensor& tokens, const BatchShape& shape);

// Into idx and targets, (B, T) int64 each, contiguous.
void get_batch_cpu(const at::Tensor& tokens, const BatchShape& shape,
                   const std::optional<at::Generator>& generator, const at::Tensor& idx,
                   const at::Tensor& targets);

#if defined(BIGRAMX_CUDA)
// Without a generator, or by one on the CPU, the batches that get_batch_cpu draws; by one on the GPU others,
// which a captured graph draws anew at each replay.
void get_batch_cuda(const at::Tensor& tokens, const BatchShape& shape,
                    const std::optional<at::Generator>& generator, const at::Tensor& idx,
                    const at::Tensor& targets);
#endif

}  // namespace bigramx
