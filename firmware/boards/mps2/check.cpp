// Not the firmware: an image that answers questions about single parts of core/, so that the tests' vectors
// run on the Cortex-M as well. A question is a frame whose type says which; the answer is a RESULT with its
// id.
#include <cstring>

#include "boards/mps2/hal.h"
#include "core/bytes.h"
#include "core/crc32.h"
#include "core/frame.h"
#include "core/sha256.h"
#include "core/validator.h"

namespace {

enum Question : uint8_t { kEncode = 1, kDecode = 2, kSha256 = 3, kCrc32 = 4, kValidate = 5 };

edge::mps2::Mps2Hal hal;
uint8_t received[edge::kMaxFrame];
uint8_t scratch[edge::kMaxFrame];
uint8_t answer[edge::kMaxFrame - edge::kFrameOverhead];
uint8_t line[edge::kMaxLine];

using Decoder = edge::FrameDecoder;

edge::FrameHeader read_header(edge::Reader& in) {
  edge::FrameHeader header;
  header.type = in.u8();
  header.flags = in.u8();
  header.seq = in.u16();
  header.id = in.u32();
  return header;
}

// Header and payload of a frame -> what travels.
void encode(edge::Reader& in, edge::Writer& out) {
  const edge::FrameHeader header = read_header(in);
  const edge::Span payload = in.rest();
  out.skip(edge::encode_frame(header, {}, payload, answer, sizeof answer));
}

// max_frame, bytes at a time and a stream -> the decoder's events.
void decode(edge::Reader& in, edge::Writer& out) {
  const size_t max_frame = in.u16();
  const size_t step = in.u16();
  if (max_frame > sizeof scratch || step == 0) return;
  Decoder decoder(scratch, max_frame);
  edge::Span left = in.rest();
  while (left.size > 0) {
    const size_t count = left.size < step ? left.size : step;
    for (size_t at = 0; at < count;) {
      Decoder::Event event;
      at += decoder.push(left.data + at, count - at, &event);
      if (event == Decoder::Event::kNone) continue;
      out.u8(static_cast<uint8_t>(event));
      if (event != Decoder::Event::kFrame) continue;
      const edge::Frame& frame = decoder.frame();
      out.u8(frame.header.type);
      out.u8(frame.header.flags);
      out.u16(frame.header.seq);
      out.u32(frame.header.id);
      out.u16(static_cast<uint16_t>(frame.payload.size));
      out.bytes(frame.payload.data, frame.payload.size);
    }
    left = {left.data + count, left.size - count};
  }
}

// Bytes in one update or two, cut in the middle -> the digest of each way.
void sha256(edge::Span bytes, edge::Writer& out) {
  const size_t cuts[] = {0, bytes.size / 2};
  for (const size_t cut : cuts) {
    edge::Sha256 sha;
    sha.update(bytes.data, cut);
    sha.update(bytes.data + cut, bytes.size - cut);
    uint8_t digest[edge::kSha256Size];
    sha.finish(digest);
    out.bytes(digest, sizeof digest);
  }
}

// A model -> code, bytes of its inputs and outputs, and the text.
void validate(edge::Span model, edge::Writer& out) {
  uint8_t operators[128];
  const size_t count = edge::known_operators(operators, sizeof operators);
  // The model must be aligned as it is in flash.
  alignas(16) static uint8_t aligned[edge::kMaxFrame];
  memcpy(aligned, model.data, model.size);
  edge::ModelShape shape;
  const edge::Status status = edge::validate_model({aligned, model.size}, {operators, count}, &shape);
  out.u16(static_cast<uint16_t>(status.code));
  out.u32(shape.input_bytes);
  out.u32(shape.output_bytes);
  out.bytes(status.text, strlen(status.text));
}

void reply(const edge::Frame& frame) {
  edge::Reader in(frame.payload);
  edge::Writer out(answer, sizeof answer);
  switch (frame.header.type) {
    case kEncode:
      encode(in, out);
      break;
    case kDecode:
      decode(in, out);
      break;
    case kSha256:
      sha256(frame.payload, out);
      break;
    case kCrc32:
      out.u32(edge::crc32(0, frame.payload.data, frame.payload.size));
      break;
    case kValidate:
      validate(frame.payload, out);
      break;
    default:
      break;
  }
  const edge::FrameHeader header{edge::kResult, 0, 0, frame.header.id};
  hal.uart_write(line, edge::encode_frame(header, {}, {answer, out.size()}, line, sizeof line));
}

}  // namespace

int main() {
  edge::mps2::start_hardware();
  static Decoder decoder(received, sizeof received);
  uint8_t bytes[64];
  for (;;) {
    hal.watchdog_kick();
    const size_t count = edge::mps2::uart_read(bytes, sizeof bytes);
    if (count == 0) edge::mps2::wait_for_byte();
    for (size_t at = 0; at < count;) {
      Decoder::Event event;
      at += decoder.push(bytes + at, count - at, &event);
      if (event == Decoder::Event::kFrame) reply(decoder.frame());
    }
  }
}
