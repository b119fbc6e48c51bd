// Not the firmware: an image that lets the tests hold a session and its model store by the hand, on the
// Cortex-M. A command is a frame whose type says which; the answer has its id and comes in pieces, since a
// session may say more than fits a frame. Every command begins with the world around the session: clock,
// flash and engine.
#include <cstring>
#include <new>

#include "boards/mps2/hal.h"
#include "core/bytes.h"
#include "core/crc32.h"
#include "core/frame.h"
#include "core/session.h"
#include "core/validator.h"
#include "engine/engine.h"

namespace {

enum Command : uint8_t { kFormat = 1, kBoot = 2, kFeed = 3, kPoll = 4, kKeep = 5, kRestore = 6 };

edge::mps2::Mps2Hal board;

struct World {
  uint64_t now_us = 0;
  uint32_t cut_at = UINT32_MAX;  // the flash operation that is done in part, and nothing after it
  uint16_t torn = 0;             // thousandths of it that are done
  uint8_t load_result = 0;       // what the engine answers instead of loading; 0: it loads
  bool invoke_fails = false;
};
World world;

uint32_t runs = 0;
uint32_t resets = 0;
uint8_t said[96 * 1024];
size_t said_size = 0;
bool said_too_much = false;

// NOR flash that notes every breach of its rules, and whose power can be cut.
class Flash {
 public:
  static constexpr uint32_t kSize = 96 * 1024;
  static constexpr uint32_t kEraseSize = 1024;
  static constexpr uint32_t kWriteSize = 16;

  void format() { memset(bytes_, 0xFF, sizeof bytes_); }
  void power_on() {
    operations = 0;
    dead = false;
  }
  // A state that took long to reach, to begin from again and again.
  void keep() { memcpy(kept_, bytes_, sizeof kept_); }
  void restore() { memcpy(bytes_, kept_, sizeof bytes_); }
  const uint8_t* at(uint32_t offset) const { return bytes_ + offset; }

  bool write(uint32_t offset, const uint8_t* data, size_t size) {
    if (offset > kSize || size > kSize - offset) return ++breaches, false;
    if (offset % kWriteSize != 0 || size % kWriteSize != 0) ++breaches;
    for (size_t i = 0; i + kWriteSize <= size; i += kWriteSize) {
      if (!is_blank(offset + i) && memcmp(bytes_ + offset + i, data + i, kWriteSize) != 0) ++breaches;
    }
    const size_t done = begin(size);
    memcpy(bytes_ + offset, data, done);
    return !dead;
  }

  bool erase(uint32_t offset) {
    if (offset % kEraseSize != 0 || offset >= kSize) return ++breaches, false;
    memset(bytes_ + offset, 0xFF, begin(kEraseSize));
    return !dead;
  }

  uint32_t operations = 0;
  uint32_t breaches = 0;
  bool dead = false;

 private:
  // How much of the operation is done.
  size_t begin(size_t size) {
    if (dead) return 0;
    dead = operations == world.cut_at;
    ++operations;
    return dead ? size * world.torn / 1000 : size;
  }

  bool is_blank(uint32_t offset) const {
    for (uint32_t i = 0; i < kWriteSize; ++i) {
      if (bytes_[offset + i] != 0xFF) return false;
    }
    return true;
  }

  alignas(16) uint8_t bytes_[kSize];
  alignas(16) uint8_t kept_[kSize];
};
Flash flash;

class TestHal final : public edge::Hal {
 public:
  edge::ResetCause cause = edge::ResetCause::kPowerOn;

  const char* board_name() override { return "host"; }
  void uart_write(const uint8_t* data, size_t size) override {
    if (size > sizeof said - said_size) {
      said_too_much = true;
      return;
    }
    memcpy(said + said_size, data, size);
    said_size += size;
  }
  uint64_t clock_us() override { return world.now_us; }
  edge::FlashGeometry flash_geometry() override {
    return {Flash::kSize, Flash::kEraseSize, Flash::kWriteSize};
  }
  bool flash_read(uint32_t offset, void* out, size_t size) override {
    if (offset > Flash::kSize || size > Flash::kSize - offset) return false;
    memcpy(out, flash.at(offset), size);
    return true;
  }
  bool flash_write(uint32_t offset, const void* data, size_t size) override {
    return flash.write(offset, static_cast<const uint8_t*>(data), size);
  }
  bool flash_erase(uint32_t offset) override { return flash.erase(offset); }
  const uint8_t* flash_map(uint32_t offset) override { return flash.at(offset); }
  void watchdog_kick() override { board.watchdog_kick(); }
  edge::ResetCause reset_cause() override { return cause; }
  uint64_t random64() override { return board.random64(); }
  uint64_t unique_id() override { return 0x1234; }
  void request_reset() override { ++resets; }
};
TestHal hal;

// Takes what the validator takes; an output byte is an input byte, changed.
class FakeEngine final : public edge::Engine {
 public:
  uint32_t loaded_crc32 = 0;

  FakeEngine() : count_(edge::known_operators(operators_, sizeof operators_)) {}
  const char* name() override { return "fake 1.0"; }
  edge::Span operators() override { return {operators_, count_}; }
  uint32_t arena_size() override { return 64 * 1024; }
  const char* last_error() override { return "kernel says no"; }
  edge::LoadResult load(edge::Span model, edge::ModelInfo* info) override {
    if (world.load_result != 0) return static_cast<edge::LoadResult>(world.load_result);
    edge::ModelShape shape;
    if (!edge::validate_model(model, operators(), &shape).ok()) return edge::LoadResult::kInvalid;
    *info = {shape.input_bytes, shape.output_bytes, 4096};
    loaded_crc32 = edge::crc32(0, model.data, model.size);
    return edge::LoadResult::kOk;
  }
  bool invoke(edge::Span inputs, uint8_t* outputs, size_t output_size) override {
    ++runs;
    if (world.invoke_fails) return false;
    for (size_t i = 0; i < output_size; ++i) outputs[i] = inputs.data[i % inputs.size] ^ 0x5A;
    return true;
  }

 private:
  uint8_t operators_[128];
  size_t count_;
};
FakeEngine engine;

alignas(edge::Session) uint8_t place[sizeof(edge::Session)];
edge::Session* session = nullptr;

uint8_t received[edge::kMaxFrame];
uint8_t line[edge::kMaxLine];

void boot(edge::Reader& in) {
  hal.cause = static_cast<edge::ResetCause>(in.u8());
  const uint8_t window = in.u8();
  const bool with_engine = in.u8() != 0;
  if (in.u8() != 0) flash.power_on();  // else a reset under the same power
  if (session != nullptr) session->~Session();
  edge::Engine& chosen = with_engine ? static_cast<edge::Engine&>(engine) : edge::null_engine();
  session = new (place) edge::Session(hal, chosen, nullptr, window);
  session->start();
}

void obey(uint8_t command, edge::Reader& in) {
  switch (command) {
    case kFormat:
      flash.format();
      flash.power_on();
      flash.breaches = runs = resets = 0;
      break;
    case kBoot:
      boot(in);
      break;
    case kKeep:
      flash.keep();
      break;
    case kRestore:
      flash.restore();
      break;
    case kFeed: {
      const edge::Span data = in.rest();
      session->feed(data.data, data.size);
      break;
    }
    case kPoll:
      session->poll();
      break;
    default:
      break;
  }
}

// What the session said, behind the state of the world.
void reply(uint32_t id) {
  uint8_t head[edge::kFragmentHead + 32];
  constexpr size_t kState = 22;
  const size_t total = kState + said_size;
  constexpr size_t kPiece = 900;
  for (size_t at = 0; at < total;) {
    edge::Writer out(head, sizeof head);
    out.u32(static_cast<uint32_t>(total));
    out.u32(static_cast<uint32_t>(at));
    if (at == 0) {
      out.u32(flash.operations);
      out.u32(flash.breaches + (said_too_much ? 1 : 0));
      out.u32(runs);
      out.u32(resets);
      out.u32(engine.loaded_crc32);
      out.u8(flash.dead ? 1 : 0);
      out.u8(session != nullptr && session->pending() ? 1 : 0);
    }
    const size_t from = at == 0 ? 0 : at - kState;
    const size_t left = said_size - from;
    const size_t count = left < kPiece ? left : kPiece;
    const edge::FrameHeader header{edge::kResult, edge::kFlagFragment, 0, id};
    board.uart_write(line,
                     edge::encode_frame(header, {head, out.size()}, {said + from, count}, line, sizeof line));
    at += out.size() - edge::kFragmentHead + count;
  }
  said_size = 0;
}

void command(const edge::Frame& frame) {
  edge::Reader in(frame.payload);
  world.now_us = in.u64();
  world.cut_at = in.u32();
  world.torn = in.u16();
  world.load_result = in.u8();
  world.invoke_fails = in.u8() != 0;
  if (in.ok()) obey(frame.header.type, in);
  reply(frame.header.id);
}

}  // namespace

int main() {
  edge::mps2::start_hardware();
  static edge::FrameDecoder decoder(received, sizeof received);
  uint8_t bytes[64];
  for (;;) {
    board.watchdog_kick();
    const size_t count = edge::mps2::uart_read(bytes, sizeof bytes);
    if (count == 0) edge::mps2::wait_for_byte();
    for (size_t at = 0; at < count;) {
      edge::FrameDecoder::Event event;
      at += decoder.push(bytes + at, count - at, &event);
      if (event == edge::FrameDecoder::Event::kFrame) command(decoder.frame());
    }
  }
}
