// nRF52840 (Arduino Nano 33 BLE) under Arduino's Mbed core: models lie in the last 256 KiB of flash.
#if defined(ARDUINO) && defined(NRF52840_XXAA)

#include <FlashIAP.h>
#include <drivers/Watchdog.h>
#include <nrf.h>

#include "boards/arduino/port.h"

namespace edge::port {
namespace {

constexpr uint32_t kStoreSize = 256 * 1024;
constexpr uint32_t kWatchdogMs = 8000;

mbed::FlashIAP flash;
uint32_t store = 0;  // address; 0: no flash
ResetCause cause = ResetCause::kUnknown;

// No bit set is power on or brown-out; a boot loader that clears the register makes everything look like it.
ResetCause read_cause() {
  const uint32_t reason = NRF_POWER->RESETREAS;
  NRF_POWER->RESETREAS = reason;  // ones clear it
  if ((reason & POWER_RESETREAS_DOG_Msk) != 0) return ResetCause::kWatchdog;
  if ((reason & POWER_RESETREAS_LOCKUP_Msk) != 0) return ResetCause::kFault;
  if ((reason & POWER_RESETREAS_SREQ_Msk) != 0) return ResetCause::kSoftware;
  if ((reason & POWER_RESETREAS_RESETPIN_Msk) != 0) return ResetCause::kPin;
  return ResetCause::kPowerOn;
}

}  // namespace

const char* name() { return "nrf52840"; }

bool begin() {
  cause = read_cause();
  if (flash.init() != 0) return false;
  const uint32_t end = flash.get_flash_start() + flash.get_flash_size();
  if (FLASHIAP_APP_ROM_END_ADDR > end - kStoreSize) return false;  // the program reaches into it
  store = end - kStoreSize;
  return true;
}

FlashGeometry flash_geometry() { return {store != 0 ? kStoreSize : 0, 4096, 16}; }

bool flash_write(uint32_t offset, const void* data, size_t size) {
  return flash.program(data, store + offset, size) == 0;
}

bool flash_erase(uint32_t offset) { return flash.erase(store + offset, 4096) == 0; }

const uint8_t* flash_map(uint32_t offset) { return reinterpret_cast<const uint8_t*>(store + offset); }

void watchdog_start() { mbed::Watchdog::get_instance().start(kWatchdogMs); }
void watchdog_kick() { mbed::Watchdog::get_instance().kick(); }

ResetCause reset_cause() { return cause; }

const char* crash_report() { return nullptr; }  // Mbed prints it to a UART that the board does not lead out

uint32_t stack_high_water() { return 0; }  // Mbed's threads are not painted

uint64_t random64() {
  uint64_t value = 0;
  NRF_RNG->TASKS_START = 1;
  for (int i = 0; i < 8; ++i) {
    NRF_RNG->EVENTS_VALRDY = 0;
    while (NRF_RNG->EVENTS_VALRDY == 0) {
    }
    value = value << 8 | (NRF_RNG->VALUE & 0xFF);
  }
  NRF_RNG->TASKS_STOP = 1;
  return value;
}

uint64_t unique_id() { return static_cast<uint64_t>(NRF_FICR->DEVICEID[1]) << 32 | NRF_FICR->DEVICEID[0]; }

void reset() { NVIC_SystemReset(); }

}  // namespace edge::port

#endif
