#include "engine/choices.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace bicache {
namespace {

constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

struct Kept {
  int64_t token;
  double x;  // logit
};

// The most probable tokens first; ties: the lower id.
bool more_probable(const Kept& a, const Kept& b) {
  return a.x > b.x || (a.x == b.x && a.token < b.token);
}

// Orders the first of `tokens` until `enough`(how many are in order) says so; returns their number.
template <class F>
size_t order_until(std::vector<Kept>& tokens, F&& enough) {
  size_t done = 0;
  for (size_t next = 64; done < tokens.size(); next *= 8) {
    const size_t end = std::min(next, tokens.size());
    std::partial_sort(tokens.begin() + static_cast<int64_t>(done),
                      tokens.begin() + static_cast<int64_t>(end), tokens.end(), more_probable);
    done = end;
    if (enough(done)) break;
  }
  return done;
}

// Leaves the tokens of top_p and top_k, the most probable first.
void truncate(const GenerationOptions& o, double scale, std::vector<Kept>& tokens) {
  double best = kMinusInf, sum = 0;
  for (const Kept& t : tokens) best = std::max(best, t.x);
  for (const Kept& t : tokens) sum += std::exp((t.x - best) / scale);
  if (o.top_p && *o.top_p < 1) {
    size_t keep = 0;
    double mass = 0;
    order_until(tokens, [&](size_t ready) {
      for (; keep < ready && mass <= *o.top_p; ++keep)
        mass += std::exp((tokens[keep].x - best) / scale) / sum;
      return mass > *o.top_p;
    });
    tokens.resize(std::max<size_t>(keep, 1));
  }
  if (!o.top_k || *o.top_k >= static_cast<int64_t>(tokens.size())) return;
  size_t keep = static_cast<size_t>(*o.top_k);
  const size_t ready = order_until(
      tokens, [&](size_t n) { return n > keep && tokens[n - 1].x < tokens[keep - 1].x; });
  while (keep < ready && tokens[keep].x == tokens[keep - 1].x) ++keep;
  tokens.resize(keep);
}

// The largest x - T ln(-ln u) wins: a draw from softmax(x / T). Beyond 1e300, T would overflow the
// product, and all scores tie.
int32_t draw(const std::vector<Kept>& tokens, double temperature, const TokenNoise& noise) {
  temperature = std::min(temperature, 1e300);
  double best = kMinusInf;
  int64_t token = tokens.front().token;
  for (const Kept& t : tokens) {
    const double score = t.x - temperature * std::log(-std::log(noise(t.token)));
    if (score > best || (score == best && t.token < token)) {
      best = score;
      token = t.token;
    }
  }
  return static_cast<int32_t>(token);
}

double confidence(const GenerationOptions& o, double scale, const std::vector<Kept>& tokens,
                  int32_t token) {
  double first = kMinusInf, second = kMinusInf, chosen = kMinusInf, sum = 0;
  for (const Kept& t : tokens) {
    if (t.token == token) chosen = t.x;
    second = std::max(second, std::min(first, t.x));
    first = std::max(first, t.x);
  }
  if (std::isinf(first)) return 0;
  for (const Kept& t : tokens) sum += std::exp((t.x - first) / scale);
  if (o.remasking == "topk_margin") return (1 - std::exp((second - first) / scale)) / sum;
  if (o.remasking != "entropy") return std::exp((chosen - first) / scale) / sum;
  double negative_entropy = 0;
  for (const Kept& t : tokens) {
    const double p = std::exp((t.x - first) / scale) / sum;
    negative_entropy += p * std::log(p + 1e-10);
  }
  return negative_entropy;
}

}  // namespace

Choice choose_token(const GenerationOptions& o, const float* logits, int64_t vocab,
                    const RowStats& stats, const TokenNoise& noise) {
  const bool truncated = o.top_p || o.top_k, noisy = o.temperature > 0;
  Choice choice{static_cast<int32_t>(stats.argmax), 0};
  if (!o.dream() && !noisy) return choice;
  if (o.remasking == "maskgit_plus" && !noisy && !truncated) {
    choice.confidence = std::isinf(stats.max) ? 0 : 1 / stats.sum_exp;
    return choice;
  }
  if (o.remasking == "origin" && !noisy) return choice;
  const double scale = noisy ? o.temperature : 1;
  thread_local std::vector<Kept> tokens;
  tokens.clear();
  for (int64_t v = 0; v < vocab; ++v) tokens.push_back({v, logits[v]});
  if (truncated && !std::isinf(stats.max)) truncate(o, scale, tokens);
  if (noisy) choice.token = draw(tokens, o.temperature, noise);
  if (o.dream() && o.remasking != "origin")
    choice.confidence = confidence(o, scale, tokens, choice.token);
  return choice;
}

}  // namespace bicache
