// Reads a FlatBuffer of unknown origin. Every access is checked against the buffer; after the first that does
// not fit, `ok()` is false and everything reads as zero or empty.
//
// Positions are 32 bits wide: a buffer of 2 GiB or more does not fit them, and is refused at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"
#include "core/limits.h"

namespace edge::flatbuffer {

class Buffer {
 public:
  explicit Buffer(Span span) : span_(span), ok_(span.size <= INT32_MAX) {}

  bool ok() const { return ok_; }
  const uint8_t* at(uint32_t position) const { return span_.data + position; }
  void fail() { ok_ = false; }

  // True if `count` items of `width` bytes fit at `at`.
  bool inside(uint32_t at, uint32_t count, uint32_t width) {
    const uint32_t size = static_cast<uint32_t>(span_.size);
    if (at > size || count > (size - at) / width) ok_ = false;
    return ok_;
  }

  // Of 1 to 4 bytes.
  uint32_t scalar(uint32_t at, uint32_t width) {
    if (!inside(at, 1, width)) return 0;
    uint32_t value = 0;
    for (uint32_t i = width; i-- > 0;) value = value << 8 | span_.data[at + i];
    return value;
  }

  // Where the offset at `at` points to, 0 if that is outside.
  uint32_t follow(uint32_t at) {
    const uint32_t relative = scalar(at, 4);
    return inside(at, relative, 1) ? at + relative : 0;
  }

 private:
  Span span_;
  bool ok_;
};

// A vector of scalars or of offsets to tables. Absent reads as empty.
class Vector {
 public:
  Vector() = default;
  Vector(Buffer* buffer, uint32_t at, uint32_t width) : buffer_(buffer), at_(at + 4), width_(width) {
    if (at % 4 != 0) buffer->fail();
    size_ = buffer->scalar(at, 4);
    if (!buffer->inside(at_, size_, width)) size_ = 0;
  }

  uint32_t size() const { return size_; }
  uint32_t position() const { return at_; }
  // Only of items of up to 4 bytes.
  uint32_t u(uint32_t index) const {
    return index < size_ ? buffer_->scalar(at_ + index * width_, width_) : 0;
  }
  int32_t i32(uint32_t index) const { return static_cast<int32_t>(u(index)); }
  // Where the table at `index` begins.
  uint32_t table_at(uint32_t index) const { return index < size_ ? buffer_->follow(at_ + index * 4) : 0; }

 private:
  Buffer* buffer_ = nullptr;
  uint32_t at_ = 0;
  uint32_t width_ = 0;
  uint32_t size_ = 0;
};

class Table {
 public:
  Table(Buffer* buffer, uint32_t at) : buffer_(buffer), at_(at) {
    if (at % 4 != 0) buffer->fail();
    const uint32_t vtable = at - buffer->scalar(at, 4);  // a signed distance; outside, if it wraps around
    if (vtable % 2 != 0) buffer->fail();
    vtable_ = buffer->ok() ? vtable : 0;
    vtable_size_ = buffer->scalar(vtable_, 2);
    table_size_ = buffer->scalar(vtable_ + 2, 2);
    const bool sane = vtable_size_ >= 4 && vtable_size_ % 2 == 0 && table_size_ >= 4;
    if (!sane || vtable_size_ > 4 + 2 * kMaxTableFields || !buffer->inside(vtable_, vtable_size_, 1) ||
        !buffer->inside(at, table_size_, 1))
      buffer->fail();
    for (uint32_t field = 4; buffer->ok() && field < vtable_size_; field += 2) {
      const uint32_t offset = buffer->scalar(vtable_ + field, 2);
      if (offset != 0 && (offset < 4 || offset >= table_size_)) buffer->fail();
    }
  }

  uint32_t end() const { return at_ + table_size_; }
  bool has(unsigned field) { return offset(field) != 0; }

  // Of 1 to 4 bytes; 0 if it is absent.
  uint32_t u(unsigned field, uint32_t width) {
    const uint32_t at = place(field, width);
    return at == 0 ? 0 : buffer_->scalar(at, width);
  }

  uint64_t u64(unsigned field) {
    const uint32_t at = place(field, 8);
    if (at == 0) return 0;
    return static_cast<uint64_t>(buffer_->scalar(at + 4, 4)) << 32 | buffer_->scalar(at, 4);
  }

  Vector vector(unsigned field, uint32_t width) {
    const uint32_t at = target(field);
    return at == 0 ? Vector() : Vector(buffer_, at, width);
  }

  // Where a table or vector field points to, 0 if it is absent.
  uint32_t target(unsigned field) {
    const uint32_t at = place(field, 4);
    if (at == 0) return 0;
    const uint32_t to = buffer_->follow(at);
    if (to == at) buffer_->fail();
    return buffer_->ok() ? to : 0;
  }

 private:
  // Of a field of `width` bytes, 0 if it is absent.
  uint32_t place(unsigned field, uint32_t width) {
    const uint32_t at = offset(field);
    if (at == 0) return 0;
    if (at + width > table_size_) buffer_->fail();
    return at_ + at;
  }

  uint32_t offset(unsigned field) {
    const uint32_t entry = 4 + 2 * field;
    if (!buffer_->ok() || entry + 2 > vtable_size_) return 0;
    return buffer_->scalar(vtable_ + entry, 2);
  }

  Buffer* buffer_;
  uint32_t at_;
  uint32_t vtable_ = 0;
  uint32_t vtable_size_ = 0;
  uint32_t table_size_ = 0;
};

}  // namespace edge::flatbuffer
