// What memory.cpp offers to the scheduler.
#pragma once

#include <cstddef>

#include "order.h"

namespace simt {

extern Order order;

// Between this and end_kernel no memory is allocated or released. arguments: those of the kernel, which
// every thread may read. overlaps: the kernels before, back to one that does not, may still run, until a
// thread waits for them.
void begin_kernel(size_t shared_bytes, const void* arguments, size_t arguments_bytes, bool overlaps);
void begin_block(unsigned block, unsigned threads);
void end_kernel();

// Sets device memory; returns false unless the range is within one allocation.
bool set_memory(void* memory, int value, size_t bytes);

}  // namespace simt
