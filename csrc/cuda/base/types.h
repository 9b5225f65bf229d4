// The types that the host code passes to the launchers. Includes neither PyTorch nor the CUDA runtime.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as the runtime declares it

namespace bigramx::cuda {

enum class FloatType { float64, float32, bfloat16, float16 };
enum class TokenType { uint8, uint16, uint32, int32, int64 };

// The seed of counter-based draws. Under graph capture, where each replay must draw anew, a generator keeps
// its own seed and its offset in device memory.
struct Seed {
    uint64_t value;  // the seed itself, or that of the device's generator
    bool of_device_generator;
    uint64_t offset;               // of the device's generator; under capture: added to *captured_offset
    const int64_t* captured_seed;  // null: not captured
    const int64_t* captured_offset;
};

}  // namespace bigramx::cuda
