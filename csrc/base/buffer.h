// Owned, 64-byte aligned, uninitialised memory for trivially copyable elements.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "base/check.h"

namespace bicache {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size), data_(allocate(size)) {}
  Buffer(Buffer&& o) noexcept : size_(std::exchange(o.size_, 0)), data_(std::move(o.data_)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    size_ = std::exchange(o.size_, 0);
    data_ = std::move(o.data_);
    return *this;
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  int64_t size_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }

  // At least `size` elements; contents are lost when it grows.
  void reserve(int64_t size) {
    if (size <= size_) return;
    *this = Buffer();  // frees first
    *this = Buffer(size);
  }

 private:
  static constexpr int64_t kAlign = 64, kHugePage = int64_t{2} << 20;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };

  static T* allocate(int64_t size) {
    if (size == 0) return nullptr;
    const int64_t bytes = checked_mul(size, sizeof(T), "buffer");
    const int64_t huge = checked_add(bytes, kHugePage - 1, "buffer") / kHugePage * kHugePage;
    const int64_t align = huge - bytes > bytes / 3 ? kAlign : kHugePage;
    const int64_t padded = checked_add(bytes, align - 1, "buffer") / align * align;
    void* p = std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(padded));
    if (p == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // A page table walk for every 4 KiB would cost products a tenth of their speed, and those of
    // few rows a quarter.
    if (align == kHugePage) madvise(p, static_cast<size_t>(padded), MADV_HUGEPAGE);
#endif
    return static_cast<T*>(p);
  }

  int64_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace bicache
