// Chains of tokens on the GPU, in parallel over time: segments, warm-up and joints as in ../cpu/chains.h.
//
// The rows of the table are, for many draws, prepared as cdf, and a thread follows a chain; else a
// block does, and reads at each step the logits themselves.
#pragma once

#include <cstdint>

#include "cuda/base/types.h"

namespace bigramx {

// (B, T) tokens, the one that each chain starts from before its first.
struct ChainsJob {
    int64_t* tokens;
    int64_t num_chains, num_steps, stride;
    Seed seed;

    // Each chain is cut into so many segments. Where they are more than one:
    int64_t num_segments, steps_a_segment;
    uint32_t* entries;      // (B, segments): the token before the first of each
    uint32_t* exits;        // (B, segments): the last of each, before any is corrected
    unsigned* uncoalesced;  // (B), 0 before: whether a segment has ended otherwise since it was corrected
};

// Rows of V logits.
struct LogitsJob {
    FloatType type;
    const void* logits;
    int64_t num_rows, vocab_size, stride;
    double temperature;  // divides the logits

    // (1 + V), 0 before: whether any row of the table is no distribution and, behind it, which. They draw
    // token 0.
    unsigned* invalid;
};

enum class Granularity { thread, block };

// Sets how the chains are cut: none where there are enough of them to fill the GPU.
void cut_chains(Granularity follower, ChainsJob* job);

// idx (B, T) -> tokens (B, T), whose rows lie stride apart. A token out of range stops the kernel.
void launch_copy_idx(const int64_t* idx, int64_t num_sequences, int64_t prompt_length, int64_t vocab_size,
                     int64_t* tokens, int64_t stride, cudaStream_t stream);

// rows: those of the table from `first_row` on. cdf (num_rows, V).
void launch_write_cdf(const LogitsJob& rows, int64_t first_row, uint32_t* cdf, cudaStream_t stream);

// cdf: (V, V).
void launch_chains_by_cdf(const ChainsJob& job, const uint32_t* cdf, int64_t vocab_size, cudaStream_t stream);

// table: all rows.
void launch_chains_by_logits(const ChainsJob& job, const LogitsJob& table, cudaStream_t stream);

// argmax: (V), the token that follows each. The chains are not cut.
void launch_chains_by_argmax(const ChainsJob& job, const int64_t* argmax, cudaStream_t stream);

// One step of all chains; rows (B, V): those that the chains have come to.
void launch_draw_step(const ChainsJob& job, const LogitsJob& rows, int64_t step, cudaStream_t stream);

// lengths (B), the number of steps before: set to that of the steps up to the first token `stop` of each
// chain, which is filled with it from there on.
void launch_stop_chains(const ChainsJob& job, int64_t stop, int64_t* lengths, cudaStream_t stream);

// Stops the kernel where a chain has drawn from a row that is no distribution; what segments met while they
// warmed up does not count. lengths: (B), or null: all steps count.
void launch_check_rows(const ChainsJob& job, const unsigned* invalid, const int64_t* lengths,
                       cudaStream_t stream);

}  // namespace bigramx
