// What the scheduler tells memory.cpp.
#pragma once

#include <cstddef>

#include "order.h"

namespace simt {

extern Order order;

// From here to end_kernel no memory is allocated or released. arguments: those of the kernel, which all
// threads may read.
void begin_kernel(size_t shared_bytes, const void* arguments, size_t arguments_bytes);
void begin_block(unsigned block, unsigned threads);
void end_kernel();

// Sets memory on the device; false where it does not lie in one allocation.
bool set_memory(void* memory, int value, size_t bytes);

}  // namespace simt
