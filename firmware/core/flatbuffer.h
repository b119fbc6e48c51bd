// Reads a FlatBuffer of unknown origin. Every access is checked against the buffer; after the first that does
// not fit, `ok()` is false and everything reads as zero or empty.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"

namespace edge::flatbuffer {

class Buffer {
 public:
  explicit Buffer(Span span) : span_(span) {}

  bool ok() const { return ok_; }
  size_t size() const { return span_.size; }
  void fail() { ok_ = false; }

  // True if `count` items of `width` bytes fit at `at`. A uint64_t product of two 32-bit numbers cannot
  // overflow.
  bool inside(uint64_t at, uint64_t count, uint64_t width) {
    if (at > span_.size || count * width > span_.size - at) ok_ = false;
    return ok_;
  }

  uint64_t scalar(uint64_t at, size_t width) {
    if (!inside(at, 1, width)) return 0;
    uint64_t value = 0;
    for (size_t i = 0; i < width; ++i) value |= static_cast<uint64_t>(span_.data[at + i]) << (8 * i);
    return value;
  }

  const uint8_t* data(uint64_t at) const { return span_.data + at; }

 private:
  Span span_;
  bool ok_ = true;
};

// A vector of scalars or of offsets to tables. Absent reads as empty.
class Vector {
 public:
  Vector() = default;
  Vector(Buffer* buffer, uint64_t at, size_t width) : buffer_(buffer), at_(at + 4), width_(width) {
    if (at % 4 != 0) buffer->fail();
    size_ = static_cast<uint32_t>(buffer->scalar(at, 4));
    if (!buffer->inside(at_, size_, width)) size_ = 0;
    present_ = buffer->ok();
  }

  bool present() const { return present_; }
  uint32_t size() const { return size_; }
  uint64_t position() const { return at_; }
  uint64_t u(uint32_t index) const {
    return index < size_ ? buffer_->scalar(at_ + index * width_, width_) : 0;
  }
  int32_t i32(uint32_t index) const { return static_cast<int32_t>(u(index)); }
  // Where the table at `index` begins.
  uint64_t table_at(uint32_t index) const {
    const uint64_t from = at_ + static_cast<uint64_t>(index) * 4;
    return index < size_ ? from + buffer_->scalar(from, 4) : 0;
  }

 private:
  Buffer* buffer_ = nullptr;
  uint64_t at_ = 0;
  uint64_t width_ = 0;
  uint32_t size_ = 0;
  bool present_ = false;
};

class Table {
 public:
  Table(Buffer* buffer, uint64_t at) : buffer_(buffer), at_(at) {
    if (at % 4 != 0) buffer->fail();
    const int64_t vtable = static_cast<int64_t>(at) - static_cast<int32_t>(buffer->scalar(at, 4));
    if (vtable < 0 || vtable % 2 != 0) buffer->fail();
    vtable_ = buffer->ok() ? static_cast<uint64_t>(vtable) : 0;
    vtable_size_ = buffer->scalar(vtable_, 2);
    table_size_ = buffer->scalar(vtable_ + 2, 2);
    const bool sane = vtable_size_ >= 4 && vtable_size_ % 2 == 0 && table_size_ >= 4;
    if (!sane || !buffer->inside(vtable_, vtable_size_, 1) || !buffer->inside(at, table_size_, 1))
      buffer->fail();
    for (uint64_t field = 4; buffer->ok() && field < vtable_size_; field += 2) {
      const uint64_t offset = buffer->scalar(vtable_ + field, 2);
      if (offset != 0 && (offset < 4 || offset >= table_size_)) buffer->fail();
    }
  }

  uint64_t end() const { return at_ + table_size_; }
  bool has(unsigned field) { return offset(field) != 0; }

  uint64_t u(unsigned field, size_t width, uint64_t fallback = 0) {
    const uint64_t at = offset(field);
    if (at == 0) return fallback;
    if (at + width > table_size_) buffer_->fail();
    return buffer_->scalar(at_ + at, width);
  }
  int32_t i32(unsigned field) { return static_cast<int32_t>(u(field, 4)); }
  int8_t i8(unsigned field) { return static_cast<int8_t>(u(field, 1)); }

  Vector vector(unsigned field, size_t width) {
    const uint64_t at = target(field);
    return at == 0 ? Vector() : Vector(buffer_, at, width);
  }

  // Where a table or vector field points to, 0 if it is absent.
  uint64_t target(unsigned field) {
    const uint64_t at = offset(field);
    if (at == 0) return 0;
    const uint64_t relative = u(field, 4);
    if (relative == 0) buffer_->fail();
    return buffer_->ok() ? at_ + at + relative : 0;
  }

 private:
  uint64_t offset(unsigned field) {
    const uint64_t entry = 4 + 2 * static_cast<uint64_t>(field);
    if (!buffer_->ok() || entry + 2 > vtable_size_) return 0;
    return buffer_->scalar(vtable_ + entry, 2);
  }

  Buffer* buffer_;
  uint64_t at_;
  uint64_t vtable_ = 0;
  uint64_t vtable_size_ = 0;
  uint64_t table_size_ = 0;
};

}  // namespace edge::flatbuffer
