// A session and its gateway's every possible mood: frames of any type and body, bare bytes, waiting, and
// resets with the flash as it was. The input is a list of steps; a frame's COBS and CRC are made here, or the
// fuzzer would hardly get past.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/frame.h"
#include "core/session.h"
#include "core/validator.h"

namespace {

constexpr uint32_t kErase = 1024;
constexpr uint32_t kFlash = 96 * kErase;

class FuzzHal final : public edge::Hal {
 public:
  FuzzHal() { memset(flash_, 0xFF, sizeof flash_); }
  const char* board_name() override { return "fuzz"; }
  // What it sends must be frames that a gateway can decode, or a delimiter.
  void uart_write(const uint8_t* data, size_t size) override {
    if (size == 1 && data[0] == 0) return;
    edge::FrameDecoder decoder(line_, sizeof line_);
    edge::FrameDecoder::Event event;
    if (decoder.push(data, size, &event) != size || event != edge::FrameDecoder::Event::kFrame) abort();
    ++sent;
  }
  uint64_t clock_us() override { return now; }
  edge::FlashGeometry flash_geometry() override { return {kFlash, kErase, 16}; }
  bool flash_read(uint32_t offset, void* out, size_t size) override {
    if (offset > kFlash || size > kFlash - offset) abort();
    memcpy(out, flash_ + offset, size);
    return true;
  }
  bool flash_write(uint32_t offset, const void* data, size_t size) override {
    if (offset > kFlash || size > kFlash - offset || offset % 16 != 0 || size % 16 != 0) abort();
    for (size_t at = 0; at < size; at += 16) {
      const uint8_t* unit = static_cast<const uint8_t*>(data) + at;
      uint8_t* cell = flash_ + offset + at;
      bool blank = true;
      for (int i = 0; i < 16; ++i) blank = blank && cell[i] == 0xFF;
      if (!blank && memcmp(cell, unit, 16) != 0) abort();  // the rule of hal.h: never twice
      memcpy(cell, unit, 16);
    }
    return true;
  }
  bool flash_erase(uint32_t offset) override {
    if (offset % kErase != 0 || offset >= kFlash) abort();
    memset(flash_ + offset, 0xFF, kErase);
    return true;
  }
  const uint8_t* flash_map(uint32_t offset) override { return flash_ + offset; }
  void watchdog_kick() override {}
  edge::ResetCause reset_cause() override { return edge::ResetCause::kSoftware; }
  uint64_t random64() override { return now * 0x9E3779B97F4A7C15; }
  uint64_t unique_id() override { return 1; }
  void request_reset() override { reset = true; }
  uint8_t sources() override { return 2; }
  bool sample(uint8_t source, uint8_t* out, size_t size) override {
    if (source >= 2 || size > edge::kMaxSample) abort();
    memset(out, static_cast<int>(now), size);
    return source == 0;  // the other has never a reading
  }

  uint64_t now = 1;
  uint64_t sent = 0;
  bool reset = false;

 private:
  uint8_t flash_[kFlash];
  uint8_t line_[edge::kMaxFrame];
};

class FuzzEngine final : public edge::Engine {
 public:
  const char* name() override { return "fuzz"; }
  edge::Span operators() override { return {codes_, edge::known_operators(codes_, sizeof codes_)}; }
  uint32_t arena_size() override { return 65536; }
  const char* last_error() override { return "no"; }
  edge::LoadResult load(edge::Span model, edge::ModelInfo* info) override {
    edge::ModelShape shape;
    if (!edge::validate_model(model, operators(), &shape).ok()) return edge::LoadResult::kInvalid;
    *info = {shape.input_bytes, shape.output_bytes, 1};
    return edge::LoadResult::kOk;
  }
  bool invoke(edge::Span inputs, uint8_t* outputs, size_t size) override {
    memset(outputs, inputs.size > 0 ? inputs.data[0] : 0, size);
    return true;
  }

 private:
  uint8_t codes_[128];
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto hal = std::make_unique<FuzzHal>();
  FuzzEngine engine;
  auto session = std::make_unique<edge::Session>(*hal, engine, nullptr, 2);
  session->start();
  edge::Reader in({data, size});
  uint16_t seq = 0;
  while (in.ok()) {
    const uint8_t step = in.u8();
    if (!in.ok()) break;
    hal->now += step * 100;
    if (step < 200) {  // a frame
      edge::FrameHeader header;
      header.type = in.u8();
      header.flags = step % 4;
      header.seq = seq++;
      header.id = in.u8();
      const size_t wanted = in.u16();
      const edge::Span body = in.take(wanted % (edge::kMaxFrame - edge::kFrameOverhead + 1));
      if (!in.ok()) break;
      uint8_t line[edge::kMaxLine];
      session->feed(line, edge::encode_frame(header, {}, body, line, sizeof line));
    } else if (step < 220) {  // bytes
      const edge::Span bytes = in.take(in.u8());
      session->feed(bytes.data, bytes.size);
    } else {
      session->poll();
    }
    if (hal->reset || step == 255) {
      hal->reset = false;
      session = std::make_unique<edge::Session>(*hal, engine, nullptr, 2);
      session->start();
    }
  }
  while (session->poll()) {
  }
  return 0;
}
