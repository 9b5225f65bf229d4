// Keeps the memory of freed gradients for the next ones. The gradient of a large table is allocated at each
// step, and the C library gives such memory back to the system when it is freed: clearing fresh pages takes
// as long as the loss's own work on them.
//
// Of one size a single block is kept, that freed last, and at most one of another size, until it has been
// passed over some times. Fresh memory is taken beside one kept block, not two: the pool adds one gradient to
// the peak at most. Where memory runs short, the system takes the pages of large blocks (MADV_FREE). Nothing
// is locked, so that a fork at any moment leaves a pool that works.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace bigramx::cpu {

// An uninitialised tensor in every way like that of at::empty, on the CPU, but for where its memory goes when
// it is freed. Large ones are advised to use huge pages.
at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType dtype);

// Frees what is kept; from then on at most so many bytes are.
void set_gradient_pool_limit(int64_t bytes);

// Frees what is kept.
void empty_gradient_pool();

// Bytes at most, bytes kept, and how many gradients found a kept block or did not.
std::tuple<int64_t, int64_t, int64_t, int64_t> gradient_pool_info();

}  // namespace bigramx::cpu
