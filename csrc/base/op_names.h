// The names of the ops, as in their schemas and at the beginning of their messages. Includes no PyTorch.
#pragma once

namespace bigramx {

constexpr const char* kAdamW = "adamw_";
constexpr const char* kCountBigrams = "count_bigrams";
constexpr const char* kDeferredAdamW = "deferred_adamw_";
constexpr const char* kEmbeddingCrossEntropy = "embedding_cross_entropy";
constexpr const char* kFit = "fit_";
constexpr const char* kGenerate = "generate";
constexpr const char* kGetBatch = "get_batch";
constexpr const char* kInterpolatedBigram = "interpolated_bigram";
constexpr const char* kInterpolatedBigramGenerate = "interpolated_bigram_generate";
constexpr const char* kMultinomial = "multinomial";

}  // namespace bigramx
