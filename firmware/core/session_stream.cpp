// The session's stream: messages about it, and what it sends.
#include "core/session.h"

namespace edge {

uint64_t Session::idle_us() {
  if (pending()) return 0;
  if (resetting_ || !stream_.active()) return UINT64_MAX;
  return stream_.due_in_us(hal_.clock_us());
}

// STREAM_CREDIT under id 0 wants no answer.
void Session::on_stream(const FrameHeader& header, Span body) {
  Status status;
  if (header.type == kStreamStart) {
    status = start_stream(header.id, body);
  } else if (header.type == kStreamStop) {
    stream_.stop();
  } else {
    Reader in(body);
    const uint32_t upto = in.u32();
    if (in.ok()) {
      stream_.grant(upto);
    } else {
      status = {Code::kBadLength, ""};
    }
  }
  if (!status.ok()) {
    send_error(header.id, status);
  } else if (header.id != 0) {
    Writer out(answer_, sizeof answer_);
    stream_.write_status(out, stats_);
    send(kStreamStatus, header.id, {answer_, out.size()});
  }
  send_stream();
}

Status Session::start_stream(uint32_t id, Span body) {
  StreamStart start;
  if (!start.parse(body)) return {Code::kBadLength, ""};
  if (start.source >= hal_.sources()) return {Code::kSensor, "no such source"};
  const Status usable = check_model(start.model);
  if (!usable.ok()) return usable;
  if (!Stream::fits(models_.info())) return {Code::kTooLarge, "sample"};
  stream_.start(id, start, stats_, hal_.clock_us());
  return {};
}

// What it cannot go on from ends it, and is told under the id that began it.
void Session::sample_stream() {
  Status status = check_model(stream_.model());
  if (status.ok()) status = stream_.sample(hal_, engine_, models_.info(), &stats_);
  if (status.ok()) return send_stream();
  if (status.code == Code::kInvoke) models_.failed();
  stream_.stop();
  send_error(stream_.id(), status);
}

void Session::send_stream() {
  const Span body = stream_.take(&stats_);
  if (body.size > 0) send(kStreamResult, stream_.id(), body);
}

}  // namespace edge
