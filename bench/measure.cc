#include "measure.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "base/check.h"

namespace bicache::bench {
namespace {

constexpr std::string_view kParts[] = {"gemm", "attention", "elementwise", "blas"};

std::string digits(double x) {
  char text[32];
  std::snprintf(text, sizeof text, x < 1000 ? "%.4g" : "%.0f", x);
  return text;
}
std::string digits(int64_t x) { return cat(x); }

template <class T>
std::string joined(const std::vector<T>& values) {
  std::string all;
  for (T v : values) all += cat(all.empty() ? "" : ", ", digits(v));
  return cat("[", all, "]");
}

}  // namespace

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    const auto value = [&]() -> std::string {
      require(i + 1 < count, "[bench] ", word, ": expected a value, got none");
      return words[++i];
    };
    const auto number = [&] {
      const std::string text = value();
      const int n = std::atoi(text.c_str());
      require(n >= 1, "[bench] ", word, ": expected at least 1, got ", text);
      return n;
    };
    if (word == "--cpu-time") {
      options.cpu_time = true;
    } else if (word == "--threads") {
      options.threads = number();
    } else if (word == "--rounds") {
      options.rounds = number();
    } else if (word == "--small") {
      options.small = true;
      options.rounds = 1;
    } else if (word == "--isa") {
      options.isa = choose_kernels(value().c_str()).isa;
    } else if (word == "--type") {
      options.type = value();
      const bool known = std::any_of(std::begin(kTypes), std::end(kTypes),
                                     [&](DType t) { return name(t) == options.type; });
      require(known, "[bench] --type: expected f32, bf16, int8 or int4, got ", options.type);
    } else if (word == "--only") {
      options.only = value();
      const bool known =
          std::find(std::begin(kParts), std::end(kParts), options.only) != std::end(kParts);
      require(known, "[bench] --only: expected gemm, attention, elementwise or blas, got ",
              options.only);
    } else {
      fail(
          "[bench] expected --threads, --rounds, --small, --cpu-time, --isa, --type or --only, "
          "got ",
          word);
    }
  }
  require(!options.cpu_time || options.threads == 1,
          "[bench] --cpu-time: expected --threads 1, got ", options.threads);
  return options;
}

double seconds_of(const std::function<void()>& work) {
  const double begin = now();
  work();
  return std::max(now() - begin, 1e-9);
}

double seconds_a_call(const std::function<void()>& call) {
  const double first = seconds_of(call);
  if (first > 20e-3) return first;
  const int calls = static_cast<int>(std::clamp(2e-3 / first, 1.0, 10000.0));
  const double all = seconds_of([&] {
    for (int i = 0; i < calls; ++i) call();
  });
  return all / calls;
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return (x[(n - 1) / 2] + x[n / 2]) / 2;
}

std::vector<float> random_floats(int64_t n, float middle) {
  std::mt19937 bits(1);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = middle + static_cast<float>(bits() >> 8) * 0x1p-23f - 1;
  return x;
}

Line::Line(std::string_view kind) : text_(cat("{\"kind\": \"", kind, "\"")) {}

Line::~Line() {
  std::printf("%s}\n", text_.c_str());
  std::fflush(stdout);
}

Line& Line::raw(std::string_view key, std::string_view value) {
  text_ += cat(", \"", key, "\": ", value);
  return *this;
}

Line& Line::add(std::string_view key, std::string_view value) {
  return raw(key, cat("\"", value, "\""));
}
Line& Line::add(std::string_view key, int64_t value) { return raw(key, digits(value)); }
Line& Line::add(std::string_view key, double value) { return raw(key, digits(value)); }
Line& Line::add(std::string_view key, const std::vector<int64_t>& values) {
  return raw(key, joined(values));
}
Line& Line::add(std::string_view key, const std::vector<double>& values) {
  return raw(key, joined(values));
}

Limits::Limits(std::string_view isa, std::string_view type, int threads, StreamingRead& read)
    : threads_(threads), read_(read), own_(&best_peak(isa, type)), best_(&best_peak("", type)) {}

void Limits::measure() {
  gops_[own_] = std::max(gops_[own_], gops(*own_, threads_));
  if (best_ != own_) gops_[best_] = std::max(gops_[best_], gops(*best_, threads_));
  gb_ = std::max(gb_, read_.gb_per_second(threads_));
}

void Limits::report(Line& line) const {
  line.add("peak_of", own_->name).add("peak", gops_.at(own_)).add("best_peak", gops_.at(best_));
  line.add("read_gb_s", gb_);
}

}  // namespace bicache::bench
