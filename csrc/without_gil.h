// Calls that run without Python's interpreter lock (GIL), and what happens to them when the
// interpreter ends.
#pragma once

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <stdexcept>
#include <thread>

namespace bicache {

// Lives while a call runs without the lock. Both counters change under the lock only. A thread that
// asks for the lock back while the interpreter finalises is ended by Python in the midst of C++,
// which aborts the process: so at exit the interpreter waits for the calls under way, and later
// ones are refused.
class WithoutGil {
 public:
  WithoutGil() {
    if (closing_) {
      throw std::runtime_error(
          "[engine] call: expected a running interpreter, got one that is shutting down");
    }
    ++under_way_;
    state_ = PyEval_SaveThread();
  }
  ~WithoutGil() {
    PyEval_RestoreThread(state_);
    --under_way_;
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Call once, when the module is made.
  static void wait_at_exit() {
    pthread_atfork(nullptr, nullptr, [] { under_way_ = 0; });  // a child has none of these threads
    const auto wait = [] {
      closing_ = true;
      while (under_way_ > 0) {
        const pybind11::gil_scoped_release release;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    };
    pybind11::module_::import("atexit").attr("register")(pybind11::cpp_function(wait));
  }

 private:
  static inline bool closing_ = false;
  static inline int64_t under_way_ = 0;

  PyThreadState* state_;
};

}  // namespace bicache
