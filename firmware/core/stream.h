// One stream: the board samples its own sensor, infers, and sends as many results as it was granted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"
#include "core/limits.h"
#include "core/messages.h"
#include "engine/engine.h"
#include "hal/hal.h"

namespace edge {

class Stream {
 public:
  static bool fits(const ModelInfo& info) {
    return static_cast<uint64_t>(info.input_bytes) + info.output_bytes <= kMaxSample - kStreamHead;
  }

  // Takes the place of the one before. The first sample is due at once; `stats` holds the numbers of results,
  // which go on from stream to stream.
  void start(uint32_t id, const StreamStart& start, const Stats& stats, uint64_t now_us);
  void stop() { active_ = false; }
  // Results up to this number may be sent. A late grant takes nothing back.
  void grant(uint32_t upto);

  bool active() const { return active_; }
  uint32_t id() const { return id_; }
  const uint8_t* model() const { return model_; }
  // Microseconds until a sample is due.
  uint64_t due_in_us(uint64_t now_us) const { return now_us < due_us_ ? due_us_ - now_us : 0; }

  // Takes a sample and runs the model on it. The result before it, if it still waits for credit, is skipped,
  // and so are the instants that passed while the board was busy.
  Status sample(Hal& hal, Engine& engine, const ModelInfo& info, Stats* stats);
  // The body of a STREAM_RESULT if there is one and it may be sent now; else empty. Valid until the next
  // sample.
  Span take(Stats* stats);
  void write_status(Writer& out, const Stats& stats) const;

 private:
  bool active_ = false;
  bool held_ = false;  // body_ holds a result that was not sent
  uint8_t source_ = 0;
  int8_t threshold_ = 0;
  SendInputs send_inputs_ = SendInputs::kNever;
  uint8_t model_[kModelTag] = {};
  uint32_t id_ = 0;
  uint32_t upto_ = 0;
  uint32_t compute_us_ = 0;
  uint32_t interval_us_ = 0;
  uint64_t due_us_ = 0;
  uint64_t taken_us_ = 0;
  size_t outputs_ = 0;
  size_t size_ = 0;
  uint8_t body_[kMaxSample];
};

}  // namespace edge
