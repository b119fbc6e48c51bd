// Message bodies of docs/wire-protocol.md, section 3: what the MCU reads and what it writes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bytes.h"
#include "core/limits.h"
#include "core/sha256.h"
#include "hal/hal.h"
#include "hal/verify.h"

namespace edge {

constexpr uint8_t kProtocolMajor = 1;
constexpr uint8_t kProtocolMinor = 1;

enum Type : uint8_t {
  kHelloReq = 0x01,
  kPing = 0x02,
  kInfer = 0x03,
  kCancel = 0x04,
  kReset = 0x05,
  kModelBegin = 0x10,
  kModelChunk = 0x11,
  kModelCommit = 0x12,
  kModelAbort = 0x13,
  kModelQuery = 0x14,
  kModelConfirm = 0x15,
  kModelRollback = 0x16,
  kStatsReq = 0x20,
  kStreamStart = 0x30,
  kStreamCredit = 0x31,
  kStreamStop = 0x32,
  kHello = 0x81,
  kPong = 0x82,
  kResult = 0x83,
  kModelStatus = 0x90,
  kStats = 0xA0,
  kLog = 0xA1,
  kStreamStatus = 0xB0,
  kStreamResult = 0xB1,
  kError = 0xFF,
};

enum class Code : uint16_t {
  kNone = 0,  // no error; never sent
  kUnknownType = 1,
  kBadLength = 2,
  kBadFragment = 3,
  kTooLarge = 4,
  kBusy = 5,
  kVersion = 6,
  kNoEngine = 7,
  kNoModel = 8,
  kModelMismatch = 9,
  kDeadline = 10,
  kCancelled = 11,
  kInvoke = 12,
  kNotBegun = 13,
  kBadOffset = 14,
  kIncomplete = 15,
  kDigest = 16,
  kSignature = 17,
  kDowngrade = 18,
  kInvalidModel = 19,
  kOperator = 20,
  kArena = 21,
  kSelftest = 22,
  kFlash = 23,
  kInternal = 24,
  kBoard = 25,
  kInTrial = 26,
  kSensor = 27,
};

// What went wrong, and one line for people. `text` is a literal or outlives the answer.
struct Status {
  Code code = Code::kNone;
  const char* text = "";
  bool ok() const { return code == Code::kNone; }
};

constexpr uint8_t kLogWarning = 2;
constexpr uint8_t kLogError = 3;

constexpr uint32_t kCapEngine = 1;
constexpr uint32_t kCapVerifies = 2;
constexpr uint32_t kCapStreams = 4;
constexpr uint32_t kCapKeepsModels = 8;

constexpr size_t kModelTag = 8;       // first bytes of the model's SHA-256
constexpr size_t kFragmentHead = 8;   // total and offset
constexpr size_t kPongHead = 16;      // t_rx and t_tx
constexpr size_t kResultHead = 16;    // model, queue_us, compute_us
constexpr size_t kChunkHead = 4;      // offset
constexpr size_t kStreamHead = 22;    // seq, skipped, time_us, compute_us, output_bytes
constexpr size_t kStatusBitmap = 32;  // bytes
constexpr size_t kModelStatusSize = 16 + kStatusBitmap + kSha256Size;
constexpr size_t kBoardClass = 16;    // bytes of a board's name in a manifest
constexpr size_t kOperatorBits = 16;  // bytes: one bit for each builtin operator code below 128
constexpr size_t kManifestHead = 85;  // MODEL_BEGIN from format through image_sha256
constexpr size_t kManifestSize = kManifestHead + kBoardClass + kOperatorBits + 1 + kSignatureSize;
constexpr size_t kManifestSize1 = kManifestHead + 1 + kSignatureSize;  // as format 1 has it

enum class SlotState : uint8_t { kEmpty = 0, kReceiving = 1, kStored = 2, kTrial = 3, kActive = 4, kBad = 5 };

// Why the last trial did not end in a confirmation; as in HELLO.rollback.
enum class Rollback : uint8_t {
  kNone = 0,
  kReset = 1,      // power, reset pin, RESET: before it was confirmed
  kCrash = 2,      // watchdog or fault
  kTimeout = 3,    // not confirmed within kTrialSeconds
  kInvoke = 4,     // an inference failed
  kRequested = 5,  // MODEL_ROLLBACK
};

struct HelloReq {
  uint8_t major = 0;
  uint8_t minor = 0;
  uint16_t max_frame = 0;
  bool parse(Span body);
};

struct Infer {
  const uint8_t* model = nullptr;  // kModelTag bytes
  uint32_t budget_ms = 0;
  Span inputs;
  bool parse(Span body);
};

struct Fragment {
  uint32_t total = 0;
  uint32_t offset = 0;
  Span data;
  bool parse(Span payload);
};

struct ModelChunk {
  uint32_t offset = 0;
  Span data;
  bool parse(Span body);
};

enum class SendInputs : uint8_t { kNever = 0, kBelow = 1, kAlways = 2 };

struct StreamStart {
  uint8_t source = 0;
  SendInputs send_inputs = SendInputs::kNever;
  int8_t threshold = 0;
  uint32_t interval_ms = 0;
  uint32_t credits = 0;
  const uint8_t* model = nullptr;  // kModelTag bytes
  bool parse(Span body);
};

// MODEL_BEGIN; also what the directory in flash keeps of a slot.
struct Manifest {
  uint8_t format = 0;
  uint8_t flags = 0;
  uint16_t chunk = 0;
  uint32_t model_length = 0;
  uint32_t selftest_length = 0;
  uint32_t counter = 0;
  uint32_t arena = 0;
  uint8_t selftest_tolerance = 0;
  uint8_t model_sha256[kSha256Size] = {};
  uint8_t image_sha256[kSha256Size] = {};
  // Format 2: the board it is for (padded with zeros; all zeros: any), and the operators it needs.
  char board[kBoardClass] = {};
  uint8_t operators[kOperatorBits] = {};
  uint8_t signature_kind = 0;
  uint8_t signature[kSignatureSize] = {};

  bool parse(Span body);
  // kManifestSize bytes (kManifestSize1 in format 1), with a signature of zeros if there is none.
  void write(Writer& out) const;
  size_t signed_size() const {
    return format <= 1 ? kManifestHead : kManifestHead + kBoardClass + kOperatorBits;
  }
  uint64_t image_length() const { return static_cast<uint64_t>(model_length) + selftest_length; }
};

constexpr uint8_t kAllowDowngrade = 1;  // MODEL_BEGIN.flags
constexpr uint8_t kCommitTrial = 1;  // MODEL_COMMIT.flags, which a gateway of minor version 0 does not send
constexpr uint8_t kSignatureEd25519 = 1;

struct ModelStatus {
  uint8_t slot = 0xFF;
  SlotState state = SlotState::kEmpty;
  uint16_t chunk = 0;
  uint32_t length = 0;
  uint32_t received = 0;
  uint32_t next = 0;
  uint8_t bitmap[kStatusBitmap] = {};
  uint8_t image_sha256[kSha256Size] = {};
  void write(Writer& out) const;
};

// Numbers as in STATS; those not counted on a board are not sent.
struct Stats {
  uint64_t frames_received = 0;
  uint64_t frames_sent = 0;
  uint64_t bad_crc = 0;
  uint64_t bad_frames = 0;
  uint64_t oversize = 0;
  uint64_t inferences = 0;
  uint64_t inferences_failed = 0;
  uint64_t busy = 0;
  uint64_t expired = 0;
  uint64_t compute_us = 0;
  uint64_t lost_frames = 0;
  uint64_t answers_repeated = 0;
  uint64_t queue_high_water = 0;
  uint64_t stream_results = 0;
  uint64_t stream_skipped = 0;

  void ran(uint64_t us, bool good) {
    compute_us += us;
    ++inferences;
    if (!good) ++inferences_failed;
  }
  // `hal` may be null: the board does not count.
  void write(Writer& out, uint64_t uptime_us, uint64_t arena_used, uint64_t flash_operations,
             uint64_t trial_left_us, const HalCounters* hal) const;
};

}  // namespace edge
