// What the measurements of bench/kernels.cc share: options, timing, a line of output, the limits
// that are measured beside each group.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/parallel.h"
#include "kernels/kernels.h"
#include "peak.h"

namespace bicache::bench {

inline constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::int8, DType::int4};

struct Options {
  int threads = available_threads();
  int rounds = 5;
  bool small = false;
  bool cpu_time = false;
  std::string only;  // gemm, attention, elementwise or blas; empty: all but blas
  std::string isa;   // one table; empty: all, each only where it differs from those before
  std::string type;  // of weights; empty: all
};

// std::invalid_argument: a word that is none of the options, or a value out of its range.
Options parse(int count, char** words);

// By now().
double seconds_of(const std::function<void()>& work);

// Seconds of one call: of a long one, or of as many in a row as fill two milliseconds after one.
double seconds_a_call(const std::function<void()>& call);

double median(std::vector<double> x);

// middle + U(-1, 1).
std::vector<float> random_floats(int64_t n, float middle = 0);

// One JSON object, printed when it is complete.
class Line {
 public:
  explicit Line(std::string_view kind);
  ~Line();
  Line& add(std::string_view key, std::string_view value);  // without quotes and backslashes
  Line& add(std::string_view key, int64_t value);
  Line& add(std::string_view key, double value);  // four digits
  Line& add(std::string_view key, const std::vector<int64_t>& values);
  Line& add(std::string_view key, const std::vector<double>& values);

 private:
  Line& raw(std::string_view key, std::string_view value);
  std::string text_;
};

// The largest seen beside one group of measurements: a disturbance only ever takes away.
class Limits {
 public:
  // `type`: of the arithmetic, as in Peak.
  Limits(std::string_view isa, std::string_view type, int threads, StreamingRead& read);
  void measure();
  void report(Line& line) const;

 private:
  int threads_;
  StreamingRead& read_;
  const Peak *own_, *best_;
  std::map<const Peak*, double> gops_;
  double gb_ = 0;
};

}  // namespace bicache::bench
