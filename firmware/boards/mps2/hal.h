// The emulated board: MPS2 with the AN386 image, a Cortex-M4F (QEMU's machine mps2-an386).
#pragma once

#include <cstddef>
#include <cstdint>

#include "hal/hal.h"
#include "hal/synthetic.h"

namespace edge::mps2 {

// Handlers of the vector table.
void systick_interrupt();
void uart_interrupt();

// Fills the unused part of the process stack, so that its high-water mark can be found.
void paint_stack();

// Clock, UART, watchdog and store; interrupts are on afterwards.
void start_hardware();

// Bytes received, up to `size`; 0 if there are none.
size_t uart_read(uint8_t* out, size_t size);
void uart_send(const uint8_t* data, size_t size);
// Until a byte is there, an interrupt came, or `limit_us` have passed: a tenth of a second at most.
void wait_for_byte(uint64_t limit_us = UINT64_MAX);

class Mps2Hal final : public Hal {
 public:
  const char* board_name() override { return "mps2-an386"; }
  void uart_write(const uint8_t* data, size_t size) override { uart_send(data, size); }
  uint64_t clock_us() override;
  FlashGeometry flash_geometry() override;
  bool flash_read(uint32_t offset, void* out, size_t size) override;
  bool flash_write(uint32_t offset, const void* data, size_t size) override;
  bool flash_erase(uint32_t offset) override;
  const uint8_t* flash_map(uint32_t offset) override;
  void watchdog_kick() override;
  ResetCause reset_cause() override;
  uint64_t random64() override;
  uint64_t unique_id() override { return 0; }
  void request_reset() override;
  const char* crash_report() override;
  const HalCounters* counters() override;
  uint8_t sources() override { return 1; }
  bool sample(uint8_t, uint8_t* out, size_t size) override {
    source_.sample(out, size);
    return true;
  }

 private:
  SyntheticSource source_;
  HalCounters counters_;
};

}  // namespace edge::mps2
