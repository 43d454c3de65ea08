// Generation options between Python and C++: both ways from GenerationOptions::visit().
#include <pybind11/stl.h>

#include "bindings.h"

namespace bicache {
namespace {

void assign(int64_t& field, const py::handle& value, const char* name) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    throw py::type_error(cat("[generate] ", name, ": expected an int, got ",
                             py::str(py::type::of(value)).cast<std::string>()));
  }
  const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const int64_t x = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  require(overflow == 0, "[generate] ", name, ": expected a 64-bit int, got a larger one");
  field = x;
}

void assign(std::optional<int64_t>& field, const py::handle& value, const char* name) {
  int64_t x = 0;
  assign(x, value, name);
  field = x;
}

void assign(std::vector<int64_t>& field, const py::handle& value, const char* name) {
  if (!PySequence_Check(value.ptr()) || PyUnicode_Check(value.ptr())) {
    throw py::type_error(cat("[generate] ", name, ": expected a list of int, got ",
                             py::str(py::type::of(value)).cast<std::string>()));
  }
  field.clear();
  for (const py::object item : py::reinterpret_borrow<py::sequence>(value)) {  // may be a new one
    int64_t x = 0;
    assign(x, item, name);
    field.push_back(x);
  }
}

void assign(std::optional<std::vector<int64_t>>& field, const py::handle& value, const char* name) {
  assign(field.emplace(), value, name);
}

void assign(double& field, const py::handle& value, const char* name) {
  const bool number =
      !PyBool_Check(value.ptr()) &&
      (PyFloat_Check(value.ptr()) || PyIndex_Check(value.ptr()) || py::hasattr(value, "__float__"));
  if (!number || PyUnicode_Check(value.ptr())) {
    throw py::type_error(cat("[generate] ", name, ": expected a float, got ",
                             py::str(py::type::of(value)).cast<std::string>()));
  }
  field = py::float_(py::reinterpret_borrow<py::object>(value)).cast<double>();
}

void assign(std::optional<double>& field, const py::handle& value, const char* name) {
  double x = 0;
  assign(x, value, name);
  field = x;
}

void assign(bool& field, const py::handle& value, const char* name) {
  if (!PyBool_Check(value.ptr())) {
    throw py::type_error(cat("[generate] ", name, ": expected a bool, got ",
                             py::str(py::type::of(value)).cast<std::string>()));
  }
  field = value.cast<bool>();
}

void assign(std::string& field, const py::handle& value, const char* name) {
  if (!PyUnicode_Check(value.ptr())) {
    throw py::type_error(cat("[generate] ", name, ": expected a str, got ",
                             py::str(py::type::of(value)).cast<std::string>()));
  }
  field = value.cast<std::string>();
}

const char* type_name(const int64_t&) { return "int"; }
const char* type_name(const std::optional<int64_t>&) { return "int"; }
const char* type_name(const double&) { return "float"; }
const char* type_name(const std::optional<double>&) { return "float"; }
const char* type_name(const std::vector<int64_t>&) { return "ints"; }
const char* type_name(const std::optional<std::vector<int64_t>>&) { return "ints"; }
const char* type_name(const bool&) { return "bool"; }
const char* type_name(const std::string&) { return "str"; }

}  // namespace

double to_double(const py::handle& value, const char* name) {
  double x = 0;
  assign(x, value, name);
  return x;
}

GenerationOptions to_options(const py::dict& values) {
  GenerationOptions options;
  std::string names;
  size_t used = 0;
  options.visit([&](const char* name, auto& field, const char*, const char*) {
    names += (names.empty() ? "" : ", ") + std::string(name);
    if (!values.contains(name)) return;
    ++used;
    if (!values[name].is_none()) assign(field, values[name], name);
  });
  if (used == values.size()) return options;
  for (const auto& [key, value] : values) {
    bool known = false;
    options.visit([&](const char* name, auto&, const char*, const char*) {
      known |= key.equal(py::str(name));
    });
    require(known, "[generate] options: expected ", names, ", got ",
            py::str(key).cast<std::string>());
  }
  return options;
}

py::list option_table() {
  py::list table;
  GenerationOptions().visit(
      [&](const char* name, auto& field, const char* help, const char* choices) {
        py::object values = py::none();
        if (*choices != '\0') values = py::str(choices).attr("split")("|");
        using namespace py::literals;
        table.append(py::dict("name"_a = name, "type"_a = type_name(field), "default"_a = field,
                              "help"_a = help, "choices"_a = values));
      });
  return table;
}

}  // namespace bicache
