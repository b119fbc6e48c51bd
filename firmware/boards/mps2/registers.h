// The registers of the MPS2 board (AN386 image) and of its Cortex-M4 core that this port uses.
#pragma once

#include <cstdint>

namespace edge::mps2 {

constexpr uint32_t kClockHz = 25'000'000;

using Register = volatile uint32_t;

// CMSDK APB UART.
struct Uart {
  Register data;
  Register state;
  Register control;
  Register interrupt;  // read: status; write 1: clear
  Register baud_divider;
};
constexpr uint32_t kUartTxFull = 1, kUartRxFull = 2, kUartRxOverrun = 8;  // in `state`
constexpr uint32_t kUartTxEnable = 1, kUartRxEnable = 2, kUartRxInterrupt = 8;
constexpr uint32_t kUartRxPending = 2;  // in `interrupt`
constexpr uint32_t kUartRxIrq = 0;

// CMSDK APB watchdog: the first time-out is an NMI, the second a reset.
struct Watchdog {
  Register load;
  Register value;
  Register control;  // 1: count and interrupt, 2: reset
  Register clear;
  Register raw_status;
  Register status;
  uint32_t reserved[762];
  Register lock;  // writable after kWatchdogUnlock
};
constexpr uint32_t kWatchdogUnlock = 0x1ACCE551;

// CMSDK APB timer: counts down at kClockHz and begins again at `reload`.
struct Timer {
  Register control;  // 1: count
  Register value;
  Register reload;
};

struct SysTick {
  Register control;  // 1 enable, 2 interrupt, 4 core clock
  Register reload;
  Register value;
};

// System control block.
struct Scb {
  Register cpuid;
  Register icsr;
  Register vtor;
  Register aircr;
  Register scr;
  Register ccr;
  Register shpr[3];
  Register shcsr;
  Register cfsr;
  Register hfsr;
  Register dfsr;
  Register mmfar;
  Register bfar;
};
constexpr uint32_t kAircrReset = 0x05FA0004;
constexpr uint32_t kShcsrFaults = 7u << 16;  // memory, bus and usage faults have handlers of their own
constexpr uint32_t kCcrDivByZero = 1u << 4;

inline Timer& timer0() { return *reinterpret_cast<Timer*>(0x40000000); }
inline Uart& uart0() { return *reinterpret_cast<Uart*>(0x40004000); }
inline Watchdog& watchdog() { return *reinterpret_cast<Watchdog*>(0x40008000); }
inline SysTick& systick() { return *reinterpret_cast<SysTick*>(0xE000E010); }
inline Scb& scb() { return *reinterpret_cast<Scb*>(0xE000ED00); }
inline Register& nvic_enable() { return *reinterpret_cast<Register*>(0xE000E100); }
inline Register& cpacr() { return *reinterpret_cast<Register*>(0xE000ED88); }

inline void barrier() { __asm volatile("dsb\n isb" ::: "memory"); }

}  // namespace edge::mps2
