// The firmware on a board that the Arduino framework supports.
#include <Arduino.h>

#include <cstring>

#include "boards/arduino/port.h"
#include "boards/arduino/verify.h"
#include "core/session.h"
#include "engine/engine.h"
#include "hal/synthetic.h"

// The line to the gateway: the board's own USB, or a UART, for example -DEDGE_SERIAL=Serial1.
#ifndef EDGE_SERIAL
#define EDGE_SERIAL Serial
#endif
// USB ignores it.
#ifndef EDGE_BAUD
#define EDGE_BAUD 921600
#endif
// Bytes that wait in the driver while a request is computed, where the core lets its user choose.
#ifndef EDGE_UART_RING
#define EDGE_UART_RING 8192
#endif

// A board with sensors of its own: -DEDGE_SOURCES=<how many>, and this function in a file beside this one. It
// gives the next reading as the model's input tensors, `size` bytes in the model's own type and scale; false
// if there is none. With -DEDGE_SYNTHETIC_SOURCE a pattern stands for a sensor.
#if defined(EDGE_SYNTHETIC_SOURCE)
#define EDGE_SOURCES 1
static bool edge_sample(uint8_t, uint8_t* out, size_t size) {
  static edge::SyntheticSource source;
  source.sample(out, size);
  return true;
}
#elif defined(EDGE_SOURCES)
bool edge_sample(uint8_t source, uint8_t* out, size_t size);
#endif

namespace {

class ArduinoHal final : public edge::Hal {
 public:
  const char* board_name() override { return edge::port::name(); }

  void uart_write(const uint8_t* data, size_t size) override {
    while (size > 0) {
      const size_t taken = EDGE_SERIAL.write(data, size);
      data += taken;
      size -= taken;
      if (size == 0) return;
      // USB with nobody at the other end takes nothing: what is left is lost, as on an unplugged UART.
      if (!EDGE_SERIAL) return;
      edge::port::watchdog_kick();
    }
  }

  // micros() wraps after 71 minutes; the loop looks far more often than that.
  uint64_t clock_us() override {
    const uint32_t now = micros();
    if (now < last_) wraps_ += 1;
    last_ = now;
    return wraps_ << 32 | now;
  }

  edge::FlashGeometry flash_geometry() override { return edge::port::flash_geometry(); }
  bool flash_read(uint32_t offset, void* out, size_t size) override {
    if (!inside(offset, size)) return false;
    memcpy(out, edge::port::flash_map(offset), size);
    return true;
  }
  bool flash_write(uint32_t offset, const void* data, size_t size) override {
    return inside(offset, size) && edge::port::flash_write(offset, data, size) &&
           memcmp(edge::port::flash_map(offset), data, size) == 0;
  }
  bool flash_erase(uint32_t offset) override {
    return inside(offset, edge::port::flash_geometry().erase_size) && edge::port::flash_erase(offset);
  }
  const uint8_t* flash_map(uint32_t offset) override { return edge::port::flash_map(offset); }

  void watchdog_kick() override { edge::port::watchdog_kick(); }
  edge::ResetCause reset_cause() override { return edge::port::reset_cause(); }
  uint64_t random64() override { return edge::port::random64(); }
  uint64_t unique_id() override { return edge::port::unique_id(); }
  void request_reset() override {
    EDGE_SERIAL.flush();
    edge::port::reset();
  }
  const char* crash_report() override { return edge::port::crash_report(); }
  const edge::HalCounters* counters() override {
    counters_.stack_high_water = edge::port::stack_high_water();
    return &counters_;
  }
#ifdef EDGE_SOURCES
  uint8_t sources() override { return EDGE_SOURCES; }
  bool sample(uint8_t source, uint8_t* out, size_t size) override { return edge_sample(source, out, size); }
#endif

 private:
  static bool inside(uint32_t offset, size_t size) {
    const uint32_t all = edge::port::flash_geometry().size;
    return offset <= all && size <= all - offset;
  }

  edge::HalCounters counters_;  // the cores do not tell what their drivers lost
  uint32_t last_ = 0;
  uint64_t wraps_ = 0;
};

ArduinoHal hal;

edge::Engine& engine() {
#ifdef EDGE_TFLM
  return edge::tflm_engine();
#else
  return edge::null_engine();
#endif
}

edge::Session session(hal, engine(), edge::board_verifier(), edge::kMaxWindow);

}  // namespace

void setup() {
#ifdef ARDUINO_ARCH_ESP32
  EDGE_SERIAL.setRxBufferSize(EDGE_UART_RING);
#elif defined(ARDUINO_ARCH_RP2040) && defined(EDGE_SERIAL_IS_UART)
  EDGE_SERIAL.setFIFOSize(EDGE_UART_RING);  // its USB has no such choice
#elif defined(__IMXRT1062__) && defined(EDGE_SERIAL_IS_UART)
  static uint8_t ring[EDGE_UART_RING];  // its own 64 bytes are full in 0.7 ms
  EDGE_SERIAL.addMemoryForRead(ring, sizeof ring);
#endif
  EDGE_SERIAL.begin(EDGE_BAUD);
  // Without flash the session still serves all that needs none, and says so in HELLO.
  edge::port::begin();
  edge::port::watchdog_start();
  session.start();
}

void loop() {
  edge::port::watchdog_kick();
  uint8_t bytes[64];
  size_t count = 0;
  while (count < sizeof bytes && EDGE_SERIAL.available() > 0) {
    bytes[count++] = static_cast<uint8_t>(EDGE_SERIAL.read());
  }
  session.feed(bytes, count);
  session.poll();
}
