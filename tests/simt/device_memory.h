// The emulated device: its memory, and what it has been given to do. Independent of the emulator's
// cuda_runtime.h, which cannot be combined with torch's headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// Fresh memory is filled with bytes 0xFF, and nothing else is near it.
void* allocate(size_t bytes);
void release(void* memory);

// Makes memory allocated elsewhere count as device memory, until it is forgotten or allocated again.
void adopt(const void* memory, size_t bytes);
void forget(const void* memory);

// The launches and memsets so far: what a CUDA graph would have as its nodes.
uint64_t num_nodes();

}  // namespace simt
