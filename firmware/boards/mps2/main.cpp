#include "boards/mps2/hal.h"
#include "core/session.h"
#include "engine/engine.h"

namespace {

edge::mps2::Mps2Hal hal;

edge::Engine& engine() {
#ifdef EDGE_TFLM
  return edge::tflm_engine();
#else
  return edge::null_engine();
#endif
}

// No verifier: an Ed25519 implementation comes from a library that this image, built without a network,
// lacks.
edge::Session session(hal, engine(), nullptr, edge::kMaxWindow);

}  // namespace

int main() {
  edge::mps2::start_hardware();
  session.start();
  uint8_t bytes[64];
  for (;;) {
    hal.watchdog_kick();
    hal.clock_us();  // keeps count of the counter's wraps
    const size_t count = edge::mps2::uart_read(bytes, sizeof bytes);
    session.feed(bytes, count);
    if (session.poll() || count > 0) continue;
    const uint64_t idle_us = session.idle_us();
    if (idle_us > 0) edge::mps2::wait_for_byte(idle_us);
  }
}
