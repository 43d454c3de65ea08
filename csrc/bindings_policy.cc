// Policies and depth hooks in the module bicache._core.
#include <pybind11/stl.h>

#include "bindings.h"

namespace bicache {
namespace {

struct DepthHook {
  DepthPtr depth;
};

// `reachable`: None or a list of int. (As std::optional<std::vector<int>> it makes gcc 12 see
// uninitialised memory inside older versions of pybind11.)
DepthHook make_hook(py::object function, const py::object& reachable, bool observes) {
  if (!PyCallable_Check(function.ptr())) {
    throw py::type_error(cat("[cache] depth hook: expected a callable, got ",
                             py::str(py::type::of(function)).cast<std::string>()));
  }
  const auto f = held(std::move(function));
  const auto call = [f](const StepInfo& s) {
    const py::gil_scoped_acquire acquire;
    const py::object b = (*f)(s);
    if (PyBool_Check(b.ptr()) || !PyIndex_Check(b.ptr())) {
      throw py::type_error(
          cat("[cache] depth hook: expected an int, got ", py::repr(b).cast<std::string>()));
    }
    const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(b.ptr()));
    if (!number) throw py::error_already_set();
    int overflow = 0;
    const int64_t depth = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    require(overflow == 0 && -1 <= depth && depth <= s.request.layers,
            "[cache] depth hook: expected 0..", s.request.layers, " (the model's layers), got ",
            py::str(number).cast<std::string>());
    return static_cast<int>(depth);
  };
  if (reachable.is_none()) return {hook_depth(call, std::nullopt, observes)};
  return {hook_depth(call, reachable.cast<std::vector<int>>(), observes)};
}

// 1 - similarity, per layer; None: not measured.
template <class F>
py::object drift(const StepInfo& s, F&& similarity) {
  if (s.to_entry.empty()) return py::none();
  py::tuple values(s.to_entry.size());
  for (size_t l = 0; l < s.to_entry.size(); ++l) values[l] = 1 - similarity(s.to_entry[l]);
  return values;
}

py::list table_of_policies() {
  using namespace py::literals;
  py::list table;
  for (const PolicyRow& row : policy_table()) {
    py::list fields;
    for (const PolicyField& f : row.fields) {
      fields.append(py::dict("name"_a = f.name, "default"_a = f.value, "help"_a = f.help));
    }
    table.append(py::dict("name"_a = row.name, "help"_a = row.help, "fields"_a = fields,
                          "identity"_a = row.identity));
  }
  return table;
}

}  // namespace

std::shared_ptr<py::object> held(py::object object) {
  return {new py::object(std::move(object)), [](py::object* o) {
            const py::gil_scoped_acquire acquire;
            delete o;
          }};
}

void bind_policies(py::module_& m) {
  py::class_<StepInfo>(m, "RequestInfo", "What a depth hook sees of one request.")
      .def_property_readonly("p", [](const StepInfo& s) { return s.request.p; })
      .def_property_readonly("u", [](const StepInfo& s) { return s.request.u; })
      .def_property_readonly("g", [](const StepInfo& s) { return s.request.g; })
      .def_property_readonly("n", [](const StepInfo& s) { return s.request.n(); })
      .def_property_readonly("layers", [](const StepInfo& s) { return s.request.layers; })
      .def_property_readonly("ratio", [](const StepInfo& s) { return s.request.ratio(); })
      .def_readonly("step", &StepInfo::step)
      .def_readonly("depth", &StepInfo::depth)
      .def_property_readonly(
          "drift",
          [](const StepInfo& s) { return drift(s, [](const Similarity& x) { return x.kv(); }); })
      .def_property_readonly("state_drift",
                             [](const StepInfo& s) {
                               return drift(s, [](const Similarity& x) { return x.residual; });
                             })
      .def("__repr__", [](const StepInfo& s) {
        return cat("RequestInfo(p=", s.request.p, ", u=", s.request.u, ", g=", s.request.g,
                   ", ratio=", s.request.ratio(), ", step=", s.step, ", depth=", s.depth, ")");
      });
  py::class_<DepthHook>(m, "DepthHook", "A Python function that chooses depths.")
      .def(py::init(&make_hook), py::arg("function"), py::kw_only(),
           py::arg("reachable") = py::none(), py::arg("observes") = false);
  py::class_<PolicyHandle>(m, "Policy", "A cache policy, ready for Engine.start.")
      .def_property_readonly("spec", [](const PolicyHandle& p) { return p.policy->spec(); })
      .def("__repr__",
           [](const PolicyHandle& p) { return "Policy(\"" + p.policy->spec() + "\")"; });
  m.def(
      "make_policy",
      [](const std::string& cache, const DepthHook* hook) {
        return PolicyHandle{make_policy(cache, hook != nullptr ? hook->depth : nullptr)};
      },
      py::arg("cache"), py::arg("hook") = py::none(),
      "The policy of a cache string; `hook` is what \"depth=hook\" stands for.");
  m.def(
      "compose",
      [](const PolicyHandle& a, const PolicyHandle& b) {
        return PolicyHandle{compose(a.policy, b.policy)};
      },
      py::arg("a"), py::arg("b"),
      "One that speaks for the shared prefix rows and one for the others, in either order.");
  m.def("policy_table", &table_of_policies,
        "Cache policies: name, help, fields (name, default, help), identity.");
  m.def(
      "canonical_policy", [](const std::string& cache) { return make_policy(cache)->spec(); },
      py::arg("cache"), "The cache string in its usual form.");
}

}  // namespace bicache
