// One weight of a checkpoint.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/stored.h"

namespace bicache {

// Mapped, not copied; valid while the checkpoint is.
struct Tensor {
  std::string name;
  StoredType dtype = DType::f32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes = {};  // row-major, possibly unaligned
  int64_t interleaved_head = 0;           // StoredMatrix's
  std::string stored_name = {};           // what the file calls it, if that is another name

  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return n;
  }
  // Rows of the last dimension; a vector is one row.
  StoredMatrix matrix() const {
    const int64_t cols = shape.empty() ? 1 : shape.back();
    return {bytes.data(), dtype, cols == 0 ? 0 : count() / cols, cols, interleaved_head};
  }
};

}  // namespace bicache
