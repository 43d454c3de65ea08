// The Python module bicache._core: one to one with the C++ names, no logic.
#include "bindings.h"

#include <pybind11/stl.h>

#include "base/parallel.h"
#include "base/rng.h"
#include "engine/forecast.h"
#include "files/checkpoint.h"
#include "kernels/kernels.h"
#include "without_gil.h"

namespace bicache {
namespace {

// ---- results

template <class F>
py::array_t<int64_t> per_layer(const std::vector<Work>& work, size_t layers, F&& count) {
  std::vector<int64_t> rows(layers, 0);
  for (size_t l = 0; l < std::min(layers, work.size()); ++l) rows[l] = count(work[l]);
  return to_array(std::move(rows));
}

int64_t total(const std::vector<Work>& work, int64_t Work::* count) {
  int64_t sum = 0;
  for (const Work& w : work) sum += w.*count;
  return sum;
}

py::dict stats_dict(const RequestStats& s) {
  using namespace py::literals;
  const size_t layers = s.work.empty() ? 0 : s.work.size() - 1;
  const auto recomputed = [](const Work& w) { return w.rows_of(Op::attention); };
  const auto value_only = [](const Work& w) { return w.rows_of(Op::v) - w.rows_of(Op::attention); };
  return py::dict(
      "rows_per_layer"_a = per_layer(s.work, layers, recomputed),
      "value_rows_per_layer"_a = per_layer(s.work, layers, value_only),
      "head_rows"_a = s.work.empty() ? 0 : s.work.back().rows_of(Op::head),
      "flops"_a = total(s.work, &Work::flops), "bytes_read"_a = total(s.work, &Work::bytes),
      "entry_rows_per_layer"_a = per_layer(s.entry_work, layers, recomputed),
      "entry_flops"_a = total(s.entry_work, &Work::flops), "prefix_hit"_a = s.prefix_hit,
      "prefix_tokens"_a = s.prefix_tokens, "depth"_a = s.depth, "depth_reason"_a = s.depth_reason,
      "depths"_a = s.depths, "refreshes"_a = s.refreshes, "steps"_a = s.steps,
      "passes"_a = s.passes, "cache_bytes"_a = s.cache_bytes, "seconds"_a = s.seconds);
}

template <class T, class F>
py::array_t<T> of_commits(const StepEvent& e, F&& get) {
  std::vector<T> values;
  for (const Commit& c : e.commits) values.push_back(get(c));
  return to_array(std::move(values));
}

// ---- engine

DType to_dtype(const std::string& text, const char* what, std::span<const DType> types,
               const char* choices) {
  for (const DType type : types) {
    if (bicache::name(type) == text) return type;
  }
  fail("[engine] ", what, ": expected ", choices, ", got \"", text, "\"");
}

constexpr DType kWeightTypes[] = {DType::f32, DType::bf16, DType::int8, DType::int4};
constexpr DType kCacheTypes[] = {DType::f32, DType::bf16};

std::shared_ptr<Engine> load_engine(const std::string& folder, const std::string& dtype,
                                    const std::string& kv_dtype, const std::string& backend,
                                    int threads, int64_t prefix_budget_bytes,
                                    const std::string& prefix_dtype, int32_t eot_token_id,
                                    int64_t known_ids) {
  require(backend == "packed" || backend == "blas",
          "[engine] backend: expected packed or blas, got \"", backend, "\"");
  std::optional<DType> kept, kv;
  if (dtype != "auto")
    kept = to_dtype(dtype, "dtype", kWeightTypes, "auto, f32, bf16, int8 or int4");
  if (kv_dtype != "auto") kv = to_dtype(kv_dtype, "kv_dtype", kCacheTypes, "auto, f32 or bf16");
  const DType entries = to_dtype(prefix_dtype, "prefix_dtype", kCacheTypes, "f32 or bf16");
  const WithoutGil released;
  if (threads == 0) threads = available_threads();
  require(1 <= threads && threads <= 1024, "[engine] threads: expected 1..1024, or 0 for all, got ",
          threads);
  auto model = Model::load(folder, backend == "blas" ? Backend::blas : Backend::packed, kept, kv,
                           threads, eot_token_id, kernels(), known_ids);
  return std::make_shared<Engine>(std::move(model), threads, prefix_budget_bytes, entries);
}

std::shared_ptr<Generation> start(std::shared_ptr<Engine> engine, const py::list& list,
                                  int64_t batch_rows) {
  std::vector<Request> requests;
  for (const py::handle& item : list) {
    using Discover = std::optional<std::pair<int64_t, int64_t>>;
    const auto [tokens, prefix, options, policy, salt, discover, response] =
        item.cast<std::tuple<py::object, int64_t, py::dict, PolicyHandle, std::string, Discover,
                             py::object>>();
    requests.push_back({to_vector<int32_t>(tokens, "[generate] prompt"), prefix,
                        to_options(options), policy.policy, salt, std::nullopt});
    if (discover) requests.back().discover = DiscoveryRule{discover->first, discover->second};
    if (!response.is_none())
      requests.back().response = to_vector<int32_t>(response, "[generate] response");
  }
  return std::make_shared<Generation>(std::move(engine), std::move(requests), batch_rows);
}

py::array_t<float> forward(Engine& engine, const py::object& tokens, const py::object& rows) {
  auto ids = to_vector<int32_t>(tokens, "[forward] tokens");
  std::vector<int64_t> positions;
  if (rows.is_none()) {
    for (size_t i = 0; i < ids.size(); ++i) positions.push_back(static_cast<int64_t>(i));
  } else {
    positions = to_vector<int64_t>(rows, "[forward] rows");
  }
  py::array_t<float> logits({static_cast<py::ssize_t>(positions.size()),
                             static_cast<py::ssize_t>(engine.model().config().vocab)});
  float* out = logits.mutable_data();
  {
    const WithoutGil released;
    engine.forward(std::move(ids), positions, out);
  }
  return logits;
}

Tap to_tap(py::object function) {
  if (function.is_none()) return {};
  return [f = held(std::move(function))](int layer, const char* name, View<const float> values) {
    const py::gil_scoped_acquire acquire;
    py::array_t<float> array({values.rows, values.cols});
    for (int64_t i = 0; i < values.rows; ++i)
      std::copy_n(values.row(i), values.cols, array.mutable_data(i, 0));
    (*f)(layer, name, array);
  };
}

bool warm(Engine& engine, const py::object& tokens, const PolicyHandle& policy,
          const std::string& salt) {
  const auto ids = to_vector<int32_t>(tokens, "[warm] prefix");
  const WithoutGil released;
  return engine.warm(ids, *policy.policy, salt);
}

py::dict prefix_stats(Engine& engine) {
  using namespace py::literals;
  const PrefixStore::Stats s = engine.store().stats();
  return py::dict("entries"_a = s.entries, "size_bytes"_a = s.size_bytes,
                  "budget_bytes"_a = s.budget_bytes, "pinned"_a = s.pinned, "hits"_a = s.hits,
                  "misses"_a = s.misses, "evictions"_a = s.evictions, "refused"_a = s.refused);
}

py::dict forecast_dict(const ModelConfig& config, const PolicyHandle& policy, int64_t prefix_len,
                       int64_t prompt_len, const py::dict& options, const std::string& dtype,
                       const std::string& kv_dtype, const py::object& tokens_per_step) {
  const ModelShape shape{config, to_dtype(dtype, "dtype", kWeightTypes, "f32, bf16, int8 or int4"),
                         to_dtype(kv_dtype, "kv_dtype", kCacheTypes, "f32 or bf16")};
  std::optional<double> rate;
  if (!tokens_per_step.is_none()) rate = to_double(tokens_per_step, "tokens_per_step");
  const Forecast f =
      forecast(shape, *policy.policy, prefix_len, prompt_len, to_options(options), rate);
  py::dict result = stats_dict(f.stats);
  result["weight_bytes"] = shape.weight_bytes();
  result["entry_bytes"] = f.entry_bytes;
  result["vanilla_flops"] = f.vanilla_flops;
  return result;
}

py::dict checkpoint_info(const std::string& folder) {
  using namespace py::literals;
  const Checkpoint checkpoint(folder);
  py::dict tensors, types;
  int64_t parameters = 0;
  for (const Tensor& t : checkpoint.stored()) {
    const py::str type{std::string(bicache::name(t.dtype))};
    parameters = checked_add(parameters, t.count(), "checkpoint");
    tensors[py::str(t.name)] = py::make_tuple(type, py::tuple(py::cast(t.shape)));
    const auto bytes = static_cast<int64_t>(t.bytes.size());
    types[type] = bytes + (types.contains(type) ? types[type].cast<int64_t>() : 0);
  }
  return py::dict("tensors"_a = tensors, "size_bytes"_a = checkpoint.size_bytes(),
                  "parameters"_a = parameters, "types"_a = types);
}

py::array_t<double> uniform_array(int64_t seed, const std::string& stream, int64_t step,
                                  int64_t position, int64_t count) {
  require(stream == "token" || stream == "confidence",
          "[uniform] stream: expected token or confidence, got \"", stream, "\"");
  require(count >= 0, "[uniform] count: expected >= 0, got ", count);
  std::vector<double> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    values[i] = uniform(static_cast<uint64_t>(seed),
                        stream == "token" ? Stream::token : Stream::confidence, step, position, i);
  }
  return to_array(std::move(values));
}

// ---- module

#ifdef BICACHE_NUMPY1_ONLY
// Built with a pybind11 that reads NumPy 2's dtypes wrongly, without an error.
void refuse_numpy2() {
  const auto version = py::module_::import("numpy").attr("__version__").cast<std::string>();
  if (std::stoi(version) >= 2) {
    throw py::import_error(
        "[bicache] NumPy: expected 1.x (this build uses a pybind11 older than NumPy 2), got " +
        version);
  }
}
#endif

void bind_config(py::module_& m) {
  py::class_<ModelConfig>(m, "Config",
                          "Sizes and flags of a checkpoint, read from its config.json.")
      .def_readonly("family", &ModelConfig::family)
      .def_readonly("layers", &ModelConfig::layers)
      .def_readonly("dim", &ModelConfig::dim)
      .def_readonly("heads", &ModelConfig::heads)
      .def_readonly("kv_heads", &ModelConfig::kv_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("ffn", &ModelConfig::ffn)
      .def_readonly("vocab", &ModelConfig::vocab)
      .def_readonly("embeddings", &ModelConfig::embeddings)
      .def_readonly("context", &ModelConfig::context)
      .def_readonly("norm_eps", &ModelConfig::norm_eps)
      .def_readonly("rope_theta", &ModelConfig::rope_theta)
      .def_readonly("experts", &ModelConfig::experts)
      .def_readonly("experts_per_row", &ModelConfig::experts_per_row)
      .def_readonly("tied", &ModelConfig::tied)
      .def_readonly("qkv_bias", &ModelConfig::qkv_bias)
      .def_readonly("qk_norm", &ModelConfig::qk_norm)
      .def_readonly("shift", &ModelConfig::shift)
      .def_readonly("known_ids", &ModelConfig::known_ids)
      .def_readonly("mask_token_id", &ModelConfig::mask_token_id)
      .def_readonly("eos_token_id", &ModelConfig::eos_token_id)
      .def_readonly("eot_token_id", &ModelConfig::eot_token_id);
}

void bind_generation(py::module_& m) {
  py::class_<StepEvent>(m, "StepEvent", "One committed denoising step of one request.")
      .def_readonly("request", &StepEvent::request)
      .def_readonly("step", &StepEvent::step)
      .def_property_readonly("positions",
                             [](const StepEvent& e) {
                               return of_commits<int64_t>(
                                   e, [](const Commit& c) { return c.position; });
                             })
      .def_property_readonly("tokens",
                             [](const StepEvent& e) {
                               return of_commits<int32_t>(e,
                                                          [](const Commit& c) { return c.token; });
                             })
      .def_property_readonly("confidences",
                             [](const StepEvent& e) {
                               return of_commits<float>(
                                   e, [](const Commit& c) { return c.confidence; });
                             })
      .def_property_readonly("canvas", [](const StepEvent& e) { return to_array(e.canvas); });

  py::class_<Result>(m, "Result", "What one request produced.")
      .def_property_readonly("tokens", [](const Result& r) { return to_array(r.tokens); })
      .def_property_readonly("confidences", [](const Result& r) { return to_array(r.confidences); })
      .def_readonly("finish_reason", &Result::finish_reason)
      .def_property_readonly("stats", [](const Result& r) { return stats_dict(r.stats); });

  py::class_<Generation, std::shared_ptr<Generation>>(
      m, "Generation", "A batch of requests under way; made by Engine.start.")
      .def_property_readonly("done", &Generation::done)
      .def_property_readonly("finished", &Generation::finished)
      .def_property_readonly("steps_done", &Generation::steps_done)
      .def_property_readonly("steps_total", &Generation::steps_total)
      .def("step", &Generation::step, py::call_guard<WithoutGil>(),
           "One forward pass of the batch, then sampling: what it committed, per request. Releases "
           "the GIL.")
      .def("cancel", &Generation::cancel, py::arg("request"),
           "Ends one request before its next pass.")
      .def("stop", &Generation::stop, py::arg("request"),
           "The same, of one whose text has ended: its masks become its first end token.")
      .def("results", &Generation::results,
           "One per request, in order; RuntimeError before `done`.");
}

void bind_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(
      m, "Engine",
      "A loaded model and its prefix store. Safe to use from several threads: steps take turns.")
      .def(py::init(&load_engine), py::arg("folder"), py::kw_only(), py::arg("dtype") = "auto",
           py::arg("kv_dtype") = "auto", py::arg("backend") = "packed", py::arg("threads") = 0,
           py::arg("prefix_budget_bytes") = int64_t{1} << 30, py::arg("prefix_dtype") = "f32",
           py::arg("eot_token_id") = -1, py::arg("known_ids") = 0)
      .def_property_readonly("config", [](const Engine& e) { return e.model().config(); })
      .def_property_readonly(
          "dtype", [](const Engine& e) { return std::string(name(e.model().weights().dtype)); })
      .def_property_readonly(
          "kv_dtype", [](const Engine& e) { return std::string(name(e.model().kv_dtype())); })
      .def_property_readonly(
          "backend",
          [](const Engine& e) { return e.model().backend() == Backend::blas ? "blas" : "packed"; })
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("prefix_dtype",
                             [](const Engine& e) { return std::string(name(e.prefix_dtype())); })
      .def_property_readonly("fingerprint", [](const Engine& e) { return e.model().fingerprint(); })
      .def_property_readonly("weight_bytes",
                             [](const Engine& e) { return e.model().weights().size_bytes(); })
      .def("forward", &forward, py::arg("tokens"), py::arg("rows") = py::none(),
           "Logits float32 [len(rows), V] of positions `rows` (None: all N) of tokens int32 [N], "
           "without any cache.")
      .def("start", &start, py::arg("requests"), py::kw_only(), py::arg("batch_rows") = 4096,
           "Requests are (prompt ids int32 [p + u], p, options, Policy, salt, None or "
           "(min_tokens, min_requests) to look for a prefix, None or response ids int32 [g] with "
           "masks to fill); checked before anything runs.")
      .def(
          "set_tap",
          [](Engine& e, py::object function) {
            Tap tap = to_tap(std::move(function));
            const WithoutGil released;
            e.set_tap(std::move(tap));
          },
          py::arg("tap"), "tap(layer, name, float32 array) for every pass from now on; None: off.")
      .def("prefix_stats", &prefix_stats)
      .def("clear_prefixes", &Engine::clear_prefixes)
      .def(
          "save_prefixes",
          [](Engine& e, const std::string& path) {
            const WithoutGil released;
            return save_prefixes(e.store(), e.store_shape(), path);
          },
          py::arg("path"), "Writes all prefix entries to a file; how many.")
      .def(
          "load_prefixes",
          [](Engine& e, const std::string& path) {
            Restored r;
            {
              const WithoutGil released;
              r = restore_prefixes(e.store(), e.store_shape(), path);
            }
            using namespace py::literals;
            return py::dict("entries"_a = r.entries, "kept"_a = r.kept);
          },
          py::arg("path"),
          "Puts those of a file into the store: {'entries': in the file, 'kept': in the store}.")
      .def("warm", &warm, py::arg("tokens"), py::arg("policy"), py::arg("salt") = "",
           "Makes the entry of a prefix int32 [p], unless it is there; whether it is kept.");
}

}  // namespace
}  // namespace bicache

PYBIND11_MODULE(_core, m) {
  using namespace bicache;
  m.doc() = "The compiled engine: thin bindings, no logic. Use the `bicache` package.";
#ifdef BICACHE_NUMPY1_ONLY
  refuse_numpy2();
#endif
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FileError& e) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(e.code(), e.what(), e.path()).ptr());
    }
  });
  m.attr("__version__") = BICACHE_VERSION;
  WithoutGil::wait_at_exit();
  bind_config(m);
  bind_policies(m);
  bind_gguf(m);
  bind_generation(m);
  bind_engine(m);
  m.def(
      "read_config",
      [](const std::string& folder) {
        const Checkpoint checkpoint(folder);
        return ModelConfig::parse(checkpoint.config(), checkpoint.config_path());
      },
      py::arg("folder"),
      "Sizes and flags of a checkpoint folder or GGUF file, checked; loads no weight.");
  m.def(
      "parse_config",
      [](const std::string& path) { return ModelConfig::parse(read_json(path), path); },
      py::arg("path"), "Sizes and flags from a config.json alone.");
  m.def("forecast", &forecast_dict, py::arg("config"), py::arg("policy"), py::kw_only(),
        py::arg("prefix_len") = 0, py::arg("prompt_len"), py::arg("options") = py::dict(),
        py::arg("dtype") = "bf16", py::arg("kv_dtype") = "bf16",
        py::arg("tokens_per_step") = py::none(),
        "A request's statistics from its plans alone; prefix_len shared tokens and prompt_len of "
        "its own.");
  m.def("checkpoint_info", &checkpoint_info, py::arg("folder"),
        "{'tensors': {name: (dtype, shape)}, 'size_bytes', 'parameters', 'types': {dtype: bytes}}, "
        "without loading any weight.");
  m.def("option_table", &option_table, "Generation options: name, type, default, help, choices.");
  m.def("isa", [] { return kernels().isa; }, "The kernel table in use.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.emplace_back(k->isa);
    return names;
  });
  m.def("available_threads", &available_threads,
        "CPUs this process may use: affinity mask and cgroup quota.");
  m.def("parallel_backend", &parallel_backend);
  m.def("blas_config", &blas_config);
  m.def("uniform", &uniform_array, py::arg("seed"), py::arg("stream"), py::arg("step"),
        py::arg("position"), py::arg("count"),
        "The sampler's random numbers float64 [count] in [0, 1): stream 'token' (by vocabulary "
        "index) or 'confidence'.");
}
