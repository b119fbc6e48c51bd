#include "boards/mps2/crash.h"

#include "boards/mps2/registers.h"

namespace edge::mps2 {
namespace {

constexpr uint32_t kMagic = 0x45444745;

// Random after power on; the check word tells.
struct Kept {
  uint32_t magic;
  uint32_t cause;
  uint32_t boots;
  Crash crash;
  uint32_t check;
};

__attribute__((section(".noinit"))) Kept kept;

ResetCause cause_now = ResetCause::kUnknown;
char report[96];

uint32_t check_of(const Kept& k) {
  return ~(k.magic ^ k.cause ^ (k.boots << 1) ^ k.crash.pc ^ k.crash.lr ^ k.crash.cfsr ^ k.crash.address);
}

void put_text(char*& at, const char* text) {
  while (*text != '\0') *at++ = *text++;
}

__attribute__((noinline)) void put_hex(char*& at, const char* name, uint32_t value) {
  put_text(at, name);
  for (int shift = 28; shift >= 0; shift -= 4) *at++ = "0123456789abcdef"[(value >> shift) & 15];
}

void write_report(const Kept& k) {
  char* at = report;
  put_text(at, cause_now == ResetCause::kWatchdog ? "watchdog reset:" : "fault:");
  put_hex(at, " pc 0x", k.crash.pc);
  put_hex(at, " lr 0x", k.crash.lr);
  if (cause_now == ResetCause::kFault) {
    put_hex(at, " cfsr 0x", k.crash.cfsr);
    put_hex(at, " address 0x", k.crash.address);
  }
  *at = '\0';
}

}  // namespace

void crash_boot() {
  if (kept.magic != kMagic || kept.check != check_of(kept)) {
    kept = Kept{kMagic, 0, 0, {}, 0};
    cause_now = ResetCause::kPowerOn;
  } else if (kept.cause == 0) {
    cause_now = ResetCause::kPin;  // RAM is intact, and it was not this firmware that asked
  } else {
    cause_now = static_cast<ResetCause>(kept.cause);
  }
  if (cause_now == ResetCause::kFault || cause_now == ResetCause::kWatchdog) write_report(kept);
  kept.cause = 0;
  ++kept.boots;
  kept.crash = {};
  kept.check = check_of(kept);
}

ResetCause crash_cause() { return cause_now; }
const char* crash_report() { return report[0] != '\0' ? report : nullptr; }
uint32_t crash_boots() { return kept.boots; }

void reset_with(ResetCause cause, const Crash& crash) {
  kept.cause = static_cast<uint32_t>(cause);
  kept.crash = crash;
  kept.check = check_of(kept);
  barrier();
  scb().aircr = kAircrReset;
  barrier();
  for (;;) {
  }
}

}  // namespace edge::mps2
