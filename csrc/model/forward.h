// One forward pass under way; model/forward.cc runs it. Internal to csrc/model.
//
// Rows that run now are gathered into compact matrices [R, ..] (fresh rows of all requests first,
// then the rows that select chose, then the observed ones), so that every product is one GEMM over
// all requests; the residual stays in place, [N, E] per request, that of the j-th observed row at
// N + j. The candidates of select stand behind the fresh rows until the choice is made.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "model/model.h"

namespace bicache {

// Compact row -> which row of which request; `row` >= N: an observed one.
struct RowRef {
  int64_t pass;
  int64_t row;
};
using RowRefs = std::vector<RowRef>;

// Keys of one request in the layer that runs.
struct Keys {
  const void **k = nullptr, **v = nullptr;  // [N] each; null: nobody asked yet
};

class Forward {
 public:
  Forward(const Model& model, std::span<Pass> batch, Workspace& ws, int threads, const Tap& tap)
      : model_(model),
        c_(model.config()),
        k_(model.kernels()),
        batch_(batch),
        ws_(ws),
        threads_(threads),
        tap_(tap) {}

  void run() {
    begin();
    for (int l = 0; l < c_.layers; ++l) layer(l);
    predict();
  }

 private:
  void begin();
  void prepare_rope(int64_t rows);
  void layer(int l);
  void join(int l);
  void project(int l, const RowRefs& rows, int64_t at, bool with_value, bool keep);
  RowRefs select(int l, int64_t at);
  RowRefs choose(int l, const RowRefs& rows, int64_t at, const Select& select);
  void record(int l);
  void start_observed(int64_t pass, int l);
  RowRefs observed(int l) const;
  void find_keys(int l, const RowRefs& rows);
  const void* lend(int l, const PrefixEntry* entry);
  void compare(int l, const RowRefs& rows, int64_t at);
  void hold(const float* x, void* y) const;
  const void* held(const float* x, DType type, Buffer<bf16>& scratch) const;
  double cosine(const void* a, const void* b, DType type, int64_t n, double least) const;
  void attend(int l, const RowRefs& rows, std::span<const int64_t> sections);
  void finish(int l, const RowRefs& rows, int64_t observed);
  void reserve_experts();
  void run_experts(int l, const RowRefs& rows);
  void carry(int l, const RowRefs& rows);
  void predict();

  const LayerPlan& plan(int64_t pass, int l) const { return batch_[pass].plan->at(l); }
  RequestState& request(int64_t pass) { return *batch_[pass].request; }
  float* residual(const RowRef& r) { return ws_.residual[r.pass].data() + r.row * c_.dim; }
  int64_t position(const RowRef& r) const {
    const int64_t n = batch_[r.pass].request->n();
    return r.row < n ? r.row : observed_[r.pass][r.row - n];
  }

  // Row at + i of `out` = norm of the residual of rows[i].
  void norm(const RowRefs& rows, const Buffer<float>& weight, int64_t at, Activations& out);
  // Row `row` of `out`, and of `also` if there is one.
  void norm_row(const float* x, const Buffer<float>& weight, Activations& out, int64_t row,
                Activations* also = nullptr);
  // Rows [at, at + rows.size()) of `out` from those of `in`.
  void multiply(const Matrix& w, const Activations& in, Buffer<float>& out, int64_t at,
                const RowRefs& rows, int l, Op op, Write write = Write::set);
  std::vector<Share> shares(const RowRefs& rows, int l);
  void show(int l, const char* name, const float* values, int64_t rows, int64_t width) {
    if (tap_ && rows > 0) tap_(l, name, View<const float>(values, rows, width));
  }

  // f(i) for i in [0, rows), in chunks that are worth a thread; `cost`: floats touched per row.
  template <class F>
  void for_rows(int64_t rows, int64_t cost, F&& f) const {
    const int64_t chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(cost, 1));
    parallel_for((rows + chunk - 1) / chunk, threads_, [&](int64_t t) {
      for (int64_t i = t * chunk; i < std::min(rows, (t + 1) * chunk); ++i) f(i);
    });
  }

  const Model& model_;
  const ModelConfig& c_;
  const Kernels& k_;
  std::span<Pass> batch_;
  Workspace& ws_;
  int threads_;
  const Tap& tap_;
  int64_t total_ = 0;                           // rows of all requests, observed ones again
  std::vector<std::vector<int64_t>> observed_;  // per request
  std::vector<Keys> keys_;                      // per request
  std::vector<std::pair<const PrefixEntry*, const float*>> lent_here_;  // widened in this layer
};

}  // namespace bicache
