// Chains of tokens on the GPU, parallel over time: segments, warm-up, boundaries and repair as in
// cpu/generate_chains.h.
//
// For many draws the rows of the table become fixed-point CDFs first, and one thread follows a chain. For few
// draws one block follows a chain, and reads a row of logits at each step.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "cuda/base/types.h"
#include "sampling/token_filter.h"

namespace bigramx::cuda {

// tokens: (B, num_steps), rows `stride` apart; the token before the first of each chain is the last of its
// prompt.
struct ChainsParams {
    int64_t* tokens;
    int64_t num_chains, num_steps, stride;
    Seed seed;

    // Each chain is cut into num_segments; the arrays are used where these are more than one.
    int64_t num_segments, steps_a_segment;
    uint32_t* entries;      // (B, segments): the token before the first of each
    uint32_t* exits;        // (B, segments): the last of each, before any is repaired
    unsigned* uncoalesced;  // (B), 0 before: whether a repaired segment has failed to coalesce
};

// What the filters keep of the rows that were met. A block that meets a row for the first time finds it.
struct FilteredRows {
    static constexpr int64_t kKeptBytes = 16;  // of KeptTokens, in any dtype

    void* kept;        // (V) KeptTokens
    unsigned* states;  // (V), 0 before
};

// logits: (V, V), rows `stride` apart.
struct LogitsParams {
    FloatType type;
    const void* logits;
    int64_t vocab_size, stride;
    double temperature;  // divides the logits

    bool is_filtered = false;
    TokenFilter filter = {};
    FilteredRows filtered = {};

    // (1 + V), 0 before: whether any row of the table that was met is not a distribution; then for each row
    // whether it is not. Such a row draws token 0.
    unsigned* invalid = nullptr;
};

// The tokens at which a chain ends.
struct StopTokens {
    int64_t one;
    const int8_t* several;  // (V): whether it is one of them; or null

    BIGRAMX_HOST_DEVICE bool contains(int64_t token) const {
        return several == nullptr ? token == one : several[token] != 0;
    }
};

enum class Granularity { thread, block };

// Sets how the chains are cut: into one segment each where the chains alone fill the GPU.
void cut_chains(Granularity granularity, ChainsParams* params);

// idx (B, T) -> tokens (B, T), rows `stride` apart. A token out of range fails an assertion.
void launch_copy_prompt(const int64_t* idx, int64_t num_sequences, int64_t prompt_length, int64_t vocab_size,
                        int64_t* tokens, int64_t stride, cudaStream_t stream);

// cdf: (V, V).
void launch_write_cdf(const LogitsParams& table, uint64_t* cdf, cudaStream_t stream);

// cdf: (V, V).
void launch_chains_by_cdf(const ChainsParams& params, const uint64_t* cdf, int64_t vocab_size,
                          cudaStream_t stream);

void launch_chains_by_logits(const ChainsParams& params, const LogitsParams& table, cudaStream_t stream);

// argmax: (V), of each row. The chains are not cut.
void launch_chains_by_argmax(const ChainsParams& params, const int64_t* argmax, cudaStream_t stream);

// lengths: (B), num_steps before. Becomes the number of steps up to and including the first stop token, with
// which the rest of the chain is filled.
void launch_stop_chains(const ChainsParams& params, const StopTokens& stop, int64_t* lengths,
                        cudaStream_t stream);

// Fails an assertion if a chain has drawn from a row that is not a distribution. Rows that segments met
// during their warm-up only do not count. lengths: (B), or null: all steps count.
void launch_check_rows(const ChainsParams& params, const unsigned* invalid, const int64_t* lengths,
                       cudaStream_t stream);

}  // namespace bigramx::cuda
