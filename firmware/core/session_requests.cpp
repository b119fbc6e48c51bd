// The session's queued requests: what poll() computes.
#include <cstring>

#include "core/session.h"

namespace edge {

#ifndef EDGE_BUILD
#error "EDGE_BUILD is the firmware version that HELLO reports: -DEDGE_BUILD='\"...\"'"
#endif

bool Session::poll() {
  if (idle_us() == 0) serve_next();
  if (!resetting_ && models_.settle()) {
    announce();
    log(kLogWarning, kRolledBack);
  }
  return pending();
}

void Session::serve_next() {
  hal_.watchdog_kick();
  const bool due = stream_.active() && stream_.due_in_us(hal_.clock_us()) == 0;
  // In turn: neither requests nor the stream wait for more than one of the other.
  sampled_last_ = due && (queue_.size() == 0 || !sampled_last_);
  if (sampled_last_) {
    sample_stream();
  } else {
    run_request();
  }
}

void Session::run_request() {
  const Request request = queue_.pop();
  Writer out(answer_, sizeof answer_);
  uint8_t type = kError;
  const Status status = execute(request, out, &type);
  const Span body = status.ok() ? Span{answer_, out.size()} : error_body(status);
  if (!status.ok()) type = kError;
  pool_.give(request.body);
  answers_.remember(request.id, type, body);
  send(type, request.id, body);
}

Status Session::execute(const Request& request, Writer& out, uint8_t* type) {
  switch (request.type) {
    case kInfer:
      *type = kResult;
      return infer(request, out);
    case kStatsReq:
      *type = kStats;
      stats_.write(out, hal_.clock_us(), models_.info().arena_used, models_.store().operations(),
                   models_.trial_left_us(), hal_.counters());
      return {};
    default:
      *type = kModelStatus;
      return model_message(request, out);
  }
}

Status Session::check_model(const uint8_t* tag) {
  if (!models_.has_engine()) return {Code::kNoEngine, ""};
  if (models_.loaded() < 0) return {Code::kNoModel, ""};
  const Manifest& manifest = models_.store().slot(static_cast<size_t>(models_.loaded())).manifest;
  if (memcmp(manifest.model_sha256, tag, kModelTag) != 0) return {Code::kModelMismatch, ""};
  return {};
}

Status Session::infer(const Request& request, Writer& out) {
  Infer message;
  if (!message.parse({request.body, request.size})) return {Code::kBadLength, ""};
  const Status usable = check_model(message.model);
  if (!usable.ok()) return usable;
  const ModelInfo& info = models_.info();
  if (message.inputs.size != info.input_bytes) return {Code::kBadLength, "inputs"};

  const uint64_t started = hal_.clock_us();
  const uint64_t waited = started - request.received_us;
  if (message.budget_ms != 0 && waited >= static_cast<uint64_t>(message.budget_ms) * 1000) {
    ++stats_.expired;
    return {Code::kDeadline, ""};
  }
  // The outputs go straight to their place in the answer; the head follows when the time is known.
  uint8_t* outputs = answer_ + kResultHead;
  const bool good = engine_.invoke(message.inputs, outputs, info.output_bytes);
  const uint64_t computed = hal_.clock_us() - started;
  stats_.ran(computed, good);
  if (!good) {
    models_.failed();
    return {Code::kInvoke, engine_.last_error()};
  }
  out.bytes(message.model, kModelTag);
  out.u32(static_cast<uint32_t>(waited));
  out.u32(static_cast<uint32_t>(computed));
  out.skip(info.output_bytes);
  return out.ok() ? Status{} : Status{Code::kInternal, "outputs over the answer buffer"};
}

Status Session::model_message(const Request& request, Writer& out) {
  const Span body{request.body, request.size};
  ModelStatus answer;
  Status status;
  switch (request.type) {
    case kModelBegin:
      status = models_.begin(body);
      break;
    case kModelChunk:
      status = models_.chunk(body);
      break;
    case kModelAbort:
      status = models_.abort();
      break;
    case kModelCommit:
      status = models_.commit(answer_, sizeof answer_, (Reader(body).u8() & kCommitTrial) != 0);
      break;
    case kModelConfirm:
    case kModelRollback:
      status = models_.end_trial(body, request.type == kModelConfirm);
      break;
    default:  // MODEL_QUERY only asks
      break;
  }
  if (!status.ok()) return status;
  const bool decides = request.type == kModelCommit || request.type >= kModelConfirm;
  if (!decides) {
    answer = models_.store().status();
  } else if (models_.loaded() >= 0) {
    answer = models_.store().status_of(static_cast<size_t>(models_.loaded()));
  }
  answer.write(out);
  return {};
}

void Session::write_hello(Writer& out) {
  const ModelStore& store = models_.store();
  const bool keeps = store.slot_size() > 0 && hal_.flash_geometry().survives_power_cut;
  uint32_t capabilities = keeps ? kCapKeepsModels : 0;
  if (models_.has_engine()) capabilities |= hal_.sources() > 0 ? kCapEngine | kCapStreams : kCapEngine;
  if (models_.verifies()) capabilities |= kCapVerifies;
  const Span operators = engine_.operators();

  out.u8(kProtocolMajor);
  out.u8(kProtocolMinor);
  out.u16(kMaxFrame);
  out.u32(kMaxMessage);
  out.u8(static_cast<uint8_t>(window_));
  out.u8(static_cast<uint8_t>(hal_.reset_cause()));
  out.u64(boot_id_);
  out.u32(capabilities);
  out.u32(engine_.arena_size());
  out.u32(store.slot_size());
  out.u64(hal_.unique_id());
  out.str8(hal_.board_name());
  out.str8(EDGE_BUILD);
  out.str8(engine_.name());
  out.u8(static_cast<uint8_t>(operators.size));
  out.bytes(operators.data, operators.size);
  out.u8(kSlots);
  for (size_t i = 0; i < kSlots; ++i) {
    const Slot& slot = store.slot(i);
    const bool runs = models_.loaded() == static_cast<int>(i);
    const ModelInfo info = runs ? models_.info() : ModelInfo();
    out.u8(static_cast<uint8_t>(i));
    out.u8(static_cast<uint8_t>(slot.state));
    out.u32(slot.manifest.model_length);
    out.bytes(slot.manifest.model_sha256, kSha256Size);
    out.u32(slot.manifest.counter);
    out.u32(info.input_bytes);
    out.u32(info.output_bytes);
    out.u32(info.arena_used);
  }
  out.u8(static_cast<uint8_t>(store.rollback()));
  out.u16(kTrialSeconds);
}

}  // namespace edge
