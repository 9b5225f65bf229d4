// An op as a function of a Python module: into the dispatcher as torch.ops goes, but without its parsing of
// the arguments by the schema, which takes as long as a small kernel.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace bigramx {

template <typename Signature>
struct DirectOp;

template <typename Return, typename... Arguments>
struct DirectOp<Return(Arguments...)> {
    // op: with its namespace.
    static void define(pybind11::module& m, const char* name, const char* op) {
        const auto handle =
            c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Return(Arguments...)>();
        m.def(
            name, [handle](Arguments... arguments) { return handle.call(arguments...); },
            pybind11::call_guard<pybind11::gil_scoped_release>());
    }
};

}  // namespace bigramx
