// Text to tokens and back, a character each, on the memory of Python's own strings and lists.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace bigramx {

// Distinct characters, numbered from 0 on.
class Alphabet {
  public:
    // A str. Raises ValueError where a character occurs twice.
    explicit Alphabet(pybind11::handle characters);

    // A str -> (N) int64 tokens. Raises ValueError for a character that is not in the alphabet.
    at::Tensor encode(pybind11::handle text) const;

    // Tokens of any integer dtype and shape, on the CPU -> str. Raises IndexError for one out of range.
    pybind11::object decode(const at::Tensor& tokens) const;

    // The same of a list or a tuple; None where it holds something else than plain ints.
    pybind11::object decode_sequence(pybind11::handle tokens) const;

  private:
    uint64_t vocab_size() const { return code_points_.size() - 1; }

    std::vector<uint32_t>
        code_points_;       // (V + 1): of each token; the last is a mark, for tokens out of range
    uint32_t largest_ = 0;  // of the code points

    // The token of each code point, or a mark, in pages of 256; and the page of each 256 code points. Those
    // without a character share page 0, so that one emoji does not make a table of all that comes before it.
    std::vector<int32_t> tokens_;
    std::vector<uint16_t> pages_;
};

}  // namespace bigramx
