// How near the machine's limit each kernel is: one line of JSON per measurement, the limit of the
// same moment beside it. bench/kernels.py runs this and says what the fields mean.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/quantize.h"
#include "measure.h"
#include "peak.h"

namespace bicache::bench {
namespace {

// Those asked for, without those whose part the table before computes with the same code.
template <class Same>
std::vector<const Kernels*> distinct(const Options& options, Same&& same) {
  std::vector<const Kernels*> all = available_kernels(), some;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto is_same = [&](const Kernels* k) { return same(*k, *all[i]); };
    const bool wanted = options.isa.empty() ? std::none_of(all.begin(), all.begin() + i, is_same)
                                            : options.isa == all[i]->isa;
    if (wanted) some.push_back(all[i]);
  }
  return some;
}

// What products with weights of this type are computed in.
const char* arithmetic(DType type) {
  return type == DType::f32 ? "f32" : type == DType::bf16 ? "bf16" : "int8";
}

bool is_generic(const Kernels& kernels) { return kernels.isa == std::string_view("generic"); }

// ---- GEMM

struct Layer {
  int64_t inputs, outputs;
};

// The one place that knows what gemm() wants.
class Weights {
 public:
  Weights(const Kernels& kernels, Backend backend, DType type, Layer layer, const bf16* weights,
          int threads)
      : kernels_(&kernels),
        w_(kernels, backend, reinterpret_cast<const std::byte*>(weights), DType::bf16, type,
           layer.outputs, layer.inputs, threads) {}

  // As the layers' inputs are: converted once, for several products.
  Activations converted(const std::vector<float>& a, int64_t rows) const {
    Activations all;
    all.reserve(*kernels_, w_.backend(), w_.dtype(), rows, w_.inputs());
    for (int64_t r = 0; r < rows; ++r) all.set(r, a.data() + r * w_.inputs());
    return all;
  }
  void multiply(const Activations& a, float* c, int64_t rows, int threads) const {
    gemm(*kernels_, a, 0, w_, {c, rows, w_.outputs()}, Write::set, threads, Op::q, {});
  }
  int64_t size_bytes() const { return w_.size_bytes(); }
  bool evict(int threads) const {
    const int64_t panels =
        w_.backend() == Backend::blas ? w_.outputs() : (w_.outputs() - 1) / w_.panel() + 1;
    const int64_t data =
        w_.backend() == Backend::blas ? w_.size_bytes() : panels * w_.panel_bytes();
    if (w_.dtype() == DType::int4)  // bytes m and z for a group of nibbles
      bench::evict(w_.groups(), 4 * data / kInt4Group, threads);
    return bench::evict(w_.data(), data, threads);
  }

  // Whether the two tables compute these products with the same code.
  static bool same(const Kernels& a, const Kernels& b, DType type) {
    const Product &p = product_of(a, type), &q = product_of(b, type);
    return p.run == q.run && (type != DType::int4 || p.expand == q.expand);
  }

 private:
  const Kernels* kernels_;
  Matrix w_;
};

struct Inputs {  // of the largest layer
  std::vector<float> a;
  Buffer<float> c;  // as the engine has its own
  std::vector<bf16> weights;
};

class GemmBench {
 public:
  GemmBench(const Options& options, StreamingRead& read) : options_(options), read_(read) {
    if (options.small) {
      layers_ = {{96, 130}};
      rows_ = {1, 8};
    }
    int64_t rows = rows_.back(), inputs = 0, outputs = 0, weights = 0;
    for (const auto& [k, n] : layers_) {
      inputs = std::max(inputs, k);
      outputs = std::max(outputs, n);
      weights = std::max(weights, k * n);
    }
    inputs_.a = random_floats(rows * inputs);
    inputs_.c = Buffer<float>(rows * outputs);
    std::fill(inputs_.c.data(), inputs_.c.data() + inputs_.c.size(), 0.0f);
    for (float x : random_floats(weights)) inputs_.weights.push_back(to_bf16(x));
  }

  void tables() {
    for (DType type : kTypes) {
      if (!options_.type.empty() && options_.type != name(type)) continue;
      const auto same = [&](const Kernels& a, const Kernels& b) {
        return Weights::same(a, b, type);
      };
      for (const Kernels* k : distinct(options_, same)) {
        const bool wide = k == available_kernels().back() || k->panel == kMaxPanel;
        group(*k, Backend::packed, type, is_generic(*k) ? 2 : wide ? layers_.size() : 3);
      }
    }
  }

  void blas() { group(*available_kernels().back(), Backend::blas, DType::f32, 4); }

 private:
  void group(const Kernels& kernels, Backend backend, DType type, size_t layers) {
    for (size_t i = 0; i < std::min(layers, layers_.size()); ++i) {
      std::vector<int64_t> rows = rows_;
      if (is_generic(kernels) && !options_.small) rows = {8, 64, 256};
      measure(kernels, backend, type, layers_[i], rows);
    }
  }

  void measure(const Kernels& kernels, Backend backend, DType type, Layer layer,
               const std::vector<int64_t>& rows) {
    const int threads = options_.threads;
    std::vector<Weights> copies;  // one call each, so that starting the threads is amortised
    do {
      copies.emplace_back(kernels, backend, type, layer, inputs_.weights.data(), threads);
    } while (static_cast<int64_t>(copies.size()) < (options_.small ? 2 : 16) &&
             static_cast<int64_t>(copies.size() + 1) * copies[0].size_bytes() <= kColdBytes);
    const Activations a = copies[0].converted(inputs_.a, rows.back());
    Limits limits(kernels.isa, arithmetic(type), threads, read_);
    std::vector<std::vector<double>> cold(rows.size()), warm(rows.size());
    for (int round = 0; round < options_.rounds; ++round) {
      limits.measure();
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto run = [&](const Weights& w) {
          w.multiply(a, inputs_.c.data(), rows[i], threads);
        };
        const double operations =
            2e-9 * static_cast<double>(rows[i] * layer.inputs * layer.outputs);
        warm[i].push_back(operations / seconds_a_call([&] { run(copies[0]); }));
        bool gone = true;
        for (const Weights& w : copies) gone = w.evict(threads) && gone;
        if (!gone) continue;
        const double seconds =
            seconds_of([&] { std::for_each(copies.begin(), copies.end(), run); });
        cold[i].push_back(operations * static_cast<double>(copies.size()) / seconds);
      }
    }
    Line line("gemm");
    line.add("isa", backend == Backend::blas ? "blas" : kernels.isa).add("type", name(type));
    line.add("inputs", layer.inputs).add("outputs", layer.outputs);
    line.add("weight_bytes", copies[0].size_bytes());
    limits.report(line);
    line.add("rows", rows).add("warm", medians(warm)).add("cold", medians(cold));
  }

  static std::vector<double> medians(const std::vector<std::vector<double>>& samples) {
    std::vector<double> all;
    for (const auto& s : samples) {
      if (!s.empty()) all.push_back(median(s));
    }
    return all;
  }

  static constexpr int64_t kColdBytes = int64_t{32} << 20;
  // The first ones for the weaker tables, too.
  std::vector<Layer> layers_ = {{1024, 1024}, {1536, 4096},  {4096, 1536},
                                {4096, 4096}, {4096, 12288}, {12288, 4096}};
  std::vector<int64_t> rows_ = {1, 8, 16, 32, 64, 128, 256, 512, 1024};
  const Options& options_;
  StreamingRead& read_;
  Inputs inputs_;
};

// ---- attention

struct Heads {
  const char* model;
  int64_t heads, kv_heads, head_dim;
};

struct Window {
  int64_t rows, keys;
};

// The one place that knows what attention() wants: K and V of one type, by rows.
class Keys {
 public:
  Keys(DType type, int64_t keys, int64_t width)
      : type_(type), floats_(random_floats(2 * keys * width)) {
    for (float x : floats_) halves_.push_back(to_bf16(x));
    for (int64_t i = 0; i < 2 * keys; ++i) {
      const void* row = type == DType::f32 ? static_cast<const void*>(floats_.data() + i * width)
                                           : halves_.data() + i * width;
      (i < keys ? k_ : v_).push_back(row);
    }
  }
  void attend(const Kernels& kernels, const std::vector<float>& q, std::vector<float>& out,
              int64_t rows, const Heads& heads, int threads) const {
    const auto keys = static_cast<int64_t>(k_.size());
    const AttentionJob job = {q.data(), out.data(), rows, k_.data(), v_.data(), keys};
    attention(kernels, {&job, 1}, heads.heads, heads.kv_heads, heads.head_dim, type_, threads);
  }
  static bool same(const Kernels& a, const Kernels& b, DType type) {
    return type == DType::f32 ? a.attention_f32.attend == b.attention_f32.attend
                              : a.attention_bf16.attend == b.attention_bf16.attend;
  }

 private:
  DType type_;
  std::vector<float> floats_;
  std::vector<bf16> halves_;
  std::vector<const void*> k_, v_;
};

void attention_of(const Kernels& kernels, DType type, Heads heads, Window window,
                  const Options& options, StreamingRead& read) {
  const auto [model, h, g, d] = heads;
  const std::vector<float> q = random_floats(window.rows * h * d);
  const Keys keys(type, window.keys, g * d);
  std::vector<float> out(q.size());
  Limits limits(kernels.isa, arithmetic(type), options.threads, read);
  const double operations = 4e-9 * static_cast<double>(window.rows * window.keys * h * d);
  std::vector<double> rates;
  for (int round = 0; round < options.rounds; ++round) {
    limits.measure();
    const double seconds =
        seconds_a_call([&] { keys.attend(kernels, q, out, window.rows, heads, options.threads); });
    rates.push_back(operations / seconds);
  }
  Line line("attention");
  line.add("isa", kernels.isa).add("type", name(type)).add("model", model);
  line.add("heads", h).add("kv_heads", g).add("head_dim", d);
  line.add("rows", window.rows).add("keys", window.keys).add("gops", median(rates));
  limits.report(line);
}

void attention_bench(const Options& options, StreamingRead& read) {
  for (DType type : {DType::f32, DType::bf16}) {
    if (!options.type.empty() && options.type != name(type)) continue;
    const auto same = [&](const Kernels& a, const Kernels& b) { return Keys::same(a, b, type); };
    for (const Kernels* k : distinct(options, same)) {
      std::vector<Heads> models = {{"mid", 12, 12, 128}};
      std::vector<Window> windows = {{512, 512}, {32, 512}, {8, 512}};
      if (!is_generic(*k)) {
        models.insert(models.end(), {{"LLaDA-8B", 32, 32, 128}, {"Dream-7B", 28, 4, 128}});
        windows.insert(windows.end(), {{1024, 1024}, {32, 1024}});
      }
      if (options.small) models = {{"small", 2, 1, 8}}, windows = {{3, 70}};
      for (const Heads& heads : models) {
        for (const Window& window : windows) {
          attention_of(*k, type, heads, window, options, read);
        }
      }
    }
  }
}

// ---- functions of one or two vectors

struct Elementwise {
  const char* name;
  int64_t n;     // floats of one call
  double bytes;  // read and written per float
  bool uses_y;   // as much of y as of x
  void (*call)(const Kernels& kernels, float* x, float* y, int64_t n);
};

const Elementwise kElementwise[] = {
    {"rms_norm", 4096, 8, false,
     [](const Kernels& k, float* x, float* y, int64_t n) { k.rms_norm(x, y, 1e-6f, n, x); }},
    {"rope", 128, 8, false,
     [](const Kernels& k, float* x, float* y, int64_t n) { k.rope(x, y, y, n); }},
    {"silu_mul", 4096, 12, true,
     [](const Kernels& k, float* x, float* y, int64_t n) { k.silu_mul(x, y, n); }},
    {"add", 4096, 12, true,
     [](const Kernels& k, float* x, float* y, int64_t n) { k.add(x, y, n); }},
    {"round_to_floats", 4096, 8, false,
     [](const Kernels& k, float* x, float*, int64_t n) { k.round_to_floats(x, n, x); }},
    {"round_to_halves", 4096, 6, true,
     [](const Kernels& k, float* x, float* y, int64_t n) {
       k.round_to_halves(x, n, reinterpret_cast<uint16_t*>(y));
     }},
    {"quantize_s16", 4096, 6, true,
     [](const Kernels& k, float* x, float* y, int64_t n) {
       k.quantize_s16(x, n, reinterpret_cast<int16_t*>(y));
     }},
    {"quantize_u8", 4096, 5, true,
     [](const Kernels& k, float* x, float* y, int64_t n) {
       k.quantize_u8(x, n, reinterpret_cast<uint8_t*>(y));
     }},
    {"row_stats", 32768, 4, false,
     [](const Kernels& k, float* x, float*, int64_t n) { k.row_stats(x, n); }},
};

// One pass over `floats` floats of x (and y) per thread.
void pass(const Kernels& kernels, const Elementwise& what, float* x, float* y, int64_t floats,
          int threads) {
  const int64_t calls = floats / what.n;
  parallel_for(threads, threads, [&](int64_t t) {
    for (int64_t i = t * calls; i < (t + 1) * calls; ++i) {
      what.call(kernels, x + i * what.n, what.uses_y ? y + i * what.n : y, what.n);
    }
  });
}

void elementwise_of(const Kernels& kernels, const Elementwise& what, const Options& options,
                    StreamingRead& read) {
  const int threads = options.threads;
  // Of x and of y: both stay in L2, or come from memory.
  const int64_t near = 1 << 15, far = options.small ? near : int64_t{1} << 23;
  // Such that x neither grows nor fades, call after call: silu(50) is 50; a turn by 45 degrees.
  std::vector<float> x = random_floats(far * threads, 50);
  std::vector<float> y(x.size(), what.name == std::string("rope") ? std::sqrt(0.5f) : 1.0f);
  const int64_t bytes = static_cast<int64_t>(x.size() * sizeof(float));
  const auto gigabytes = [&](int64_t floats) {
    return what.bytes * static_cast<double>(floats * threads) * 1e-9;
  };
  std::vector<double> in_l2, from_memory;
  double copy = 0, stream = 0;
  for (int round = 0; round < options.rounds; ++round) {
    copy = std::max(copy, l2_gb_per_second(threads));
    stream = std::max(stream, read.gb_per_second(threads));
    const auto run = [&](int64_t floats) {
      pass(kernels, what, x.data(), y.data(), floats, threads);
    };
    in_l2.push_back(gigabytes(near) / seconds_a_call([&] { run(near); }));
    evict(x.data(), bytes, threads);
    evict(y.data(), bytes, threads);
    from_memory.push_back(gigabytes(far) / seconds_of([&] { run(far); }));
  }
  Line line("elementwise");
  line.add("isa", kernels.isa).add("name", what.name);
  line.add("l2", median(in_l2)).add("memory", median(from_memory));
  line.add("l2_copy_gb_s", copy).add("read_gb_s", stream);
}

void elementwise_bench(const Options& options, StreamingRead& read) {
  const auto same = [](const Kernels& a, const Kernels& b) { return a.rms_norm == b.rms_norm; };
  for (const Kernels* k : distinct(options, same)) {
    for (const Elementwise& what : kElementwise) elementwise_of(*k, what, options, read);
  }
}

// ---- main

void run(const Options& options) {
  use_cpu_time(options.cpu_time);
  StreamingRead read(options.small ? 16 << 20 : int64_t{1} << 30);
  const auto wanted = [&](std::string_view part) {
    return options.only.empty() ? part != "blas" : part == options.only;
  };
  {
    Line line("run");
    line.add("threads", int64_t{options.threads}).add("rounds", int64_t{options.rounds});
    line.add("clock", options.cpu_time ? "cpu" : "wall");
    line.add("isa", available_kernels().back()->isa);
    if (wanted("blas")) line.add("blas", blas_config());
  }
  for (const Peak& peak : peaks()) {
    Line line("peak");
    line.add("name", peak.name).add("type", peak.type).add("isa", peak.isa);
    line.add("gops", gops(peak, options.threads));
  }
  if (wanted("gemm")) GemmBench(options, read).tables();
  if (wanted("blas")) GemmBench(options, read).blas();
  if (wanted("attention")) attention_bench(options, read);
  if (wanted("elementwise")) elementwise_bench(options, read);
}

}  // namespace
}  // namespace bicache::bench

int main(int count, char** words) {
  try {
    bicache::bench::run(bicache::bench::parse(count, words));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
