// Python's lock; and direct access to its objects for the tokenizer, without method calls.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <thread>

#if PY_VERSION_HEX < 0x030B0000
#include <longintrepr.h>
#endif

namespace bigramx {

// Lets other threads run Python as long as it lives.
//
// Where the interpreter has ended meanwhile, Python before 3.14 ends a daemon thread that asks for the lock
// by pthread_exit, which unwinds it. Through a destructor, as pybind11's gil_scoped_release has it, that
// aborts the process; through frames that own Python's objects, it would release them without the lock. So
// the thread waits here until the process has ended, which is what Python 3.14 does.
class ReleasedGil {
  public:
    ReleasedGil() : thread_(PyEval_SaveThread()) {}
    ReleasedGil(const ReleasedGil&) = delete;
    ReleasedGil& operator=(const ReleasedGil&) = delete;

    ~ReleasedGil() {
        try {
            PyEval_RestoreThread(thread_);
        } catch (...) {
            while (true) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }

  private:
    PyThreadState* const thread_;
};

// Wraps a new reference; throws the error that Python has set if it is null.
inline pybind11::object checked(PyObject* made) {
    if (made == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(made);
}

// The value of an int, read in place; -1 for one with several digits, which is too large for a token.
inline int64_t value_of_int(PyObject* integer) {
    auto* const digits = reinterpret_cast<PyLongObject*>(integer);
#if PY_VERSION_HEX >= 0x030C0000
    return PyUnstable_Long_IsCompact(digits) ? PyUnstable_Long_CompactValue(digits) : -1;
#else
    const Py_ssize_t size = Py_SIZE(digits);  // the number of digits; negative if the int is
    return static_cast<size_t>(size) <= 1 ? size * static_cast<int64_t>(digits->ob_digit[0]) : -1;
#endif
}

}  // namespace bigramx
