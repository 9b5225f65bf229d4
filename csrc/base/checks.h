// Argument checks for all devices. Each message names the argument, what was expected and what was given; the
// error type is the one that PyTorch raises for the same mistake.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace bigramx {

inline void check_defined(const char* op, const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.defined(), op, ": expected ", name, " to be a Tensor, got None");
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

inline void check_tokens(const char* op, const at::Tensor& tokens) {
    check_defined(op, "tokens", tokens);
    TORCH_CHECK(tokens.dim() == 1, op, ": expected tokens to be 1-D, got shape ", tokens.sizes());
    check_dtype(op, "tokens", tokens, {at::kByte, at::kUInt16, at::kInt, at::kLong});
}

// Any integer tensor -> contiguous int64, copied only if necessary.
inline at::Tensor contiguous_int64(const at::Tensor& tensor) {
    return (tensor.scalar_type() == at::kLong ? tensor : tensor.to(at::kLong)).contiguous();
}

}  // namespace bigramx
