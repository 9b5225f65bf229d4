#include "tokenizer.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "base/checks.h"
#include "base/interrupt.h"
#include "base/python.h"
#include "cpu/base/huge_pages.h"

namespace py = pybind11;

namespace bigramx {
namespace {

constexpr const char* kDecode = "decode";
constexpr int64_t kPage = 256;
constexpr int64_t kChunk = 1 << 20;  // tokens between checks for signals
constexpr uint32_t kNumCodePoints = 0x110000;
static_assert(kNumCodePoints < int64_t{1} << PyLong_SHIFT, "any token is an int of one digit");

// Sentinels for what is unknown. A kernel returns the bitwise or of all that it wrote, which tells whether
// there was a sentinel; its position is searched for only then.
constexpr int32_t kNoToken = -1;
constexpr uint32_t kNoCharacter = uint32_t{1} << 31;

// -------------------------------------------------------------------------------------- Python's objects

int64_t length_of(const char* name, py::handle text) {
    if (!PyUnicode_Check(text.ptr())) {
        throw py::type_error(c10::str("expected ", name, " to be a str, got ", Py_TYPE(text.ptr())->tp_name));
    }
    const Py_ssize_t length = PyUnicode_GetLength(text.ptr());
    if (length < 0) throw py::error_already_set();
    return length;
}

// Calls visit with a pointer to the characters of a str, of one, two or four bytes each.
template <typename Visit>
auto visit_characters(py::handle text, const Visit& visit) {
    void* const characters = PyUnicode_DATA(text.ptr());
    switch (PyUnicode_KIND(text.ptr())) {
        case PyUnicode_1BYTE_KIND: return visit(static_cast<Py_UCS1*>(characters));
        case PyUnicode_2BYTE_KIND: return visit(static_cast<Py_UCS2*>(characters));
        default: return visit(static_cast<Py_UCS4*>(characters));
    }
}

// A str must have the narrowest of four forms: ASCII, or one, two or four bytes per character.
int form_of(uint32_t largest) { return (largest > 0x7F) + (largest > 0xFF) + (largest > 0xFFFF); }

// A new str of characters up to `largest`. write(characters) fills it and returns the bitwise or of all; if
// it returns nullopt, the result is None.
template <typename Write>
py::object new_str(int64_t length, uint32_t largest, const Write& write) {
    py::object text = checked(PyUnicode_New(length, largest));
    const std::optional<uint32_t> bits = visit_characters(text, write);
    if (!bits.has_value()) return py::none();
    if (form_of(*bits) == form_of(largest)) return text;
    return checked(PyUnicode_FromKindAndData(PyUnicode_KIND(text.ptr()), PyUnicode_DATA(text.ptr()), length));
}

// The repr of the character at `position`.
std::string quoted(py::handle text, int64_t position) {
    return py::repr(checked(PyUnicode_Substring(text.ptr(), position, position + 1)));
}

template <typename Token>
[[noreturn]] void raise_out_of_range(const Token& token, int64_t position, uint64_t vocab_size) {
    throw py::index_error(c10::str("token ", token, " at position ", position,
                                   " is out of range: expected 0 <= token < ", vocab_size));
}

// ------------------------------------------------------------------------------------------------ kernels

template <typename char_t>
int32_t encode_kernel(const char_t* text, int64_t length, const uint16_t* pages, const int32_t* token_of,
                      int64_t* tokens) {
    int32_t bits = 0;
    for (int64_t n = 0; n < length; ++n) {
        const int32_t token = token_of[pages[text[n] / kPage] * kPage + text[n] % kPage];
        bits |= token;
        tokens[n] = token;
    }
    return bits;
}

template <typename token_t, typename char_t>
uint32_t decode_kernel(const token_t* tokens, int64_t num_tokens, const uint32_t* code_points,
                       uint64_t vocab_size, char_t* text) {
    uint32_t bits = 0;
    for (int64_t n = 0; n < num_tokens; ++n) {
        const auto token = static_cast<uint64_t>(tokens[n]);  // negative tokens become too large
        const uint32_t code_point = code_points[std::min(token, vocab_size)];
        bits |= code_point;
        text[n] = static_cast<char_t>(code_point);
    }
    return bits;
}

template <typename char_t>
std::optional<uint32_t> decode_objects_kernel(PyObject* const* tokens, int64_t begin, int64_t end,
                                              const uint32_t* code_points, uint64_t vocab_size,
                                              char_t* text) {
    uint32_t bits = 0;
    for (int64_t n = begin; n < end; ++n) {
        if (!PyLong_CheckExact(tokens[n])) return std::nullopt;
        const auto token = static_cast<uint64_t>(value_of_int(tokens[n]));
        if (token >= vocab_size) raise_out_of_range(std::string(py::str(tokens[n])), n, vocab_size);
        const uint32_t code_point = code_points[token];
        bits |= code_point;
        text[n] = static_cast<char_t>(code_point);
    }
    return bits;
}

}  // namespace

Alphabet::Alphabet(py::handle characters) : tokens_(kPage, kNoToken), pages_(kNumCodePoints / kPage, 0) {
    const int64_t vocab_size = length_of("characters", characters);
    code_points_.reserve(vocab_size + 1);
    for (int64_t token = 0; token < vocab_size; ++token) {
        const uint32_t code_point = PyUnicode_READ_CHAR(characters.ptr(), token);
        uint16_t& page = pages_[code_point / kPage];
        if (page == 0) {
            page = static_cast<uint16_t>(tokens_.size() / kPage);
            tokens_.resize(tokens_.size() + kPage, kNoToken);
        }
        int32_t& entry = tokens_[page * kPage + code_point % kPage];
        if (entry != kNoToken) {
            throw py::value_error("expected distinct characters, got " + quoted(characters, token) +
                                  " twice");
        }
        entry = static_cast<int32_t>(token);
        code_points_.push_back(code_point);
        largest_ = std::max(largest_, code_point);
    }
    code_points_.push_back(kNoCharacter);
}

at::Tensor Alphabet::encode(py::handle text) const {
    const int64_t length = length_of("text", text);
    at::Tensor tokens = at::empty({length}, at::kLong);
    cpu::advise_huge_pages(tokens);
    int64_t* const data = tokens.mutable_data_ptr<int64_t>();
    int32_t bits = 0;
    visit_characters(text, [&](const auto* characters) {
        std::optional<ReleasedGil> others_run;
        if (length > kChunk) others_run.emplace();
        for_each_chunk(length, kChunk, [&](int64_t begin, int64_t end) {
            bits |=
                encode_kernel(characters + begin, end - begin, pages_.data(), tokens_.data(), data + begin);
        });
    });
    if (bits < 0) {
        const int64_t position = std::find(data, data + length, kNoToken) - data;
        throw py::value_error(c10::str("unknown character ", quoted(text, position), " at position ",
                                       position, ": expected one of the tokenizer's ", vocab_size(),
                                       " characters"));
    }
    return tokens;
}

py::object Alphabet::decode(const at::Tensor& tokens) const {
    check_dense(kDecode, "tokens", tokens);
    TORCH_CHECK_TYPE(at::isIntegralType(tokens.scalar_type(), /*includeBool=*/false), kDecode,
                     ": expected tokens to be integers, got ", tokens.scalar_type());
    TORCH_CHECK(tokens.is_cpu(), kDecode, ": expected tokens to be on the CPU, got ", tokens.device());
    check_tensor(kDecode, "tokens", tokens);
    const at::Tensor contiguous = materialized(tokens).contiguous();
    const int64_t num_tokens = contiguous.numel();
    const auto decode_as = [&](const auto* data) {
        return new_str(num_tokens, largest_, [&](auto* characters) {
            std::optional<ReleasedGil> others_run;
            if (num_tokens > kChunk) others_run.emplace();
            uint32_t bits = 0;
            for_each_chunk(num_tokens, kChunk, [&](int64_t begin, int64_t end) {
                bits |= decode_kernel(data + begin, end - begin, code_points_.data(), vocab_size(),
                                      characters + begin);
            });
            if (bits & kNoCharacter) {
                const auto* const wrong = std::find_if(data, data + num_tokens, [&](auto token) {
                    return static_cast<uint64_t>(token) >= vocab_size();
                });
                if (wrong == data + num_tokens) raise_changed(kDecode, "tokens");
                raise_out_of_range(+*wrong, wrong - data, vocab_size());
            }
            return bits;
        });
    };
    return AT_DISPATCH_V2(contiguous.scalar_type(), kDecode,
                          AT_WRAP([&] { return decode_as(contiguous.const_data_ptr<scalar_t>()); }),
                          AT_EXPAND(AT_INTEGRAL_TYPES), AT_EXPAND(AT_BAREBONES_UNSIGNED_TYPES));
}

py::object Alphabet::decode_sequence(py::handle tokens) const {
    if (!PyList_Check(tokens.ptr()) && !PyTuple_Check(tokens.ptr())) {
        throw py::type_error(
            c10::str("expected tokens to be a list or a tuple, got ", Py_TYPE(tokens.ptr())->tp_name));
    }
    const int64_t num_tokens = PySequence_Fast_GET_SIZE(tokens.ptr());
    return new_str(num_tokens, largest_, [&](auto* characters) {
        SignalCheck signals;
        std::optional<uint32_t> bits = 0;
        for (int64_t begin = 0; begin < num_tokens && bits.has_value(); begin += kChunk) {
            const std::optional<uint32_t> more = decode_objects_kernel(
                PySequence_Fast_ITEMS(tokens.ptr()), begin, std::min(begin + kChunk, num_tokens),
                code_points_.data(), vocab_size(), characters);
            bits = more.has_value() ? std::optional(*bits | *more) : std::nullopt;
            if (!signals.is_due()) continue;
            {
                const ReleasedGil others_run;
                signals.handle();
            }
            if (PySequence_Fast_GET_SIZE(tokens.ptr()) != num_tokens) {
                throw std::runtime_error("expected tokens to keep its size while it is decoded");
            }
        }
        return bits;
    });
}

}  // namespace bigramx
