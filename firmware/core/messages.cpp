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
  const struct Item {
    uint8_t id;
    uint64_t value;
  } values[] = {
      {1, uptime_us},      {2, frames_received},   {3, frames_sent},       {4, bad_crc},
      {5, bad_frames},     {6, oversize},          {7, inferences},        {8, inferences_failed},
      {9, busy},           {10, expired},          {11, compute_us},       {13, arena_used},
      {15, lost_frames},   {16, answers_repeated}, {17, flash_operations}, {18, queue_high_water},
      {19, trial_left_us},
  };
  const Item counted[] = {{12, hal != nullptr ? hal->stack_high_water : 0},
                          {14, hal != nullptr ? hal->uart_overruns : 0}};
  const auto put = [&out](const Item& item) {
    out.u8(item.id);
    out.u64(item.value);
  };
  constexpr size_t kAlways = sizeof values / sizeof values[0];
  out.u8(static_cast<uint8_t>(kAlways + (hal != nullptr ? 2 : 0)));
  for (const Item& item : values) put(item);
  if (hal == nullptr) return;
  for (const Item& item : counted) put(item);
}

}  // namespace edge
