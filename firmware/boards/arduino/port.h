// What differs between the boards under the Arduino framework. One file of this folder implements it for each
// chip, behind the macro that the chip's core defines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hal/hal.h"

namespace edge::port {

const char* name();

// Before anything else; false if there is no flash to keep models in.
bool begin();

FlashGeometry flash_geometry();
// Within the geometry, aligned to it.
bool flash_write(uint32_t offset, const void* data, size_t size);
bool flash_erase(uint32_t offset);
const uint8_t* flash_map(uint32_t offset);

void watchdog_start();  // about 8 s
void watchdog_kick();

ResetCause reset_cause();
// One line on the fault that led to this boot; null if there was none, or the chip keeps nothing of it.
const char* crash_report();
// Bytes of the stack that the main loop runs on, at its deepest; 0 if that cannot be told.
uint32_t stack_high_water();
uint64_t random64();
uint64_t unique_id();
void reset();

}  // namespace edge::port
