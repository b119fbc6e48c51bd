#include "boards/mps2/hal.h"

#include <cstring>

#include "boards/mps2/crash.h"
#include "boards/mps2/registers.h"
#include "core/sha256.h"

extern "C" uint32_t __process_stack_end[], __process_stack_top[];

namespace edge::mps2 {
namespace {

// Received bytes wait here while a request is computed: what a window of full frames leaves to come.
#ifndef EDGE_UART_RING
#define EDGE_UART_RING 4096
#endif
constexpr uint32_t kRing = EDGE_UART_RING;
static_assert((kRing & (kRing - 1)) == 0, "EDGE_UART_RING must be a power of two");

// The line's rate where there is one: the emulator's has none, so that it never is what limits.
constexpr uint32_t kBaud = 921'600;

// Above the longest inference; the NMI comes after this, the reset after it once more.
constexpr uint32_t kWatchdogSeconds = 8;

// Looks at the ring before the core sleeps: about 200 us at 25 MHz.
constexpr uint32_t kSpins = 500;

constexpr uint32_t kStackPaint = 0xA5A5A5A5;

// Flash that RAM stands for: programming can only clear bits, so that a mistake of the store shows here as
// well.
constexpr uint32_t kEraseSize = 4096;
constexpr uint32_t kWriteSize = 16;
constexpr uint32_t kStoreSize = 2 * kEraseSize + 28 * 1024 + 2 * 256 * 1024;
constexpr uint64_t kFormatted = 0x3153465F45474445;

struct Store {
  uint64_t formatted;
  alignas(16) uint8_t bytes[kStoreSize];
};
__attribute__((section(".store"))) Store store;

uint8_t ring[kRing];
// Free-running; written by the interrupt and by the reader respectively.
volatile uint32_t ring_in = 0;
volatile uint32_t ring_out = 0;
volatile uint32_t overruns = 0;

constexpr uint32_t kTicksPerUs = kClockHz / 1'000'000;
// Wakes the core, so that the watchdog is kicked and the clock is read long before its counter wraps (172 s).
constexpr uint32_t kWakeTicks = kClockHz / 10;
static_assert(kWakeTicks < 1u << 24, "SysTick has 24 bits");

uint64_t clock_now = 0;
uint32_t clock_ticks = 0;  // of the counter, up to clock_now

bool inside_store(uint32_t offset, size_t size) {
  return offset <= kStoreSize && size <= kStoreSize - offset;
}

void start_watchdog() {
  Watchdog& dog = watchdog();
  dog.lock = kWatchdogUnlock;
  dog.load = kWatchdogSeconds * kClockHz;
  dog.control = 3;
}

}  // namespace

void systick_interrupt() {}

// One byte at a time is all that this UART holds. Each access to a register costs the emulator far more than
// an instruction, so there are no more than needed; a byte that comes after `data` was read raises the
// interrupt anew.
void uart_interrupt() {
  Uart& uart = uart0();
  const uint32_t state = uart.state;
  uart.interrupt = kUartRxPending;
  if ((state & kUartRxOverrun) != 0) {
    uart.state = kUartRxOverrun;
    overruns = overruns + 1;
  }
  if ((state & kUartRxFull) == 0) return;
  const uint8_t byte = static_cast<uint8_t>(uart.data);
  if (ring_in - ring_out == kRing) {
    overruns = overruns + 1;
  } else {
    ring[ring_in % kRing] = byte;
    ring_in = ring_in + 1;
  }
}

void paint_stack() {
  uint32_t* here = static_cast<uint32_t*>(__builtin_frame_address(0)) - 16;
  for (uint32_t* word = __process_stack_end; word < here; ++word) *word = kStackPaint;
}

void start_hardware() {
  if (store.formatted != kFormatted) {
    memset(store.bytes, 0xFF, sizeof store.bytes);
    store.formatted = kFormatted;
  }
  timer0().reload = UINT32_MAX;
  timer0().value = UINT32_MAX;
  timer0().control = 1;
  systick().reload = kWakeTicks - 1;
  systick().value = 0;
  systick().control = 7;
  uart0().baud_divider = kClockHz / kBaud;
  uart0().control = kUartTxEnable | kUartRxEnable | kUartRxInterrupt;
  nvic_enable() = 1u << kUartRxIrq;
  start_watchdog();
}

size_t uart_read(uint8_t* out, size_t size) {
  size_t count = 0;
  while (count < size && ring_out != ring_in) {
    out[count++] = ring[ring_out % kRing];
    ring_out = ring_out + 1;
  }
  return count;
}

void uart_send(const uint8_t* data, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    // A peer that does not read holds the line back; that is no defect of this board, so the watchdog is kept
    // quiet.
    while ((uart0().state & kUartTxFull) != 0) watchdog().clear = 1;
    uart0().data = data[i];
  }
}

void wait_for_byte(uint64_t limit_us) {
  // Within a frame the next byte is close, and waking the core costs more than a byte's time.
  for (uint32_t spin = 0; spin < kSpins; ++spin) {
    if (ring_in != ring_out) return;
  }
  const uint32_t ticks =
      limit_us < kWakeTicks / kTicksPerUs ? static_cast<uint32_t>(limit_us) * kTicksPerUs : kWakeTicks;
  systick().reload = ticks > 1 ? ticks - 1 : 1;
  systick().value = 0;
  // Looked at with interrupts off: a byte that comes in between still ends the WFI.
  __asm volatile("cpsid i" ::: "memory");
  if (ring_in == ring_out) __asm volatile("wfi");
  __asm volatile("cpsie i" ::: "memory");
}

// A free-running counter instead of counted interrupts, which the emulator may deliver late or merge.
uint64_t Mps2Hal::clock_us() {
  const uint32_t passed = (~timer0().value - clock_ticks) / kTicksPerUs;
  clock_ticks += passed * kTicksPerUs;
  clock_now += passed;
  return clock_now;
}

FlashGeometry Mps2Hal::flash_geometry() { return {kStoreSize, kEraseSize, kWriteSize, false}; }

bool Mps2Hal::flash_read(uint32_t offset, void* out, size_t size) {
  if (!inside_store(offset, size)) return false;
  memcpy(out, store.bytes + offset, size);
  return true;
}

bool Mps2Hal::flash_write(uint32_t offset, const void* data, size_t size) {
  if (!inside_store(offset, size) || offset % kWriteSize != 0 || size % kWriteSize != 0) return false;
  const uint8_t* from = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < size; ++i) store.bytes[offset + i] &= from[i];
  return memcmp(store.bytes + offset, data, size) == 0;
}

bool Mps2Hal::flash_erase(uint32_t offset) {
  if (!inside_store(offset, kEraseSize) || offset % kEraseSize != 0) return false;
  memset(store.bytes + offset, 0xFF, kEraseSize);
  return true;
}

const uint8_t* Mps2Hal::flash_map(uint32_t offset) { return store.bytes + offset; }

void Mps2Hal::watchdog_kick() { watchdog().clear = 1; }

ResetCause Mps2Hal::reset_cause() { return crash_cause(); }

// The board has no source of randomness. What varies from boot to boot: the count of resets since power on,
// and how the emulator's clock, which is the host's, runs against the instructions. Good for a boot id, not
// for keys.
uint64_t Mps2Hal::random64() {
  Sha256 sha;
  const uint32_t boots = crash_boots();
  sha.update(reinterpret_cast<const uint8_t*>(&boots), sizeof boots);
  for (int i = 0; i < 64; ++i) {
    uint32_t spins[2] = {0, systick().value};
    while (systick().value == spins[1]) ++spins[0];
    sha.update(reinterpret_cast<const uint8_t*>(spins), sizeof spins);
  }
  uint8_t digest[kSha256Size];
  sha.finish(digest);
  uint64_t value;
  memcpy(&value, digest, sizeof value);
  return value;
}

void Mps2Hal::request_reset() { reset_with(ResetCause::kSoftware, {}); }

const char* Mps2Hal::crash_report() { return mps2::crash_report(); }

const HalCounters* Mps2Hal::counters() {
  const uint32_t* word = __process_stack_end;
  while (word < __process_stack_top && *word == kStackPaint) ++word;
  counters_.stack_high_water = static_cast<uint32_t>((__process_stack_top - word) * sizeof *word);
  counters_.uart_overruns = overruns;
  return &counters_;
}

}  // namespace edge::mps2
