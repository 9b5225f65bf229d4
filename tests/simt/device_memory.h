// What stands for memory on the device. Free of the stand-in's CUDA, which torch's headers cannot be mixed
// with.
#pragma once

#include <cstddef>

namespace simt {

// Fresh memory is full of bytes 0xFF, and nothing lies near it.
void* allocate(size_t bytes);
void release(void* memory);

// Makes memory that others have allocated memory on the device, until it is forgotten or allocated again.
void adopt(const void* memory, size_t bytes);
void forget(const void* memory);

}  // namespace simt
