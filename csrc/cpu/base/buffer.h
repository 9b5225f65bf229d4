// Scratch memory: an array from ATen's allocator, without the cost of a tensor.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>

#include "base/checked.h"

namespace bigramx::cpu {

template <typename T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t size) { resize(size); }

    // Keeps the memory, and its contents, where it is large enough.
    void resize(int64_t size) {
        TORCH_CHECK(size >= 0, "bigramx: expected a size of scratch memory >= 0, got ", size);
        if (size > capacity_) {
            const int64_t bytes = checked_product("bigramx", "the size of scratch memory", size, sizeof(T));
            memory_ = c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
            capacity_ = size;
        }
        size_ = size;
    }

    // As resize; newly allocated memory is zero.
    void resize_zeros(int64_t size) {
        const int64_t before = capacity_;
        resize(size);
        if (capacity_ > before) std::fill(begin(), end(), T());
    }

    T* begin() const { return static_cast<T*>(memory_.get()); }
    T* end() const { return begin() + size_; }
    T& operator[](int64_t k) const { return begin()[k]; }
    int64_t size() const { return size_; }

  private:
    int64_t size_ = 0;
    int64_t capacity_ = 0;
    c10::DataPtr memory_;
};

}  // namespace bigramx::cpu
