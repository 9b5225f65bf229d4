// Binds an op as a function of a Python module. It enters the dispatcher as torch.ops does, but skips the
// parsing of the arguments by the schema, which takes as long as a small kernel.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/python.h"

namespace bigramx {

// How an argument is held during the call: a list in memory of its own.
template <typename Argument>
using Held = std::conditional_t<std::is_same_v<Argument, at::IntArrayRef>, std::vector<int64_t>,
                                std::decay_t<Argument>>;

// Thrown before anything is run: an error of the function itself, or of a signal handler during it, is
// another matter.
struct ArgumentsDoNotFit {};

template <typename Signature>
struct DirectOp;

// Signature: decltype of the function that implements the op.
template <typename Return, typename... Arguments>
struct DirectOp<Return(Arguments...)> {
    // Returns NotImplemented for arguments that do not fit.
    static void define(pybind11::module& m, const char* library, const char* name) {
        const auto op = std::string(library) + "::" + name;
        const auto handle =
            c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), "").typed<Return(Arguments...)>();
        const auto function = [handle](Arguments... arguments) -> Return {
            return handle.call(arguments...);
        };
        m.def(name, [function](const pybind11::args& arguments) -> pybind11::object {
            try {
                if constexpr (std::is_void_v<Return>) {
                    call(function, arguments);
                    return pybind11::none();
                } else {
                    return pybind11::cast(call(function, arguments));
                }
            } catch (const ArgumentsDoNotFit&) {
                return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
            }
        });
    }

    // Another function of this signature.
    template <typename Function>
    static void define(pybind11::module& m, const char* name, const Function& function) {
        m.def(name, wrapped(name, function));
    }

    // What Python calls in its place: it raises TypeError for arguments that do not fit.
    template <typename Function>
    static auto wrapped(const char* name, const Function& function) {
        return [name, function](const pybind11::args& arguments) -> Return {
            try {
                return call(function, arguments);
            } catch (const ArgumentsDoNotFit&) {
                throw pybind11::type_error(std::string(name) + "(): incompatible function arguments");
            }
        };
    }

  private:
    // It takes positional arguments alone: pybind11's own message for those of another type has the repr of
    // each, which reads tensors whose memory may be gone. Other threads run Python meanwhile. The arguments
    // are copies, as whoever drops the last tensor beside Python's needs the lock: they are dropped after the
    // call.
    template <typename Function>
    static Return call(const Function& function, const pybind11::args& arguments) {
        return call(function, arguments, std::index_sequence_for<Arguments...>());
    }

    template <typename Function, size_t... k>
    static Return call(const Function& function, const pybind11::args& arguments, std::index_sequence<k...>) {
        std::tuple<pybind11::detail::make_caster<Held<Arguments>>...> casters;
        // A bool is no other object that happens to be true.
        const bool fits = arguments.size() == sizeof...(k) &&
                          (std::get<k>(casters).load(arguments[k], !std::is_same_v<Arguments, bool>) && ...);
        if (!fits) throw ArgumentsDoNotFit();
        const ReleasedGil others_run;
        return function(pybind11::detail::cast_op<Held<Arguments>&>(std::get<k>(casters))...);
    }
};

}  // namespace bigramx
