// Random blocks of a text, and the token that follows each of theirs, drawn as in the lecture's get_batch.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace bigramx {

struct GetBatchParams {
    at::Tensor tokens;   // (N) uint8, uint16, uint32, int32 or int64, N > T
    int64_t batch_size;  // B
    int64_t block_size;  // T
    std::optional<at::Generator> generator;

    // A block may begin at 0 <= offset < num_offsets.
    int64_t num_offsets() const { return tokens.size(0) - block_size; }
};

// Raises if the parameters are not as above.
void check_batch(const char* op, const GetBatchParams& params);

// Into idx and targets, (B, T) int64 each, contiguous.
void get_batch_cpu(const GetBatchParams& params, const at::Tensor& idx, const at::Tensor& targets);

// Without a generator, or with one on the CPU, the batches are those of get_batch_cpu. A generator on the GPU
// draws others, anew at each replay of a captured graph.
void get_batch_cuda(const GetBatchParams& params, const at::Tensor& idx, const at::Tensor& targets);

// The op.
std::tuple<at::Tensor, at::Tensor> get_batch(const at::Tensor& tokens, int64_t batch_size, int64_t block_size,
                                             const std::optional<at::Generator>& generator);

}  // namespace bigramx
