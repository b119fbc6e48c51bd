#include "core/session.h"

#include <cstring>

namespace edge {
namespace {

bool is_request(uint8_t type) {
  switch (type) {
    case kHelloReq:
    case kPing:
    case kInfer:
    case kCancel:
    case kReset:
    case kModelBegin:
    case kModelChunk:
    case kModelCommit:
    case kModelAbort:
    case kModelQuery:
    case kModelConfirm:
    case kModelRollback:
    case kStatsReq:
    case kStreamStart:
    case kStreamCredit:
    case kStreamStop:
      return true;
    default:
      return false;
  }
}

}  // namespace

Session::Session(Hal& hal, Engine& engine, Verifier* verifier, size_t window)
    : hal_(hal),
      engine_(engine),
      models_(hal, engine, verifier),
      window_(window < 1            ? 1
              : window > kMaxWindow ? kMaxWindow
                                    : window),
      decoder_(rx_, kMaxFrame),
      queue_(window_),
      answers_(window_) {}

void Session::start() {
  boot_id_ = hal_.random64();
  const Status problem = models_.boot();
  // Ends what the reset cut short, and what a boot loader said: HELLO would be lost with it.
  const uint8_t delimiter = 0;
  hal_.uart_write(&delimiter, 1);
  announce();
  if (hal_.crash_report() != nullptr) log(kLogError, hal_.crash_report());
  if (!problem.ok()) log(kLogWarning, problem.text);
}

void Session::announce() {
  Writer out(answer_, sizeof answer_);
  write_hello(out);
  send(kHello, 0, {answer_, out.size()});
}

void Session::feed(const uint8_t* data, size_t size) {
  while (size > 0 && !resetting_) {
    FrameDecoder::Event event;
    const size_t used = decoder_.push(data, size, &event);
    data += used;
    size -= used;
    switch (event) {
      case FrameDecoder::Event::kNone:
        break;
      case FrameDecoder::Event::kFrame:
        on_frame(decoder_.frame());
        break;
      case FrameDecoder::Event::kDecode:
      case FrameDecoder::Event::kShort:
        ++stats_.bad_frames;
        break;
      case FrameDecoder::Event::kCrc:
        ++stats_.bad_crc;
        break;
      case FrameDecoder::Event::kOversize:
        ++stats_.oversize;
        break;
    }
  }
}

// A gateway that reopened counts from zero again: a step back is that, not 65,000 lost frames.
void Session::count_gap(const FrameHeader& header) {
  const uint16_t gap = static_cast<uint16_t>(header.seq - seq_expected_);
  if (seq_known_ && gap < 0x8000) stats_.lost_frames += gap;
  seq_known_ = true;
  seq_expected_ = static_cast<uint16_t>(header.seq + 1);
}

void Session::on_frame(const Frame& frame) {
  ++stats_.frames_received;
  count_gap(frame.header);
  const uint8_t type = frame.header.type;
  const bool served_always = type == kHelloReq || type == kPing || type == kReset;
  if (!version_matches_ && !served_always) {
    if (type != kCancel) send_error(frame.header.id, {Code::kVersion, "1.1"});
  } else if (!is_request(type)) {
    send_error(frame.header.id, {Code::kUnknownType, ""});
  } else if ((frame.header.flags & kFlagFragment) != 0) {
    on_fragment(frame);
  } else {
    on_message(frame.header, frame.payload, false);
  }
}

void Session::on_fragment(const Frame& frame) {
  const uint32_t replaced = reassembly_.replaces(frame.header);
  if (replaced != 0) send_error(replaced, {Code::kBadFragment, "another message began"});
  switch (reassembly_.add(frame.header, frame.payload, pool_)) {
    case Reassembly::Result::kMore:
    case Reassembly::Result::kIgnored:
      break;
    case Reassembly::Result::kComplete:
      on_message(frame.header, reassembly_.take(), true);
      break;
    case Reassembly::Result::kBadLength:
      send_error(frame.header.id, {Code::kBadLength, ""});
      break;
    case Reassembly::Result::kBadFragment:
      send_error(frame.header.id, {Code::kBadFragment, "does not continue the piece before"});
      break;
    case Reassembly::Result::kTooLarge:
      send_error(frame.header.id, {Code::kTooLarge, "over max_message"});
      break;
  }
}

// `pooled`: the body lies in a buffer of the pool, which this call disposes of; else in the decoder's.
void Session::on_message(const FrameHeader& header, Span body, bool pooled) {
  if (!answer_at_once(header, body)) {
    enqueue(header, body, pooled);
  } else if (pooled) {
    pool_.give(body.data);
  }
}

bool Session::answer_at_once(const FrameHeader& header, Span body) {
  switch (header.type) {
    case kHelloReq:
      on_hello_req(header.id, body);
      return true;
    case kPing:
      on_ping(header.id, body);
      return true;
    case kCancel:
      on_cancel(header.id);
      return true;
    case kStreamStart:
    case kStreamCredit:
    case kStreamStop:
      on_stream(header, body);
      return true;
    case kReset:
      resetting_ = true;
      hal_.request_reset();
      return true;
    default:
      break;
  }
  if ((header.flags & kFlagRetry) == 0) return false;
  if (queue_.contains(header.id)) return true;  // its answer is coming
  uint8_t type;
  Span answer;
  if (!answers_.find(header.id, &type, &answer)) return false;
  ++stats_.answers_repeated;
  send(type, header.id, answer);
  return true;
}

void Session::enqueue(const FrameHeader& header, Span body, bool pooled) {
  if (queue_.full()) {
    ++stats_.busy;
    if (pooled) pool_.give(body.data);
    send_error(header.id, {Code::kBusy, ""});
    return;
  }
  Request request;
  request.id = header.id;
  request.type = header.type;
  request.received_us = hal_.clock_us();
  request.size = body.size;
  if (pooled) {
    request.body = const_cast<uint8_t*>(body.data);
  } else {
    // There is one: the queue is not full, and at most one buffer is in reassembly.
    request.body = pool_.take();
    if (body.size > 0) memcpy(request.body, body.data, body.size);
  }
  queue_.push(request);
  if (queue_.size() > stats_.queue_high_water) stats_.queue_high_water = queue_.size();
}

void Session::on_hello_req(uint32_t id, Span body) {
  HelloReq hello;
  if (!hello.parse(body)) return send_error(id, {Code::kBadLength, ""});
  version_matches_ = hello.major == kProtocolMajor;
  if (!version_matches_) return send_error(id, {Code::kVersion, "1.1"});
  const size_t theirs = hello.max_frame < kMinFrame ? kMinFrame : hello.max_frame;
  peer_max_frame_ = theirs < kMaxFrame ? theirs : kMaxFrame;
  Writer out(answer_, sizeof answer_);
  write_hello(out);
  send(kHello, id, {answer_, out.size()});
}

void Session::on_ping(uint32_t id, Span body) {
  const uint64_t received = hal_.clock_us();
  if (body.size > kMaxFrame - kFrameOverhead - kPongHead) {
    return send_error(id, {Code::kBadLength, "PONG would not fit a frame"});
  }
  Writer out(answer_, sizeof answer_);
  out.u64(received);
  out.u64(hal_.clock_us());
  out.bytes(body.data, body.size);
  send(kPong, id, {answer_, out.size()});
}

void Session::on_cancel(uint32_t id) {
  Request request;
  if (queue_.remove(id, &request)) {
    pool_.give(request.body);
  } else if (reassembly_.holds(id)) {
    reassembly_.drop(pool_);
  } else {
    return;
  }
  const Span body = error_body({Code::kCancelled, ""});
  answers_.remember(id, kError, body);
  send(kError, id, body);
}

void Session::send(uint8_t type, uint32_t id, Span body) {
  const size_t room = peer_max_frame_ - kFrameOverhead;
  if (body.size <= room) return send_frame(type, 0, id, {}, body);
  for (size_t at = 0; at < body.size;) {
    const size_t left = body.size - at;
    const size_t count = left < room - kFragmentHead ? left : room - kFragmentHead;
    uint8_t head[kFragmentHead];
    Writer out(head, sizeof head);
    out.u32(static_cast<uint32_t>(body.size));
    out.u32(static_cast<uint32_t>(at));
    send_frame(type, kFlagFragment, id, {head, sizeof head}, {body.data + at, count});
    at += count;
  }
}

void Session::send_frame(uint8_t type, uint8_t flags, uint32_t id, Span head, Span body) {
  const size_t size = encode_frame({type, flags, seq_sent_++, id}, head, body, tx_, sizeof tx_);
  hal_.uart_write(tx_, size);
  ++stats_.frames_sent;
}

Span Session::error_body(const Status& status) {
  Writer out(text_, sizeof text_);
  out.u16(static_cast<uint16_t>(status.code));
  out.bytes(status.text, strnlen(status.text, kMaxText));
  return {text_, out.size()};
}

void Session::log(uint8_t level, const char* text) {
  Writer out(text_, sizeof text_);
  out.u8(level);
  out.bytes(text, strnlen(text, kMaxText));
  send(kLog, 0, {text_, out.size()});
}

}  // namespace edge
