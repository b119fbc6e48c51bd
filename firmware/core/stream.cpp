#include "core/stream.h"

#include <cstring>

namespace edge {

void Stream::start(uint32_t id, const StreamStart& start, const Stats& stats, uint64_t now_us) {
  active_ = true;
  held_ = false;
  source_ = start.source;
  threshold_ = start.threshold;
  send_inputs_ = start.send_inputs;
  memcpy(model_, start.model, kModelTag);
  id_ = id;
  upto_ = static_cast<uint32_t>(stats.stream_results) + start.credits;
  interval_us_ = start.interval_ms * 1000;
  due_us_ = now_us;
}

// The numbers wrap: what is ahead by less than half of their range is later.
void Stream::grant(uint32_t upto) {
  if (static_cast<int32_t>(upto - upto_) > 0) upto_ = upto;
}

Status Stream::sample(Hal& hal, Engine& engine, const ModelInfo& info, Stats* stats) {
  uint8_t* outputs = body_ + kStreamHead;
  uint8_t* inputs = outputs + info.output_bytes;
  taken_us_ = hal.clock_us();
  // In 32 bits, which a Cortex-M divides by itself: after more than 71 minutes the count is too low.
  const uint64_t behind_us = taken_us_ - due_us_;
  const uint32_t missed =
      static_cast<uint32_t>(behind_us > UINT32_MAX ? UINT32_MAX : behind_us) / interval_us_;
  due_us_ = behind_us > UINT32_MAX ? taken_us_ + interval_us_
                                   : due_us_ + (static_cast<uint64_t>(missed) + 1) * interval_us_;
  stats->stream_skipped += missed + (held_ ? 1 : 0);
  held_ = false;
  if (!hal.sample(source_, inputs, info.input_bytes)) return {Code::kSensor, "no reading"};

  const uint64_t started_us = hal.clock_us();
  const bool good = engine.invoke({inputs, info.input_bytes}, outputs, info.output_bytes);
  compute_us_ = static_cast<uint32_t>(hal.clock_us() - started_us);
  stats->ran(compute_us_, good);
  if (!good) return {Code::kInvoke, engine.last_error()};

  int8_t best = INT8_MIN;
  for (size_t i = 0; i < info.output_bytes; ++i) {
    const int8_t score = static_cast<int8_t>(outputs[i]);
    if (score > best) best = score;
  }
  const bool whole =
      send_inputs_ == SendInputs::kAlways || (send_inputs_ == SendInputs::kBelow && best < threshold_);
  outputs_ = info.output_bytes;
  size_ = kStreamHead + outputs_ + (whole ? info.input_bytes : 0);
  held_ = true;
  return {};
}

Span Stream::take(Stats* stats) {
  const uint32_t seq = static_cast<uint32_t>(stats->stream_results);
  if (!active_ || !held_ || static_cast<int32_t>(upto_ - seq) <= 0) return {};
  Writer out(body_, kStreamHead);
  out.u32(seq);
  out.u32(static_cast<uint32_t>(stats->stream_skipped));
  out.u64(taken_us_);
  out.u32(compute_us_);
  out.u16(static_cast<uint16_t>(outputs_));
  held_ = false;
  ++stats->stream_results;
  return {body_, size_};
}

void Stream::write_status(Writer& out, const Stats& stats) const {
  out.u8(active_ ? 1 : 0);
  out.u32(static_cast<uint32_t>(stats.stream_results));
  out.u32(static_cast<uint32_t>(stats.stream_skipped));
  out.u32(upto_);
}

}  // namespace edge
