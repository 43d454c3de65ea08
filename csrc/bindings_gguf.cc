// GGUF files in the module bicache._core: what is in one, apart from being a checkpoint.
#include "bindings.h"
#include "files/gguf_checkpoint.h"

namespace bicache {
namespace {

py::object to_python(const GgufValue::Element& element) {
  return std::visit([](const auto& value) -> py::object { return py::cast(value); }, element);
}

py::dict metadata(const std::string& path) {
  const Gguf file(path);
  py::dict all;
  for (const auto& [key, value] : file.metadata()) {
    const std::vector<GgufValue::Element> elements = value.elements();
    py::list list;
    for (const GgufValue::Element& e : elements) list.append(to_python(e));
    all[py::str(key)] = value.is_array() ? py::object(list) : py::object(list[0]);
  }
  return all;
}

py::array_t<float> tensor(const std::string& path, const std::string& name) {
  const GgufCheckpoint checkpoint(path);
  require(checkpoint.has(name), "[gguf] ", path, ": tensor ", printable(name),
          ": expected in the file, got nothing of that name");
  const Tensor t = checkpoint.tensor(name);
  const StoredMatrix m = t.matrix();
  std::vector<float> values(static_cast<size_t>(t.count()));
  for (int64_t i = 0; i < m.rows; ++i) m.row(i, values.data() + i * m.cols);
  return to_array(std::move(values), {t.shape.begin(), t.shape.end()});
}

}  // namespace

void bind_gguf(py::module_& m) {
  m.def("gguf_metadata", &metadata, py::arg("path"), "The metadata of a GGUF file, by key.");
  m.def("gguf_tensor", &tensor, py::arg("path"), py::arg("name"),
        "A tensor of a GGUF model float32 [its shape], under the name and with the rows of the "
        "folder it was made from.");
}

}  // namespace bicache
