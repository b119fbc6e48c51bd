// The protocol's MCU side. Bytes in, frames out through the board's UART; one request computed per poll.
//
// `feed` and `poll` are called from one thread and not from within each other. The object is large (limits.h)
// and meant to be static; it never allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/frame.h"
#include "core/limits.h"
#include "core/messages.h"
#include "core/model_update.h"
#include "core/requests.h"
#include "core/stream.h"
#include "engine/engine.h"
#include "hal/hal.h"
#include "hal/verify.h"

namespace edge {

class Session {
 public:
  // `window` is 1 to kMaxWindow; `verifier` may be null.
  Session(Hal& hal, Engine& engine, Verifier* verifier, size_t window);

  // Loads the active model and announces the reset with HELLO.
  void start();

  // Takes received bytes. PING, HELLO_REQ, CANCEL, RESET and what concerns the stream are answered at once,
  // all else is queued.
  void feed(const uint8_t* data, size_t size);

  // Runs the oldest queued request, or takes the sample that is due; in turn where there are both. Ends a
  // trial that is over. True if requests are queued still.
  bool poll();

  bool pending() const { return !resetting_ && queue_.size() > 0; }

  // How long poll() has nothing to serve if no bytes come: microseconds, UINT64_MAX for ever. A trial ends
  // with the first poll() after its time, so call that a few times a second in any case.
  uint64_t idle_us();

 private:
  void on_frame(const Frame& frame);
  void on_fragment(const Frame& frame);
  void on_message(const FrameHeader& header, Span body, bool pooled);
  bool answer_at_once(const FrameHeader& header, Span body);
  void enqueue(const FrameHeader& header, Span body, bool pooled);
  void count_gap(const FrameHeader& header);

  void on_hello_req(uint32_t id, Span body);
  void on_ping(uint32_t id, Span body);
  void on_cancel(uint32_t id);
  void on_stream(const FrameHeader& header, Span body);
  Status start_stream(uint32_t id, Span body);
  void sample_stream();
  void send_stream();

  // Each writes the answer's body and sets its type.
  void serve_next();
  void announce();
  Status execute(const Request& request, Writer& out, uint8_t* type);
  Status infer(const Request& request, Writer& out);
  // Whether this is the model that runs.
  Status check_model(const uint8_t* tag);
  void run_request();
  Status model_message(const Request& request, Writer& out);
  void write_hello(Writer& out);

  void send(uint8_t type, uint32_t id, Span body);
  void send_frame(uint8_t type, uint8_t flags, uint32_t id, Span head, Span body);
  Span error_body(const Status& status);
  void send_error(uint32_t id, const Status& status) { send(kError, id, error_body(status)); }
  void log(uint8_t level, const char* text);

  Hal& hal_;
  Engine& engine_;
  ModelUpdate models_;
  size_t window_;
  uint64_t boot_id_ = 0;

  FrameDecoder decoder_;
  RequestQueue queue_;
  AnswerStore answers_;
  Reassembly reassembly_;
  BodyPool pool_;
  Stream stream_;
  Stats stats_;

  size_t peer_max_frame_ = kMinFrame;
  bool version_matches_ = true;
  bool resetting_ = false;
  bool sampled_last_ = false;
  bool seq_known_ = false;
  uint16_t seq_expected_ = 0;
  uint16_t seq_sent_ = 0;

  uint8_t rx_[kMaxFrame];
  uint8_t tx_[kMaxLine];
  uint8_t text_[2 + kMaxText];
  uint8_t answer_[kMaxMessage];
};

}  // namespace edge
