// What the files of the module bicache._core share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "cache/policy.h"
#include "engine/options.h"

namespace bicache {

namespace py = pybind11;

// A NumPy array that owns `values`, without a copy.
template <class T>
py::array_t<T> to_array(std::vector<T> values, std::vector<py::ssize_t> shape = {}) {
  auto* owned = new std::vector<T>(std::move(values));  // freed by the capsule
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  if (shape.empty()) shape.push_back(static_cast<py::ssize_t>(owned->size()));
  return py::array_t<T>(shape, owned->data(), owner);
}

template <class T>
std::vector<T> to_vector(const py::handle& object, const char* where) {
  require(py::isinstance<py::array_t<T>>(object), where, ": expected a NumPy array of ",
          py::str(py::dtype::of<T>()).template cast<std::string>(), ", got ",
          py::str(py::hasattr(object, "dtype") ? py::object(object.attr("dtype"))
                                               : py::type::of(object))
              .template cast<std::string>());
  const auto array = py::array_t<T, py::array::c_style>::ensure(object);
  require(array && array.ndim() == 1, where, ": expected one dimension, got ",
          array ? array.ndim() : 0);
  return {array.data(), array.data() + array.size()};
}

// A Python object that any thread may drop.
std::shared_ptr<py::object> held(py::object object);

// A cache policy, as Python holds it.
struct PolicyHandle {
  PolicyPtr policy;
};

// "[generate] name: expected a float, got TYPE" where `value` is none.
double to_double(const py::handle& value, const char* name);
// From a dict by name; names that do not exist are errors that list those that do.
GenerationOptions to_options(const py::dict& values);
// Name, type, default, help and choices of every option.
py::list option_table();

// Policies, depth hooks, and what hooks see.
void bind_policies(py::module_& m);

// What is in GGUF files.
void bind_gguf(py::module_& m);

}  // namespace bicache
