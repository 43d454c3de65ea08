#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"

namespace bicache {
namespace {

// At most kAttentionRows query rows of one head of one job.
struct Task {
  const AttentionJob* job;
  int64_t head, begin, end;
};

std::vector<Task> split(std::span<const AttentionJob> jobs, int64_t heads) {
  std::vector<Task> tasks;
  for (const AttentionJob& job : jobs) {
    internal_check(job.rows == 0 || job.keys > 0, "[attention] keys: expected at least 1, got ",
                   job.keys);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t begin = 0; begin < job.rows; begin += kAttentionRows) {
        tasks.push_back({&job, head, begin, std::min(begin + kAttentionRows, job.rows)});
      }
    }
  }
  return tasks;
}

void charge(const AttentionJob& job, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  if (job.work == nullptr || job.rows == 0) return;
  job.work->rows_of(Op::attention) += job.rows;
  job.work->flops += 4 * job.rows * job.keys * heads * head_dim;
  job.work->bytes += 2 * job.keys * kv_heads * head_dim * static_cast<int64_t>(sizeof(float));
}

}  // namespace

int64_t attention_scratch(int64_t head_dim) {
  const int64_t padded = (head_dim + kMaxPanel - 1) / kMaxPanel * kMaxPanel;
  return (head_dim + padded + kAttentionRows) * kKeyBlock;  // keys, values, scores
}

void attention(const Kernels& kernels, std::span<const AttentionJob> jobs, int64_t heads,
               int64_t kv_heads, int64_t head_dim, int threads) {
  internal_check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && head_dim > 0,
                 "[attention] heads: expected H a multiple of G, got H = ", heads,
                 ", G = ", kv_heads, ", D = ", head_dim);
  const std::vector<Task> tasks = split(jobs, heads);
  int64_t flops = 0;
  for (const AttentionJob& job : jobs) {
    charge(job, heads, kv_heads, head_dim);
    flops += 4 * job.rows * job.keys * heads * head_dim;
  }
  threads = worth_threads(threads, flops);
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    thread_local Buffer<float> scratch;
    scratch.reserve(attention_scratch(head_dim));
    const auto& [job, head, begin, end] = tasks[static_cast<size_t>(i)];
    const int64_t stride = heads * head_dim, first = begin * stride + head * head_dim;
    kernels.attention(job->q + first, stride, job->k, job->v, head * kv_heads / heads * head_dim,
                      job->keys, head_dim, scale, job->out + first, stride, end - begin,
                      scratch.data());
  });
}

}  // namespace bicache
