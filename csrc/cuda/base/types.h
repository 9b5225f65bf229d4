// What the host passes to the launchers: free of torch's headers and of the CUDA runtime's.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as the runtime declares it

namespace bigramx::cuda {

enum class FloatType { float64, float32, bfloat16, float16 };
enum class TokenType { uint8, uint16, int32, int64 };

// The seed of counter-based draws: a number or, where a graph is being captured and every replay is to draw
// anew, where a generator keeps its seed and its offset on the device.
struct Seed {
    uint64_t value;  // the seed of the draws; of a generator on the device: that of the generator
    bool of_device_generator;
    uint64_t offset;  // of a generator on the device; in a graph what is added to *captured_offset
    const int64_t* captured_seed;  // null: `value`
    const int64_t* captured_offset;
};

}  // namespace bigramx::cuda
