// Teensy 4.1 (i.MX RT1062): models lie in the 1 MiB of program flash below what the core uses for its EEPROM.
#if defined(ARDUINO_TEENSY41)

#include <Arduino.h>
#include <Entropy.h>

#include <cstdio>

#include "boards/arduino/port.h"
#include "boards/arduino/stack.h"

// Of the core's eeprom.c: what its file system in program flash is made of.
extern "C" void eepromemu_flash_write(void* address, const void* data, uint32_t size);
extern "C" void eepromemu_flash_erase_sector(void* address);
// Of the linker script: bytes of flash that the program takes.
extern "C" unsigned long _flashimagelen;
// The stack grows down towards the variables; the words above them are guarded.
extern "C" unsigned long _ebss, _estack;

namespace edge::port {
namespace {

constexpr uint32_t kFlashStart = 0x60000000;
constexpr uint32_t kEeprom = 0x607C0000;
constexpr uint32_t kStoreSize = 1024 * 1024;
constexpr uint32_t kStore = kEeprom - kStoreSize;

constexpr size_t kGuardWords = 16;

// What the core's fault handler leaves in RAM that outlives a reset (its CrashReport.cpp).
struct FaultRecord {
  uint32_t len, ipsr, cfsr, hfsr, mmfar, bfar, ret;
};
constexpr uintptr_t kFaultRecord = 0x2027FF80;

PaintedStack stack;
char report[64];
ResetCause cause = ResetCause::kUnknown;
bool room = false;

void* at(uint32_t offset) { return reinterpret_cast<void*>(kStore + offset); }

ResetCause read_cause() {
  const uint32_t status = SRC_SRSR;
  SRC_SRSR = status;  // ones clear it
  if ((status & SRC_SRSR_WDOG_RST_B) != 0) return ResetCause::kWatchdog;
  // A request, or a core that locked up: the chip does not tell them apart.
  if ((status & SRC_SRSR_LOCKUP_SYSRESETREQ) != 0) return ResetCause::kSoftware;
  if ((status & SRC_SRSR_IPP_USER_RESET_B) != 0) return ResetCause::kPin;
  return (status & SRC_SRSR_IPP_RESET_B) != 0 ? ResetCause::kPowerOn : ResetCause::kUnknown;
}

}  // namespace

const char* name() { return "teensy41"; }

bool begin() {
  stack.paint(reinterpret_cast<uint32_t*>(&_ebss) + kGuardWords, reinterpret_cast<uint32_t*>(&_estack));
  const bool fault = static_cast<bool>(CrashReport);
  if (fault) {
    const FaultRecord& record = *reinterpret_cast<const FaultRecord*>(kFaultRecord);
    snprintf(report, sizeof report, "fault: pc 0x%08lx cfsr 0x%08lx address 0x%08lx",
             static_cast<unsigned long>(record.ret), static_cast<unsigned long>(record.cfsr),
             static_cast<unsigned long>(record.mmfar));
    CrashReport.clear();
  }
  cause = fault ? ResetCause::kFault : read_cause();
  Entropy.Initialize();
  room = kFlashStart + reinterpret_cast<uint32_t>(&_flashimagelen) <= kStore;
  return room;
}

FlashGeometry flash_geometry() { return {room ? kStoreSize : 0, 4096, 16}; }

bool flash_write(uint32_t offset, const void* data, size_t size) {
  // The core's function programs one page of 256 bytes at most.
  const uint8_t* from = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const size_t left_of_page = 256 - offset % 256;
    const size_t count = size < left_of_page ? size : left_of_page;
    eepromemu_flash_write(at(offset), from, count);
    offset += count;
    from += count;
    size -= count;
  }
  return true;
}

bool flash_erase(uint32_t offset) {
  eepromemu_flash_erase_sector(at(offset));
  return true;
}

const uint8_t* flash_map(uint32_t offset) { return static_cast<const uint8_t*>(at(offset)); }

void watchdog_start() {
  WDOG1_WMCR = 0;                                                            // not the 16 s of power-down
  WDOG1_WCR = WDOG_WCR_WT(15) | WDOG_WCR_SRS | WDOG_WCR_WDA | WDOG_WCR_WDE;  // (15 + 1) / 2 s
}

void watchdog_kick() {
  WDOG1_WSR = 0x5555;
  WDOG1_WSR = 0xAAAA;
}

ResetCause reset_cause() { return cause; }

const char* crash_report() { return report[0] != '\0' ? report : nullptr; }

uint32_t stack_high_water() { return stack.high_water(); }

uint64_t random64() { return static_cast<uint64_t>(Entropy.random()) << 32 | Entropy.random(); }

uint64_t unique_id() { return static_cast<uint64_t>(HW_OCOTP_CFG1) << 32 | HW_OCOTP_CFG0; }

void reset() {
  SCB_AIRCR = 0x05FA0004;
  for (;;) {
  }
}

}  // namespace edge::port

#endif
