// Binds an op as a function of a Python module. It enters the dispatcher as torch.ops does, but skips the
// parsing of the arguments by the schema, which takes as long as a small kernel.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "base/python.h"

namespace bigramx {

template <typename Signature>
struct DirectOp;

// Signature: decltype of the function that implements the op.
template <typename Return, typename... Arguments>
struct DirectOp<Return(Arguments...)> {
    static void define(pybind11::module& m, const char* library, const char* name) {
        const auto op = std::string(library) + "::" + name;
        const auto handle =
            c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), "").typed<Return(Arguments...)>();
        m.def(
            name, [handle](Arguments... arguments) { return handle.call(arguments...); },
            pybind11::call_guard<ReleasedGil>());
    }
};

}  // namespace bigramx
