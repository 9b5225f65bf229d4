// Text to tokens and back, one per character, on the memory of Python's strings and lists.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace bigramx {

// Distinct characters; the token of each is its index.
class Alphabet {
  public:
    // characters: a str. Raises ValueError if a character occurs twice.
    explicit Alphabet(pybind11::handle characters);

    // A str -> (N) int64 tokens. Raises ValueError for a character that is not in the alphabet.
    at::Tensor encode(pybind11::handle text) const;

    // Tokens of any integer dtype and shape, on the CPU -> str. Raises IndexError for one out of range,
    // TypeError for another dtype.
    pybind11::object decode(const at::Tensor& tokens) const;

    // The same for a list or a tuple; None if it holds anything but plain ints. Raises TypeError for another
    // object.
    pybind11::object decode_sequence(pybind11::handle tokens) const;

  private:
    uint64_t vocab_size() const { return code_points_.size() - 1; }

    // (V + 1): the code point of each token; the last is a sentinel for tokens out of range.
    std::vector<uint32_t> code_points_;
    uint32_t largest_ = 0;  // of the code points

    // A two-level table: the page of each 256 code points, and for each page 256 tokens, or sentinels. Ranges
    // without a character share page 0, so that a single emoji does not need a table up to its code point.
    std::vector<int32_t> tokens_;
    std::vector<uint16_t> pages_;
};

}  // namespace bigramx
