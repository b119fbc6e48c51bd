// The seam to the board: the only thing to write for a new one (docs/firmware.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

// As in HELLO.reset_cause.
enum class ResetCause : uint8_t {
  kUnknown = 0,
  kPowerOn = 1,
  kPin = 2,
  kSoftware = 3,
  kWatchdog = 4,
  kFault = 5,
  kBrownOut = 6,
};

struct FlashGeometry {
  uint32_t size;        // bytes given to the model store; a multiple of erase_size
  uint32_t erase_size;  // at least kDirectoryRecord
  uint32_t
      write_size;  // at most kFlashAlign; a board with larger pages pads with 0xFF, which programs nothing
  bool survives_power_cut = true;  // false: RAM stands for flash, and HELLO says so
};

// For STATS; 0 until there is something to tell.
struct HalCounters {
  uint32_t stack_high_water = 0;  // bytes
  uint32_t uart_overruns = 0;     // received bytes that were lost
};

class Hal {
 public:
  virtual const char* board_name() = 0;

  // Takes all bytes; may wait for the UART.
  virtual void uart_write(const uint8_t* data, size_t size) = 0;

  // Microseconds since boot, never going back.
  virtual uint64_t clock_us() = 0;

  // The model store's own flash, from offset 0. Erased bytes read 0xFF. A write covers whole write units and
  // never one that was written since its erase, except with the bytes that are there. Each returns false on
  // failure.
  virtual FlashGeometry flash_geometry() = 0;
  virtual bool flash_read(uint32_t offset, void* out, size_t size) = 0;
  virtual bool flash_write(uint32_t offset, const void* data, size_t size) = 0;
  virtual bool flash_erase(uint32_t offset) = 0;  // one erase block
  // The same bytes in the address space: the engine runs a model where it lies.
  virtual const uint8_t* flash_map(uint32_t offset) = 0;

  virtual void watchdog_kick() = 0;
  virtual ResetCause reset_cause() = 0;
  virtual uint64_t random64() = 0;
  virtual uint64_t unique_id() = 0;  // 0 if the board has none
  virtual void request_reset() = 0;  // may return; the session is silent afterwards

  // What a board may leave out.
  virtual uint8_t sources() { return 0; }  // sensors that sample() reads, numbered from 0
  // The newest reading as the active model's input tensors: `size` bytes in the model's own type and scale.
  // False: there is none, and the stream ends. A few milliseconds at most: the line is not read meanwhile.
  virtual bool sample(uint8_t source, uint8_t* out, size_t size) {
    (void)source, (void)out, (void)size;
    return false;
  }
  virtual const char* crash_report() { return nullptr; }  // one line on what led to this boot; LOG carries it
  virtual const HalCounters* counters() { return nullptr; }

 protected:
  ~Hal() = default;
};

}  // namespace edge
