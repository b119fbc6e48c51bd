// Little-endian reading and writing within bounds. An overrun is remembered and asked for once at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace edge {

struct Span {
  const uint8_t* data = nullptr;
  size_t size = 0;
};

class Reader {
 public:
  explicit Reader(Span span) : data_(span.data), left_(span.size) {}

  uint8_t u8() { return static_cast<uint8_t>(integer(1)); }
  uint16_t u16() { return static_cast<uint16_t>(integer(2)); }
  uint32_t u32() { return integer(4); }
  uint64_t u64() {
    const uint32_t low = u32();
    return static_cast<uint64_t>(u32()) << 32 | low;
  }

  Span take(size_t count) {
    if (count > left_) {
      failed_ = true;
      left_ = 0;
      return {};
    }
    const Span span{data_, count};
    data_ += count;
    left_ -= count;
    return span;
  }

  void copy(void* out, size_t count) {
    const Span span = take(count);
    if (span.size == count && count > 0) memcpy(out, span.data, count);
  }

  Span rest() { return take(left_); }
  bool ok() const { return !failed_; }

 private:
  uint32_t integer(size_t width) {
    const Span span = take(width);
    uint32_t value = 0;
    for (size_t i = span.size; i-- > 0;) value = value << 8 | span.data[i];
    return value;
  }

  const uint8_t* data_;
  size_t left_;
  bool failed_ = false;
};

class Writer {
 public:
  Writer(uint8_t* out, size_t capacity) : out_(out), capacity_(capacity) {}

  void u8(uint8_t value) { integer(value, 1); }
  void u16(uint16_t value) { integer(value, 2); }
  void u32(uint32_t value) { integer(value, 4); }
  // All of it or nothing.
  void u64(uint64_t value) {
    uint8_t* to = reserve(8);
    if (to == nullptr) return;
    put(to, static_cast<uint32_t>(value), 4);
    put(to + 4, static_cast<uint32_t>(value >> 32), 4);
  }

  void bytes(const void* data, size_t count) {
    uint8_t* to = reserve(count);
    if (to != nullptr && count > 0) memcpy(to, data, count);
  }

  // A u8 length and the text, cut to 255 bytes.
  void str8(const char* text) {
    const size_t length = strnlen(text, 255);
    u8(static_cast<uint8_t>(length));
    bytes(text, length);
  }

  void fill(uint8_t value, size_t count) {
    uint8_t* to = reserve(count);
    if (to != nullptr) memset(to, value, count);
  }

  // Over bytes that are in place already.
  void skip(size_t count) { reserve(count); }

  size_t size() const { return size_; }
  bool ok() const { return !failed_; }

 private:
  uint8_t* reserve(size_t count) {
    if (failed_ || count > capacity_ - size_) {
      failed_ = true;
      return nullptr;
    }
    uint8_t* to = out_ + size_;
    size_ += count;
    return to;
  }

  void integer(uint32_t value, size_t width) {
    uint8_t* to = reserve(width);
    if (to != nullptr) put(to, value, width);
  }

  static void put(uint8_t* to, uint32_t value, size_t width) {
    for (size_t i = 0; i < width; ++i, value >>= 8) to[i] = static_cast<uint8_t>(value);
  }

  uint8_t* out_;
  size_t capacity_;
  size_t size_ = 0;
  bool failed_ = false;
};

}  // namespace edge
