// From reset to main, and the faults.
#include <cstddef>
#include <cstdint>

#include "boards/mps2/crash.h"
#include "boards/mps2/hal.h"
#include "boards/mps2/registers.h"

extern "C" {

extern uint32_t __process_stack_end[], __process_stack_top[], __handler_stack_top[];
extern uint32_t __data_load[], __data_start[], __data_end[], __bss_start[], __bss_end[];
using Initializer = void (*)();
extern Initializer __init_array_start[], __init_array_end[];

int main();
void start_cpp();

// On the handler stack: turns the FPU on, since the compiler is free to use its registers in any C++
// function, then leaves for the process stack.
__attribute__((naked, noreturn)) void reset_handler() {
  __asm volatile(
      "ldr r0, =0xE000ED88 \n"  // CPACR: full access to CP10 and CP11
      "ldr r1, [r0]        \n"
      "orr r1, r1, #0xF00000 \n"
      "str r1, [r0]        \n"
      "dsb                 \n"
      "isb                 \n"
      "ldr r0, =__process_stack_top \n"
      "msr psp, r0         \n"
      "movs r0, #2         \n"
      "msr control, r0     \n"
      "isb                 \n"
      "bl start_cpp        \n"
      ".global spin        \n"  // where a debugger sends the core to see the watchdog bite
      "spin: b spin        \n");
}

__attribute__((used)) void start_cpp() {
  for (uint32_t *to = __data_start, *from = __data_load; to != __data_end;) *to++ = *from++;
  for (uint32_t* to = __bss_start; to != __bss_end;) *to++ = 0;
  edge::mps2::paint_stack();
  edge::mps2::scb().shcsr = edge::mps2::kShcsrFaults;
  edge::mps2::scb().ccr = edge::mps2::scb().ccr | edge::mps2::kCcrDivByZero;
  edge::mps2::crash_boot();
  for (Initializer* call = __init_array_start; call != __init_array_end; ++call) (*call)();
  main();
}

// `frame` is what the core pushed: r0-r3, r12, lr, pc, xpsr. It is not there if pushing it was what failed.
[[noreturn]] __attribute__((used)) void record_fault(const uint32_t* frame, uint32_t watchdog) {
  const edge::mps2::Scb& scb = edge::mps2::scb();
  edge::mps2::Crash crash{0, 0, scb.cfsr, 0};
  // Bits of CFSR: 7 the address of a memory fault is valid, 15 that of a bus fault; 4 and 12 the frame is
  // lost.
  if ((crash.cfsr & (1u << 15)) != 0) crash.address = scb.bfar;
  if ((crash.cfsr & (1u << 7)) != 0) crash.address = scb.mmfar;
  const bool frame_lost = (crash.cfsr & (1u << 4 | 1u << 12)) != 0;
  if (!frame_lost && frame >= __process_stack_end && frame + 8 <= __handler_stack_top) {
    crash.lr = frame[5];
    crash.pc = frame[6];
  }
  using edge::ResetCause;
  edge::mps2::reset_with(watchdog != 0 ? ResetCause::kWatchdog : ResetCause::kFault, crash);
}

#define EDGE_CRASH_HANDLER(name, watchdog)                \
  __attribute__((naked, noreturn)) void name() {          \
    __asm volatile(                                       \
        "tst lr, #4        \n" /* which stack was used */ \
        "ite eq            \n"                            \
        "mrseq r0, msp     \n"                            \
        "mrsne r0, psp     \n"                            \
        "movs r1, #" watchdog                             \
        " \n"                                             \
        "b record_fault    \n");                          \
  }

EDGE_CRASH_HANDLER(fault_handler, "0")
EDGE_CRASH_HANDLER(nmi_handler, "1")  // only the watchdog is wired to it

void systick_handler() { edge::mps2::systick_interrupt(); }
void uart_rx_handler() { edge::mps2::uart_interrupt(); }

// Up to the one interrupt that is enabled; there are no others to vector.
constexpr size_t kVectors = 16 + 1;
struct VectorTable {
  uint32_t* stack;
  Initializer handlers[kVectors - 1];
};

#define EDGE_4(handler) handler, handler, handler, handler
__attribute__((section(".vectors"), used)) const VectorTable vectors = {
    __handler_stack_top,
    {
        reset_handler, nmi_handler, fault_handler, EDGE_4(fault_handler), EDGE_4(fault_handler),
        fault_handler, fault_handler, fault_handler, systick_handler,
        uart_rx_handler  // interrupt 0
    }};

}  // extern "C"
