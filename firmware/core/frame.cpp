#include "core/frame.h"

#include <cstring>

#include "core/crc32.h"

namespace edge {
namespace {

constexpr uint8_t kDelimiter = 0;
constexpr uint8_t kFullGroup = 0xFF;  // 254 bytes without a zero, and none after them

class CobsWriter {
 public:
  CobsWriter(uint8_t* out, size_t capacity) : out_(out), capacity_(capacity) {}

  void put(Span span) {
    const uint8_t* data = span.data;
    size_t left = span.size;
    while (left > 0) {
      // A full group is followed by a new code byte only if data follows: the encoding stays the shortest.
      if (!open_) open_group();
      size_t run =
          left < static_cast<size_t>(kFullGroup - code_) ? left : static_cast<size_t>(kFullGroup - code_);
      const void* zero = memchr(data, 0, run);
      if (zero != nullptr) run = static_cast<size_t>(static_cast<const uint8_t*>(zero) - data);
      append(data, run);
      code_ = static_cast<uint8_t>(code_ + run);
      data += run;
      left -= run;
      if (zero != nullptr) {
        close_group();
        open_group();
        ++data;
        --left;
      } else if (code_ == kFullGroup) {
        close_group();
      }
    }
  }

  size_t finish() {
    if (open_) close_group();
    append(&kDelimiter, 1);
    return failed_ ? 0 : size_;
  }

 private:
  void open_group() {
    code_at_ = size_;
    code_ = 1;
    open_ = true;
    append(&kDelimiter, 1);  // the code takes this place when the group closes
  }

  void close_group() {
    if (!failed_) out_[code_at_] = code_;
    open_ = false;
  }

  void append(const uint8_t* data, size_t size) {
    if (failed_ || size > capacity_ - size_) {
      failed_ = true;
      return;
    }
    memcpy(out_ + size_, data, size);
    size_ += size;
  }

  uint8_t* out_;
  size_t capacity_;
  size_t size_ = 0;
  size_t code_at_ = 0;
  uint8_t code_ = 1;
  bool open_ = false;
  bool failed_ = false;
};

}  // namespace

bool FrameDecoder::append(const uint8_t* data, size_t size) {
  if (size > max_frame_ - size_) {
    skipping_ = true;
    return false;
  }
  memcpy(buffer_ + size_, data, size);
  size_ += size;
  return true;
}

FrameDecoder::Event FrameDecoder::finish() {
  const bool empty = !started_;
  const bool dropped = skipping_;
  const bool truncated = group_left_ > 0;
  const size_t size = size_;
  size_ = 0;
  group_left_ = 0;
  started_ = zero_pending_ = skipping_ = false;

  if (empty || dropped) return Event::kNone;
  if (truncated) return Event::kDecode;
  if (size < kFrameOverhead) return Event::kShort;
  Reader reader({buffer_, size});
  frame_.header.type = reader.u8();
  frame_.header.flags = reader.u8();
  frame_.header.seq = reader.u16();
  frame_.header.id = reader.u32();
  frame_.payload = reader.take(size - kFrameOverhead);
  return reader.u32() == crc32(0, buffer_, size - 4) ? Event::kFrame : Event::kCrc;
}

size_t FrameDecoder::push(const uint8_t* data, size_t size, Event* event) {
  *event = Event::kNone;
  size_t at = 0;
  while (at < size) {
    if (data[at] == 0) {
      ++at;
      *event = finish();
      if (*event != Event::kNone) return at;
      continue;
    }
    // Up to the delimiter: whole runs at once.
    size_t run = size - at;
    if (!skipping_ && group_left_ > 0 && run > group_left_) run = group_left_;
    if (const void* zero = memchr(data + at, 0, run)) {
      run = static_cast<size_t>(static_cast<const uint8_t*>(zero) - (data + at));
    }
    if (skipping_) {
      at += run;
      continue;
    }
    bool fits = true;
    if (group_left_ > 0) {
      fits = append(data + at, run);
      group_left_ = static_cast<uint8_t>(group_left_ - run);
      at += run;
    } else {
      const uint8_t code = data[at++];
      const uint8_t zero = 0;
      if (zero_pending_) fits = append(&zero, 1);
      started_ = true;
      zero_pending_ = code != kFullGroup;
      group_left_ = static_cast<uint8_t>(code - 1);
    }
    if (!fits) {
      *event = Event::kOversize;
      return at;
    }
  }
  return at;
}

size_t encode_frame(const FrameHeader& header, Span head, Span body, uint8_t* out, size_t capacity) {
  uint8_t start[8];
  Writer fields(start, sizeof start);
  fields.u8(header.type);
  fields.u8(header.flags);
  fields.u16(header.seq);
  fields.u32(header.id);
  uint32_t crc = crc32(0, start, sizeof start);
  crc = crc32(crc, head.data, head.size);
  crc = crc32(crc, body.data, body.size);
  uint8_t end[4];
  Writer(end, sizeof end).u32(crc);

  CobsWriter cobs(out, capacity);
  cobs.put(Span{start, sizeof start});
  cobs.put(head);
  cobs.put(body);
  cobs.put(Span{end, sizeof end});
  return cobs.finish();
}

}  // namespace edge
