// Chains of tokens on the GPU, in parallel over time: segments, warm-up, boundaries and repair as in
// cpu/generate_chains.h.
//
// For many draws the rows of the table are prepared as fixed-point CDFs, and a thread follows a chain; else a
// block does, and reads the logits themselves at each step.
#pragma once

#include <cstdint>

#include "cuda/base/types.h"

namespace bigramx::cuda {

// (B, T) tokens, the one that each chain starts from before its first.
struct ChainsParams {
    int64_t* tokens;
    int64_t num_chains, num_steps, stride;
    Seed seed;

    // Each chain is cut into so many segments. Where they are more than one:
    int64_t num_segments, steps_a_segment;
    uint32_t* entries;  // (B, segments): the token before the first of each
    uint32_t* exits;    // (B, segments): the last of each, before any is repaired
    unsigned*
        uncoalesced;  // (B), 0 before: whether a repaired segment has not coalesced with what was written
};

// Rows of V logits.
struct LogitsParams {
    FloatType type;
    const void* logits;
    int64_t num_rows, vocab_size, stride;
    double temperature;  // divides the logits

    // (1 + V), 0 before: whether any row of the table is not a distribution and, behind it, which. They draw
    // token 0.
    unsigned* invalid;
};

enum class Granularity { thread, block };

// Sets how the chains are cut: none where there are enough of them to fill the GPU.
void cut_chains(Granularity granularity, ChainsParams* params);

// idx (B, T) -> tokens (B, T), whose rows lie stride apart. A token out of range stops the kernel.
void launch_copy_prompt(const int64_t* idx, int64_t num_sequences, int64_t prompt_length, int64_t vocab_size,
                        int64_t* tokens, int64_t stride, cudaStream_t stream);

// rows: those of the table from `first_row` on. cdf (num_rows, V).
void launch_write_cdf(const LogitsParams& rows, int64_t first_row, uint32_t* cdf, cudaStream_t stream);

// cdf: (V, V).
void launch_chains_by_cdf(const ChainsParams& params, const uint32_t* cdf, int64_t vocab_size,
                          cudaStream_t stream);

// table: all rows.
void launch_chains_by_logits(const ChainsParams& params, const LogitsParams& table, cudaStream_t stream);

// argmax: (V), the token that follows each. The chains are not cut.
void launch_chains_by_argmax(const ChainsParams& params, const int64_t* argmax, cudaStream_t stream);

// One step of all chains; rows (B, V): those that the chains have come to.
void launch_draw_step(const ChainsParams& params, const LogitsParams& rows, int64_t step,
                      cudaStream_t stream);

// lengths (B), the number of steps before: set to that of the steps up to the first token `stop` of each
// chain, which is filled with it from there on.
void launch_stop_chains(const ChainsParams& params, int64_t stop, int64_t* lengths, cudaStream_t stream);

// Stops the kernel where a chain has drawn from a row that is not a distribution; what segments met while
// they warmed up does not count. lengths: (B), or null: all steps count.
void launch_check_rows(const ChainsParams& params, const unsigned* invalid, const int64_t* lengths,
                       cudaStream_t stream);

}  // namespace bigramx::cuda
