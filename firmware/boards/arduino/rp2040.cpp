// RP2040 (Raspberry Pi Pico) under the core of Earle Philhower: models lie where that core would keep a file
// system.
#ifdef ARDUINO_ARCH_RP2040

#include <Arduino.h>
#include <hardware/flash.h>
#include <hardware/watchdog.h>
#include <pico/unique_id.h>

#include <cstdio>
#include <cstring>

#include "boards/arduino/port.h"
#include "boards/arduino/stack.h"

// Of the linker script; board_build.filesystem_size sets the distance.
extern "C" uint8_t _FS_start;
extern "C" uint8_t _FS_end;
// Of the first core's stack, whose lowest words are guarded.
extern "C" uint32_t __StackBottom[], __StackTop[];

namespace edge::port {
namespace {

constexpr uint32_t kWatchdogMs = 8000;  // 8.3 s is all that the chip has
constexpr size_t kGuardWords = 16;

// Three of the watchdog's registers that outlive a reset, and that nobody else uses: mark, pc, lr.
constexpr uint32_t kFaultMark = 0x45444746;
PaintedStack stack;
char report[48];

uint32_t flash_offset(uint32_t offset) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&_FS_start)) - XIP_BASE + offset;
}

// Flash cannot be read while it is written: nothing may run from it.
class Alone {
 public:
  Alone() {
    rp2040.idleOtherCore();
    noInterrupts();
  }
  ~Alone() {
    interrupts();
    rp2040.resumeOtherCore();
  }
};

}  // namespace

const char* name() { return "rp2040"; }

bool begin() {
  stack.paint(__StackBottom + kGuardWords, __StackTop);
  if (watchdog_hw->scratch[0] == kFaultMark) {
    snprintf(report, sizeof report, "fault: pc 0x%08lx lr 0x%08lx",
             static_cast<unsigned long>(watchdog_hw->scratch[1]),
             static_cast<unsigned long>(watchdog_hw->scratch[2]));
    watchdog_hw->scratch[0] = 0;
  }
  return flash_geometry().size > 0;
}

FlashGeometry flash_geometry() {
  return {static_cast<uint32_t>(&_FS_end - &_FS_start), FLASH_SECTOR_SIZE, 16};
}

// A page is programmed whole; what is 0xFF in it stays as it is.
bool flash_write(uint32_t offset, const void* data, size_t size) {
  const uint8_t* from = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const uint32_t within = offset % FLASH_PAGE_SIZE;
    const size_t count = size < FLASH_PAGE_SIZE - within ? size : FLASH_PAGE_SIZE - within;
    uint8_t page[FLASH_PAGE_SIZE];
    memset(page, 0xFF, sizeof page);
    memcpy(page + within, from, count);
    {
      Alone alone;
      flash_range_program(flash_offset(offset - within), page, sizeof page);
    }
    offset += count;
    from += count;
    size -= count;
  }
  return true;
}

bool flash_erase(uint32_t offset) {
  Alone alone;
  flash_range_erase(flash_offset(offset), FLASH_SECTOR_SIZE);
  return true;
}

const uint8_t* flash_map(uint32_t offset) { return &_FS_start + offset; }

void watchdog_start() { watchdog_enable(kWatchdogMs, true); }
void watchdog_kick() { watchdog_update(); }

ResetCause reset_cause() {
  if (report[0] != '\0') return ResetCause::kFault;
  switch (rp2040.getResetReason()) {
    case RP2040::PWRON_RESET:
      return ResetCause::kPowerOn;
    case RP2040::RUN_PIN_RESET:
      return ResetCause::kPin;
    case RP2040::SOFT_RESET:
      return ResetCause::kSoftware;
    case RP2040::WDT_RESET:
      return ResetCause::kWatchdog;
    case RP2040::BROWNOUT_RESET:
      return ResetCause::kBrownOut;
    default:
      return ResetCause::kUnknown;
  }
}

const char* crash_report() { return report[0] != '\0' ? report : nullptr; }

uint32_t stack_high_water() { return stack.high_water(); }

uint64_t random64() { return static_cast<uint64_t>(rp2040.hwrand32()) << 32 | rp2040.hwrand32(); }

uint64_t unique_id() {
  pico_unique_board_id_t id;
  pico_get_unique_board_id(&id);
  uint64_t value;
  static_assert(sizeof id.id == sizeof value, "64 bits");
  memcpy(&value, id.id, sizeof value);
  return value;
}

void reset() { rp2040.reboot(); }

}  // namespace edge::port

// `frame`: r0-r3, r12, lr, pc, xpsr, as the core stacked them.
extern "C" void edge_fault(const uint32_t* frame) {
  watchdog_hw->scratch[0] = edge::port::kFaultMark;
  watchdog_hw->scratch[1] = frame[6];
  watchdog_hw->scratch[2] = frame[5];
  watchdog_reboot(0, 0, 1);
  for (;;) {
  }
}

extern "C" __attribute__((naked)) void isr_hardfault() {
  __asm volatile(
      "mrs r0, msp\n"
      "ldr r1, =edge_fault\n"
      "bx r1\n");
}

#endif
