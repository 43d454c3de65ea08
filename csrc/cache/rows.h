// RowSet: which rows (token positions of one canvas), as ascending, disjoint, non-touching spans.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace bicache {

struct RowSpan {
  int64_t begin = 0, end = 0;  // [begin, end)
  bool operator==(const RowSpan&) const = default;
};

class RowSet {
 public:
  RowSet() = default;
  // Rows [begin, end); empty if begin >= end.
  static RowSet span(int64_t begin, int64_t end);
  // From any rows, in any order, repeated or not.
  static RowSet of(std::vector<int64_t> rows);

  int64_t size() const;
  bool empty() const { return spans_.empty(); }
  bool contains(int64_t row) const;
  bool contains(const RowSet& other) const { return other.minus(*this).empty(); }
  const std::vector<RowSpan>& spans() const { return spans_; }
  std::vector<int64_t> list() const;
  std::string str() const;  // "0..4 7 9..11"

  RowSet unite(const RowSet& other) const;
  RowSet minus(const RowSet& other) const;
  RowSet intersect(const RowSet& other) const { return minus(minus(other)); }

  bool operator==(const RowSet&) const = default;

  // f(row) in ascending order.
  template <class F>
  void for_each(F&& f) const {
    for (const RowSpan& s : spans_)
      for (int64_t i = s.begin; i < s.end; ++i) f(i);
  }

 private:
  void append(int64_t begin, int64_t end);  // begin >= the last span's begin

  std::vector<RowSpan> spans_;
};

}  // namespace bicache
