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

// A function that lets other threads run Python. It copies its arguments, as whoever drops the last tensor
// beside Python's needs the lock: they are dropped after the call.
template <typename Return, typename... Arguments>
auto without_gil(Return (*function)(Arguments...)) {
    return [function](Arguments... arguments) {
        const ReleasedGil others_run;
        return function(arguments...);
    };
}

template <typename Signature>
struct DirectOp;

// Signature: decltype of the function that implements the op.
template <typename Return, typename... Arguments>
struct DirectOp<Return(Arguments...)> {
    static void define(pybind11::module& m, const char* library, const char* name) {
        const auto op = std::string(library) + "::" + name;
        const auto handle =
            c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), "").typed<Return(Arguments...)>();
        m.def(name, [handle](Arguments... arguments) {
            const ReleasedGil others_run;
            return handle.call(arguments...);  // copies, see without_gil
        });
    }
};

}  // namespace bigramx
