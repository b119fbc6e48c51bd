// ESP32 and ESP32-S3: models lie in the partition `models` of boards/arduino/esp32.csv.
#ifdef ARDUINO_ARCH_ESP32

#include <Arduino.h>
#include <esp_idf_version.h>
#include <esp_partition.h>
#include <esp_random.h>
#include <esp_system.h>
#include <esp_task_wdt.h>

#include "boards/arduino/port.h"

namespace edge::port {
namespace {

constexpr uint32_t kWatchdogSeconds = 8;

const esp_partition_t* partition = nullptr;
const uint8_t* mapped = nullptr;

}  // namespace

const char* name() { return "esp32s3"; }

bool begin() {
  const esp_partition_t* found =
      esp_partition_find_first(ESP_PARTITION_TYPE_DATA, ESP_PARTITION_SUBTYPE_ANY, "models");
  if (found == nullptr) return false;
  const void* address = nullptr;
#if ESP_IDF_VERSION_MAJOR >= 5
  esp_partition_mmap_handle_t handle;
  const esp_err_t result =
      esp_partition_mmap(found, 0, found->size, ESP_PARTITION_MMAP_DATA, &address, &handle);
#else
  spi_flash_mmap_handle_t handle;
  const esp_err_t result = esp_partition_mmap(found, 0, found->size, SPI_FLASH_MMAP_DATA, &address, &handle);
#endif
  if (result != ESP_OK) return false;
  partition = found;
  mapped = static_cast<const uint8_t*>(address);
  return true;
}

FlashGeometry flash_geometry() {
  return {partition != nullptr ? static_cast<uint32_t>(partition->size) : 0, 4096, 16};
}

// ESP-IDF brings the mapping's cache up to date after each of these.
bool flash_write(uint32_t offset, const void* data, size_t size) {
  return esp_partition_write(partition, offset, data, size) == ESP_OK;
}

bool flash_erase(uint32_t offset) { return esp_partition_erase_range(partition, offset, 4096) == ESP_OK; }

const uint8_t* flash_map(uint32_t offset) { return mapped + offset; }

void watchdog_start() {
#if ESP_IDF_VERSION_MAJOR >= 5
  const esp_task_wdt_config_t config = {kWatchdogSeconds * 1000, 0, true};
  esp_task_wdt_reconfigure(&config);
#else
  esp_task_wdt_init(kWatchdogSeconds, true);
#endif
  esp_task_wdt_add(nullptr);
}

void watchdog_kick() { esp_task_wdt_reset(); }

ResetCause reset_cause() {
  switch (esp_reset_reason()) {
    case ESP_RST_POWERON:
      return ResetCause::kPowerOn;
    case ESP_RST_EXT:
      return ResetCause::kPin;
    case ESP_RST_SW:
      return ResetCause::kSoftware;
    case ESP_RST_INT_WDT:
    case ESP_RST_TASK_WDT:
    case ESP_RST_WDT:
      return ResetCause::kWatchdog;
    case ESP_RST_PANIC:
      return ResetCause::kFault;
    case ESP_RST_BROWNOUT:
      return ResetCause::kBrownOut;
    default:
      return ResetCause::kUnknown;
  }
}

const char* crash_report() { return nullptr; }  // the chip prints a backtrace to its console instead

// ESP-IDF counts in bytes what was never used.
uint32_t stack_high_water() {
  return static_cast<uint32_t>(getArduinoLoopTaskStackSize() - uxTaskGetStackHighWaterMark(nullptr));
}

uint64_t random64() { return static_cast<uint64_t>(esp_random()) << 32 | esp_random(); }

uint64_t unique_id() { return ESP.getEfuseMac(); }

void reset() { esp_restart(); }

}  // namespace edge::port

#endif
