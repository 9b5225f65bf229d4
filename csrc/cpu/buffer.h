// Scratch memory for one call: an array from ATen's allocator, without the cost of a tensor.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>

namespace bigramx {

template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t size)
        : size_(size), memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(size) * sizeof(T))) {}

    static Buffer zeros(int64_t size) {
        Buffer buffer(size);
        std::fill(buffer.begin(), buffer.end(), T());
        return buffer;
    }

    T* begin() const { return static_cast<T*>(memory_.get()); }
    T* end() const { return begin() + size_; }
    T& operator[](int64_t k) const { return begin()[k]; }
    int64_t size() const { return size_; }

  private:
    int64_t size_;
    c10::DataPtr memory_;
};

}  // namespace bigramx
