#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"

namespace bicache {
namespace {

constexpr int64_t kTaskBytes = 512 << 10;  // of queries and sums of a task: they stay in L2
constexpr int64_t kKeyBytes = 128 << 10;   // of packed K and V
constexpr int64_t kTaskRows = 128;         // of a task that is one of many: packing keys is cheap
constexpr int64_t kRowStep = 24;           // whole tiles of most tables
constexpr int64_t kAhead = 6;              // rows prefetched: those of one head lie far apart

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

struct Shape {
  const Kernels& kernels;
  const Attention& kernel;
  int64_t heads, kv_heads, dim;

  int64_t group() const { return heads / kv_heads; }  // query heads of one KV head
  int64_t inputs() const { return inputs_per_word(kernel.form); }
  int64_t words() const { return round_up(ceil_div(dim, inputs()), kernel.word_step); }
  int64_t width() const { return round_up(dim, kernels.panel); }
  // Keys packed at a time: as many as L2 holds beside the rest. Sums end with them, so this must
  // not depend on the rows.
  int64_t room(int64_t keys) const {
    const int64_t fit = kKeyBytes * inputs() / (4 * (words() * inputs() + width())) / kKeyBlock;
    const int64_t most = std::max<int64_t>(fit, 1) * kKeyBlock;
    return round_up(ceil_div(keys, ceil_div(keys, most)), kKeyBlock);
  }
};

// Rows [begin, end) of the [R, H / G] query rows of one KV head of one job.
struct Task {
  const AttentionJob* job;
  int64_t kv_head, begin, end;
};

// A task packs the keys it meets, so there are no more than threads need.
std::vector<Task> split(std::span<const AttentionJob> jobs, const Shape& shape, int threads) {
  int64_t units = 0;
  for (const AttentionJob& job : jobs) {
    internal_check(job.rows == 0 || job.keys > 0, "[attention] keys: expected at least 1, got ",
                   job.keys);
    if (job.rows > 0) units += shape.kv_heads;
  }
  const int64_t step = std::max(shape.kernel.row_step, kRowStep);
  const int64_t most = std::max(kTaskBytes / ((shape.words() + shape.width()) * 4), step);
  const int64_t least = units < threads ? step : kTaskRows;
  std::vector<Task> tasks;
  for (const AttentionJob& job : jobs) {
    if (job.rows == 0) continue;
    const int64_t rows = job.rows * shape.group(), pieces = ceil_div(4 * threads, units);
    const int64_t wanted = std::min(std::max(ceil_div(rows, pieces), least), most);
    const int64_t chunk = round_up(ceil_div(rows, ceil_div(rows, wanted)), step);
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      for (int64_t begin = 0; begin < rows; begin += chunk)
        tasks.push_back({&job, head, begin, std::min(begin + chunk, rows)});
    }
  }
  return tasks;
}

// Memory of one thread; names as in AttentionBlock.
struct Scratch {
  Buffer<int32_t> q;
  Buffer<float> keys, values, out, scratch;
  std::vector<Softmax> state;

  void begin(const Shape& s, int64_t rows, int64_t room) {
    const int64_t padded = round_up(rows, s.kernel.row_step);
    q.reserve(padded * s.words());
    out.reserve(padded * s.width());
    keys.reserve(room * s.words());
    values.reserve(room / s.inputs() * s.width());
    scratch.reserve(s.kernel.scratch_rows * kKeyBlock);
    std::memset(out.data(), 0, static_cast<size_t>(rows * s.width()) * sizeof(float));
    state.assign(static_cast<size_t>(rows), {-std::numeric_limits<float>::infinity(), 0});
  }
};

// Where query row i of a KV head lies in [R, H, D].
int64_t position(const Shape& s, int64_t kv_head, int64_t i) {
  return (i / s.group() * s.heads + kv_head * s.group() + i % s.group()) * s.dim;
}

void prefetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

void set_query(const Shape& s, DType kv, const float* x, int32_t* words) {
  std::memset(words, 0, static_cast<size_t>(s.words()) * sizeof *words);
  if (s.kernel.form == Form::bf16_pairs) {
    s.kernels.round_to_halves(x, s.dim, reinterpret_cast<uint16_t*>(words));
  } else if (kv == DType::bf16) {
    s.kernels.round_to_floats(x, s.dim, reinterpret_cast<float*>(words));
  } else {
    std::memcpy(words, x, static_cast<size_t>(s.dim) * sizeof(float));
  }
}

void run(const Shape& s, DType kv, const Task& task) {
  const AttentionJob& job = *task.job;
  const int64_t rows = task.end - task.begin, words = s.words(), width = s.width();
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const auto at = [&](int64_t i) { return position(s, task.kv_head, task.begin + i); };
  thread_local Scratch mine;
  const int64_t room = s.room(job.keys);
  mine.begin(s, rows, room);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kAhead < rows) prefetch(job.q + at(i + kAhead), s.dim);
    set_query(s, kv, job.q + at(i), mine.q.data() + i * words);
  }
  for (int64_t first = 0; first < job.keys; first += room) {
    const int64_t n = std::min(room, job.keys - first);
    s.kernel.pack(job.k + first, job.v + first, task.kv_head * s.dim, n, room, s.dim,
                  mine.keys.data(), mine.values.data());
    s.kernel.attend({mine.q.data(), words, mine.keys.data(), mine.values.data(), room, n, s.dim,
                     scale, rows, mine.state.data(), mine.out.data(), mine.scratch.data()});
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kAhead < rows) prefetch(job.out + at(i + kAhead), s.dim);
    s.kernels.divide(mine.out.data() + i * width, mine.state[static_cast<size_t>(i)].sum, s.dim,
                     job.out + at(i));
  }
}

void charge(const AttentionJob& job, const Shape& s, DType kv) {
  if (job.work == nullptr || job.rows == 0) return;
  job.work->rows_of(Op::attention) += job.rows;
  job.work->flops += 4 * job.rows * job.keys * s.heads * s.dim;
  job.work->bytes += 2 * job.keys * s.kv_heads * s.dim * size_bytes(kv);
}

}  // namespace

void attention(const Kernels& kernels, std::span<const AttentionJob> jobs, int64_t heads,
               int64_t kv_heads, int64_t head_dim, DType kv, int threads) {
  internal_check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && head_dim > 0,
                 "[attention] heads: expected H a multiple of G, got H = ", heads,
                 ", G = ", kv_heads, ", D = ", head_dim);
  internal_check(!is_quantised(kv), "[attention] K/V: expected f32 or bf16, got ", name(kv));
  const Attention& kernel = kv == DType::bf16 ? kernels.attention_bf16 : kernels.attention_f32;
  const Shape shape{kernels, kernel, heads, kv_heads, head_dim};
  int64_t flops = 0;
  for (const AttentionJob& job : jobs) flops += 4 * job.rows * job.keys * heads * head_dim;
  threads = worth_threads(threads, flops / kernel.speed);
  const std::vector<Task> tasks = split(jobs, shape, threads);
  for (const AttentionJob& job : jobs) charge(job, shape, kv);
  parallel_for(static_cast<int64_t>(tasks.size()), threads,
               [&](int64_t i) { run(shape, kv, tasks[static_cast<size_t>(i)]); });
}

}  // namespace bicache
