// Where in memory the elements of a tensor lie.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/safe_numerics.h>

#include <cstdint>
#include <limits>

namespace bigramx {

// How far the elements of a tensor that has some reach, in bytes from the beginning of its storage. The
// largest number where that is more than 64 bits can say.
inline int64_t bytes_of_storage(const at::Tensor& tensor) {
    int64_t elements = tensor.storage_offset();
    bool overflows = false;
    if (tensor.is_contiguous()) {
        overflows = c10::add_overflows(elements, tensor.numel(), &elements);
    } else {
        overflows = c10::add_overflows(elements, int64_t{1}, &elements);
        for (int64_t d = 0; d < tensor.dim(); ++d) {
            int64_t distance = 0;
            overflows |= c10::mul_overflows(tensor.size(d) - 1, tensor.stride(d), &distance);
            overflows |= c10::add_overflows(elements, distance, &elements);
        }
    }
    int64_t bytes = 0;
    overflows |= c10::mul_overflows(elements, static_cast<int64_t>(tensor.element_size()), &bytes);
    return overflows ? std::numeric_limits<int64_t>::max() : bytes;
}

// The addresses of a tensor's elements, from the first to behind the last.
struct Extent {
    Extent() = default;

    explicit Extent(const at::Tensor& tensor) {
        if (tensor.numel() == 0) return;
        const c10::Storage& storage = tensor.storage();
        const auto* const memory = static_cast<const char*>(storage.data());
        const int64_t bytes = bytes_of_storage(tensor);
        is_allocated = memory != nullptr && bytes <= static_cast<int64_t>(storage.nbytes());
        if (!is_allocated) return;
        begin = memory + tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
        end = memory + bytes;
    }

    bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }

    // Null if there are no elements.
    const char* begin = nullptr;
    const char* end = nullptr;
    bool is_allocated = true;  // the storage has not been freed or shrunk, as FSDP does between its uses
};

}  // namespace bigramx
