// Any bytes into the frame decoder, in pieces. What it yields must be what encoding it again yields.
#include <cstdlib>
#include <cstring>

#include "core/frame.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  constexpr size_t kLimits[] = {256, 257, edge::kMaxFrame};
  const size_t limit = kLimits[data[0] % 3];
  const size_t step = data[1] % 64 + 1;
  // On the heap at its exact size, so that the address sanitizer sees the first byte behind it.
  uint8_t* buffer = static_cast<uint8_t*>(malloc(limit));
  edge::FrameDecoder decoder(buffer, limit);
  for (size_t at = 2; at < size;) {
    const size_t count = size - at < step ? size - at : step;
    edge::FrameDecoder::Event event;
    const size_t used = decoder.push(data + at, count, &event);
    if (used == 0 || used > count) abort();
    at += used;
    if (event != edge::FrameDecoder::Event::kFrame) continue;
    const edge::Frame frame = decoder.frame();
    if (frame.payload.size + edge::kFrameOverhead > limit) abort();
    uint8_t line[edge::kMaxLine];
    const size_t length = edge::encode_frame(frame.header, {}, frame.payload, line, sizeof line);
    uint8_t* again_buffer = static_cast<uint8_t*>(malloc(limit));
    edge::FrameDecoder again(again_buffer, limit);
    edge::FrameDecoder::Event second;
    if (again.push(line, length, &second) != length || second != event) abort();
    const edge::Frame& twin = again.frame();
    if (twin.payload.size != frame.payload.size || twin.header.id != frame.header.id) abort();
    if (frame.payload.size > 0 && memcmp(twin.payload.data, frame.payload.data, frame.payload.size) != 0)
      abort();
    free(again_buffer);
  }
  free(buffer);
  return 0;
}
