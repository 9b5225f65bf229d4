// Argument checks for all devices. Each message names the argument, what was expected and what was given; the
// error type is the one that PyTorch raises for the same mistake.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <initializer_list>

#include "base/extent.h"

namespace bigramx {

inline void check_defined(const char* op, const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.defined(), op, ": expected ", name, " to be a Tensor, got None");
}

inline void check_dense(const char* op, const char* name, const at::Tensor& tensor) {
    check_defined(op, name, tensor);
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), op,
        ": not implemented for ", name, " of layout ", tensor.layout(), ", dtype ", tensor.scalar_type(),
        tensor.is_nested() ? ", nested" : "", "; expected a dense tensor");
}

// A conjugate or negative view, or a ZeroTensor: its memory does not hold its numbers.
inline bool is_lazy(const at::Tensor& tensor) {
    return tensor.is_conj() || tensor.is_neg() || tensor._is_zerotensor();
}

inline at::Tensor materialized(const at::Tensor& tensor) { return is_lazy(tensor) ? tensor.clone() : tensor; }

// For each tensor whose memory is read or written, before that.
inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor) {
    check_defined(op, name, tensor);
    TORCH_CHECK(Extent(tensor).is_allocated, op, ": expected the storage of ", name,
                " to hold its elements, sizes ", tensor.sizes(), ", strides ", tensor.strides(), ", offset ",
                tensor.storage_offset(), ", got ",
                tensor.storage().data() == nullptr ? 0 : tensor.storage().nbytes(), " bytes");
}

// For each tensor that is written, in the words of PyTorch.
inline void check_writable(const char* op, const char* name, const at::Tensor& tensor) {
    check_tensor(op, name, tensor);
    TORCH_CHECK(
        tensor.is_non_overlapping_and_dense() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes, op,
        ": ", name,
        ": unsupported operation: more than one element of the written-to tensor refers to a single memory "
        "location. Please clone() the tensor before performing the operation.");
    TORCH_CHECK(!tensor.requires_grad() || !at::GradMode::is_enabled(), op,
                ": a leaf Variable that requires grad is being used in an in-place operation: ", name,
                " requires grad");
    TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), op, ": ", name,
                ": Inplace update to inference tensor outside InferenceMode is not allowed.");
}

struct NamedTensor {
    const char* name;
    const at::Tensor& tensor;  // may be undefined
};

// None of the first num_written tensors shares memory with another one. All have been checked.
inline void check_apart(const char* op, std::initializer_list<NamedTensor> tensors, size_t num_written) {
    c10::SmallVector<Extent, 8> extents;
    const NamedTensor* const first = tensors.begin();
    for (const NamedTensor& named : tensors) {
        const Extent extent = named.tensor.defined() ? Extent(named.tensor) : Extent();
        for (size_t k = 0; k < std::min(num_written, extents.size()); ++k) {
            TORCH_CHECK(!extents[k].overlaps(extent), op, ": unsupported operation: some elements of ",
                        named.name, " and the written-to tensor ", first[k].name,
                        " refer to a single memory location. Please clone() the tensor before performing the "
                        "operation.");
        }
        extents.push_back(extent);
    }
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor,
                        std::initializer_list<at::ScalarType> allowed) {
    for (const at::ScalarType dtype : allowed) {
        if (tensor.scalar_type() == dtype) return;
    }
    TORCH_CHECK(false, op, ": expected ", name, " to have one of the dtypes ",
                c10::ArrayRef<at::ScalarType>(allowed), ", got ", tensor.scalar_type());
}

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
    const at::ScalarType dtype = tensor.scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED(
        dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op,
        ": not implemented for ", name, " of dtype ", dtype,
        "; expected float64, float32, bfloat16 or float16");
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                              const char* other_name, const at::Tensor& other) {
    TORCH_CHECK(tensor.device() == other.device(), op,
                ": expected all tensors to be on the same device, got ", name, " on ", tensor.device(),
                " and ", other_name, " on ", other.device());
}

inline void check_matrix(const char* op, const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.dim() == 2, op, ": '", name, "' must be 2-D, got shape ", tensor.sizes());
}

inline void check_square(const char* op, const char* name, const at::Tensor& tensor) {
    check_matrix(op, name, tensor);
    TORCH_CHECK(tensor.size(0) == tensor.size(1), op, ": '", name,
                "' must be square, one row of V logits for each of V tokens; got shape ", tensor.sizes());
}

inline void check_padding(const char* op, int64_t padding_idx, int64_t num_rows) {
    TORCH_CHECK_VALUE(padding_idx >= -1 && padding_idx < num_rows, op, ": padding_idx must be within the ",
                      num_rows, " rows of weight, or -1 for none, got ", padding_idx);
}

// For a value out of range that is no longer found.
[[noreturn]] inline void raise_changed(const char* op, const char* argument) {
    TORCH_CHECK_INDEX(false, op, ": expected ", argument, " that nobody changes meanwhile");
}

inline void check_tokens(const char* op, const at::Tensor& tokens) {
    check_tensor(op, "tokens", tokens);
    TORCH_CHECK(tokens.dim() == 1, op, ": expected tokens to be 1-D, got shape ", tokens.sizes());
    check_dtype(op, "tokens", tokens, {at::kByte, at::kUInt16, at::kUInt32, at::kInt, at::kLong});
}

// Any integer tensor -> contiguous int64, copied only if necessary.
inline at::Tensor contiguous_int64(const at::Tensor& tensor) {
    return (tensor.scalar_type() == at::kLong ? tensor : tensor.to(at::kLong)).contiguous();
}

}  // namespace bigramx
