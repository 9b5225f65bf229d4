// A bigram model that is sparse: p(j | i) = pair_probs[i, j] + backoff[i] * unigram[j], where pair_probs is
// 0 for the pairs that were not seen. The probabilities of pairs, and chains of tokens.
//
// CPU only: it is for vocabularies whose tables of logits have no room. On a GPU PyTorch's own ops, of which
// bigramx.reference consists, find the pairs.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "generate.h"

namespace bigramx {

// Contiguous. The kernels check what the indices hold.
struct InterpolatedBigramParams {
    at::Tensor crow_indices;  // (V + 1) int64, as those of a CSR tensor
    at::Tensor col_indices;   // (nnz) int32, ascending within a row
    at::Tensor pair_probs;    // (nnz) float32 or float64
    at::Tensor backoff;       // (V), the same dtype
    at::Tensor unigram;       // (V), the same dtype

    int64_t vocab_size() const { return unigram.size(0); }
    int64_t num_pairs() const { return col_indices.size(0); }
};

// idx, targets: (N) int64, contiguous. Fills probs, (N) float64, and is_seen, (N) bool.
void interpolated_bigram_cpu(const InterpolatedBigramParams& params, const at::Tensor& idx,
                             const at::Tensor& targets, const at::Tensor& probs, const at::Tensor& is_seen);

// As generate_cpu, by the sampler "philox". Of `options`, weight is undefined.
int64_t interpolated_bigram_generate_cpu(const InterpolatedBigramParams& params,
                                         const GenerateParams& options, const at::Tensor& tokens);

// The ops.
std::tuple<at::Tensor, at::Tensor> interpolated_bigram(const at::Tensor& idx, const at::Tensor& targets,
                                                       const at::Tensor& crow_indices,
                                                       const at::Tensor& col_indices,
                                                       const at::Tensor& pair_probs,
                                                       const at::Tensor& backoff, const at::Tensor& unigram);
at::Tensor interpolated_bigram_generate(const at::Tensor& idx, const at::Tensor& crow_indices,
                                        const at::Tensor& col_indices, const at::Tensor& pair_probs,
                                        const at::Tensor& backoff, const at::Tensor& unigram,
                                        int64_t max_new_tokens, double temperature,
                                        std::optional<int64_t> top_k, std::optional<double> top_p,
                                        std::optional<double> min_p, at::IntArrayRef stop,
                                        const std::optional<at::Generator>& generator);

}  // namespace bigramx
