// Matrices as files store them, read row by row as float32.
#pragma once

#include <cstddef>
#include <cstring>
#include <string_view>

#include "base/check.h"
#include "base/dtype.h"
#include "base/hash.h"

namespace bicache {

// How numbers are stored: in blocks of a few that lie together, and may share a scale.
struct Format {
  const char* name;
  DType held;  // what a matrix of it is held in if nobody says otherwise
  int64_t block, block_bytes;
  // out[0..blocks * block) = the numbers; `from` need not be aligned. Null: known by its size only.
  void (*widen)(const std::byte* from, int64_t blocks, float* out);
};

inline void widen_f32(const std::byte* from, int64_t blocks, float* out) {
  std::memcpy(out, from, static_cast<size_t>(blocks) * sizeof(float));
}

inline void widen_bf16(const std::byte* from, int64_t blocks, float* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    bf16 x;
    std::memcpy(&x, from + i * 2, sizeof x);
    out[i] = to_float(x);
  }
}

inline constexpr Format kStoredF32 = {"f32", DType::f32, 1, 4, widen_f32};
inline constexpr Format kStoredBf16 = {"bf16", DType::bf16, 1, 2, widen_bf16};

// One of the formats: float32 and bfloat16, or what files/ggml_types.h knows.
class StoredType {
 public:
  StoredType(DType type) : format_(type == DType::f32 ? &kStoredF32 : &kStoredBf16) {
    internal_check(!is_quantised(type), "[stored] type: expected f32 or bf16, got ",
                   bicache::name(type));
  }
  StoredType(const Format& format) : format_(&format) {}

  const Format& format() const { return *format_; }
  // The same in every process.
  uint64_t id() const {
    if (format_ == &kStoredF32) return static_cast<uint64_t>(DType::f32);
    if (format_ == &kStoredBf16) return static_cast<uint64_t>(DType::bf16);
    return hash_bytes(std::as_bytes(std::span(std::string_view(format_->name))));
  }
  friend bool operator==(StoredType a, StoredType b) { return a.format_ == b.format_; }

 private:
  const Format* format_;
};

inline std::string_view name(StoredType t) { return t.format().name; }

// Row-major [rows, cols], cols a multiple of the format's block; not necessarily aligned.
struct StoredMatrix {
  const std::byte* data = nullptr;
  StoredType type = DType::f32;
  int64_t rows = 0, cols = 0;
  // > 0: the rows of every head of so many are stored with those of its second half between those
  // of its first (llama.cpp's order, for its RoPE of neighbours).
  int64_t interleaved_head = 0;

  // out[0..n) = elements [first, first + n) of row `i`; whole blocks.
  void read(int64_t i, int64_t first, int64_t n, float* out) const {
    const Format& f = type.format();
    const int64_t block = (stored_row(i) * cols + first) / f.block;
    f.widen(data + block * f.block_bytes, n / f.block, out);
  }
  // out[0..cols) = row `i`.
  void row(int64_t i, float* out) const { read(i, 0, cols, out); }

 private:
  int64_t stored_row(int64_t i) const {
    if (interleaved_head == 0) return i;
    const int64_t k = i % interleaved_head, half = interleaved_head / 2;
    return i - k + k % half * 2 + k / half;
  }
};

}  // namespace bicache
