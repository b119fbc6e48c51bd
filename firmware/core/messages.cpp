#include "core/messages.h"

namespace edge {

bool HelloReq::parse(Span body) {
  Reader in(body);
  major = in.u8();
  minor = in.u8();
  max_frame = in.u16();
  return in.ok();
}

bool Infer::parse(Span body) {
  Reader in(body);
  model = in.take(kModelTag).data;
  budget_ms = in.u32();
  inputs = in.rest();
  return in.ok();
}

bool Fragment::parse(Span payload) {
  Reader in(payload);
  total = in.u32();
  offset = in.u32();
  data = in.rest();
  return in.ok();
}

bool StreamStart::parse(Span body) {
  Reader in(body);
  source = in.u8();
  send_inputs = static_cast<SendInputs>(in.u8());
  threshold = static_cast<int8_t>(in.u8());
  interval_ms = in.u32();
  credits = in.u32();
  model = in.take(kModelTag).data;
  return in.ok() && send_inputs <= SendInputs::kAlways && interval_ms > 0 && interval_ms <= kMaxIntervalMs;
}

bool ModelChunk::parse(Span body) {
  Reader in(body);
  offset = in.u32();
  data = in.rest();
  return in.ok();
}

bool Manifest::parse(Span body) {
  *this = Manifest();
  Reader in(body);
  format = in.u8();
  flags = in.u8();
  chunk = in.u16();
  model_length = in.u32();
  selftest_length = in.u32();
  counter = in.u32();
  arena = in.u32();
  selftest_tolerance = in.u8();
  in.copy(model_sha256, kSha256Size);
  in.copy(image_sha256, kSha256Size);
  if (format > 1) {
    in.copy(board, kBoardClass);
    in.copy(operators, kOperatorBits);
  }
  signature_kind = in.u8();
  if (signature_kind == kSignatureEd25519) in.copy(signature, kSignatureSize);
  return in.ok();
}

void Manifest::write(Writer& out) const {
  out.u8(format);
  out.u8(flags);
  out.u16(chunk);
  out.u32(model_length);
  out.u32(selftest_length);
  out.u32(counter);
  out.u32(arena);
  out.u8(selftest_tolerance);
  out.bytes(model_sha256, kSha256Size);
  out.bytes(image_sha256, kSha256Size);
  if (format > 1) {
    out.bytes(board, kBoardClass);
    out.bytes(operators, kOperatorBits);
  }
  out.u8(signature_kind);
  out.bytes(signature, kSignatureSize);
}

void ModelStatus::write(Writer& out) const {
  out.u8(slot);
  out.u8(static_cast<uint8_t>(state));
  out.u16(chunk);
  out.u32(length);
  out.u32(received);
  out.u32(next);
  out.bytes(bitmap, sizeof bitmap);
  out.bytes(image_sha256, kSha256Size);
}

void Stats::write(Writer& out, uint64_t uptime_us, uint64_t arena_used, uint64_t flash_operations,
                  uint64_t trial_left_us, const HalCounters* hal) const {
  constexpr uint8_t kAlways = 19;
  constexpr uint8_t kOfTheBoard = 2;
  const auto put = [&out](uint8_t id, uint64_t value) __attribute__((noinline)) {
    out.u8(id);
    out.u64(value);
  };
  out.u8(hal == nullptr ? kAlways : kAlways + kOfTheBoard);
  put(1, uptime_us);
  put(2, frames_received);
  put(3, frames_sent);
  put(4, bad_crc);
  put(5, bad_frames);
  put(6, oversize);
  put(7, inferences);
  put(8, inferences_failed);
  put(9, busy);
  put(10, expired);
  put(11, compute_us);
  put(13, arena_used);
  put(15, lost_frames);
  put(16, answers_repeated);
  put(17, flash_operations);
  put(18, queue_high_water);
  put(19, trial_left_us);
  put(23, stream_results);
  put(24, stream_skipped);
  if (hal == nullptr) return;
  put(12, hal->stack_high_water);
  put(14, hal->uart_overruns);
}

}  // namespace edge
