// What outlives a reset: why it happened, and the state of the core if it was a fault.
#pragma once

#include <cstdint>

#include "hal/hal.h"

namespace edge::mps2 {

struct Crash {
  uint32_t pc;
  uint32_t lr;
  uint32_t cfsr;
  uint32_t address;
};

// Why this boot happened. Reads the record once and clears it; call before anything that may fault.
void crash_boot();
ResetCause crash_cause();
// One line on the fault or watchdog that led here, null if there was none.
const char* crash_report();
// Counts resets since power on: part of what makes a boot id.
uint32_t crash_boots();

[[noreturn]] void reset_with(ResetCause cause, const Crash& crash);

}  // namespace edge::mps2
