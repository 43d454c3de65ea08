#include "cache/rows.h"

#include <algorithm>

#include "base/check.h"

namespace bicache {

void RowSet::append(int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (!spans_.empty() && begin <= spans_.back().end) {
    spans_.back().end = std::max(spans_.back().end, end);
  } else {
    spans_.push_back({begin, end});
  }
}

RowSet RowSet::span(int64_t begin, int64_t end) {
  RowSet r;
  r.append(begin, end);
  return r;
}

RowSet RowSet::of(std::vector<int64_t> rows) {
  std::sort(rows.begin(), rows.end());
  RowSet r;
  for (const int64_t i : rows) r.append(i, i + 1);
  return r;
}

int64_t RowSet::size() const {
  int64_t n = 0;
  for (const RowSpan& s : spans_) n += s.end - s.begin;
  return n;
}

bool RowSet::contains(int64_t row) const {
  return std::any_of(spans_.begin(), spans_.end(),
                     [row](const RowSpan& s) { return s.begin <= row && row < s.end; });
}

std::vector<int64_t> RowSet::list() const {
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(size()));
  for_each([&](int64_t i) { rows.push_back(i); });
  return rows;
}

std::string RowSet::str() const {
  std::string text;
  for (const RowSpan& s : spans_) {
    if (!text.empty()) text += ' ';
    text += std::to_string(s.begin);
    if (s.end > s.begin + 1) text += ".." + std::to_string(s.end - 1);
  }
  return text.empty() ? "no rows" : text;
}

RowSet RowSet::unite(const RowSet& other) const {
  RowSet r;
  auto a = spans_.begin(), b = other.spans_.begin();
  while (a != spans_.end() || b != other.spans_.end()) {
    const bool left = b == other.spans_.end() || (a != spans_.end() && a->begin <= b->begin);
    const RowSpan& s = left ? *a++ : *b++;
    r.append(s.begin, s.end);
  }
  return r;
}

RowSet RowSet::minus(const RowSet& other) const {
  RowSet r;
  auto b = other.spans_.begin();
  for (const RowSpan& s : spans_) {
    int64_t at = s.begin;
    while (b != other.spans_.end() && b->end <= at) ++b;
    for (auto c = b; c != other.spans_.end() && c->begin < s.end; ++c) {
      r.append(at, c->begin);
      at = std::max(at, c->end);
    }
    r.append(at, s.end);
  }
  return r;
}

}  // namespace bicache
