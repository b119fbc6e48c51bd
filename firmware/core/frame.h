// Frames on the serial line: COBS, header, CRC-32. See docs/wire-protocol.md, section 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"
#include "core/limits.h"

namespace edge {

constexpr uint8_t kFlagFragment = 1;
constexpr uint8_t kFlagRetry = 2;

struct FrameHeader {
  uint8_t type = 0;
  uint8_t flags = 0;
  uint16_t seq = 0;
  uint32_t id = 0;
};

struct Frame {
  FrameHeader header;
  Span payload;  // points into the decoder's buffer, valid until the next push
};

// Bytes in, frames or errors out. Never writes behind `max_frame` bytes of the caller's buffer.
class FrameDecoder {
 public:
  enum class Event : uint8_t { kNone, kFrame, kDecode, kShort, kCrc, kOversize };

  FrameDecoder(uint8_t* buffer, size_t max_frame) : buffer_(buffer), max_frame_(max_frame) {}

  // Consumes bytes up to and including the one that makes an event; returns how many.
  size_t push(const uint8_t* data, size_t size, Event* event);

  // The frame of the last kFrame event.
  const Frame& frame() const { return frame_; }

 private:
  bool append(const uint8_t* data, size_t size);
  Event finish();

  uint8_t* buffer_;
  size_t max_frame_;
  size_t size_ = 0;
  uint8_t group_left_ = 0;
  bool started_ = false;       // bytes since the last delimiter
  bool zero_pending_ = false;  // the group that ended stands for a zero, if another follows
  bool skipping_ = false;      // oversize: everything up to the next delimiter is dropped
  Frame frame_;
};

// Writes one frame whose payload is `head` followed by `body`, with its delimiter. Returns the bytes written,
// 0 if `capacity` is too small.
size_t encode_frame(const FrameHeader& header, Span head, Span body, uint8_t* out, size_t capacity);

}  // namespace edge
