// Every size of the firmware. A board with other memory overrides one with -D in platformio.ini.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

// Decoded frame, header and CRC included: 1,072 bytes of payload, so that 1 KB of tensor and its INFER header
// fit.
#ifndef EDGE_MAX_FRAME
#define EDGE_MAX_FRAME 1088
#endif
constexpr size_t kMaxFrame = EDGE_MAX_FRAME;

// What both sides may send before HELLO was exchanged: fixed by the protocol.
constexpr size_t kMinFrame = 256;

// Header (8) and CRC (4): fixed by the protocol.
constexpr size_t kFrameOverhead = 12;

// COBS adds one byte per started 254 and the delimiter one.
constexpr size_t kMaxLine = kMaxFrame + kMaxFrame / 254 + 2;

// Largest reassembled body. 32 KiB holds a 96 x 96 RGB picture; kMaxWindow + 1 buffers of it are reserved.
#ifndef EDGE_MAX_MESSAGE
#define EDGE_MAX_MESSAGE 32768
#endif
constexpr size_t kMaxMessage = EDGE_MAX_MESSAGE;

// Open requests. Four keep the line busy while one computes; more only adds waiting.
#ifndef EDGE_MAX_WINDOW
#define EDGE_MAX_WINDOW 8
#endif
constexpr size_t kMaxWindow = EDGE_MAX_WINDOW;

// An answer up to this size is kept for a RETRY. A class score vector fits, and so does every answer to a
// request that changes something; a picture is computed again.
#ifndef EDGE_STORED_ANSWER
#define EDGE_STORED_ANSWER 256
#endif
constexpr size_t kStoredAnswer = EDGE_STORED_ANSWER;

// The sample of a stream with its outputs, from the moment it is taken until there is credit to send it.
#ifndef EDGE_MAX_SAMPLE
#define EDGE_MAX_SAMPLE EDGE_MAX_MESSAGE
#endif
constexpr size_t kMaxSample = EDGE_MAX_SAMPLE;
static_assert(kMaxSample <= kMaxMessage && kMaxSample <= UINT16_MAX, "a sample travels as one message");

// Between two samples of a stream: one hour, whose microseconds fit 32 bits.
constexpr uint32_t kMaxIntervalMs = 3'600'000;

// Images in flash: one runs, one is received.
constexpr size_t kSlots = 2;

// Chunks of one transfer: a bitmap of this many bits in RAM. 1,024 chunks of 1,072 bytes are over 1 MB.
constexpr size_t kMaxChunks = 1024;

// Erase blocks of one slot: a bitmap too. 512 blocks of 4 KiB are 2 MiB.
constexpr size_t kMaxSlotBlocks = 512;

// Journal entries: every chunk, every block erased once, and 256 blocks erased again after power cuts.
constexpr size_t kJournalEntries = kMaxChunks + kMaxSlotBlocks + 256;

// Chunks start at multiples of this, so that no flash word is written twice: the widest write unit of our
// boards.
constexpr size_t kFlashAlign = 16;

// The largest chunk, max_frame - 16, must be one that can be stored.
static_assert((kMaxFrame - kFrameOverhead - 4) % kFlashAlign == 0, "EDGE_MAX_FRAME must be a multiple of 16");

// One directory record: both slots' manifests (2 x 183 bytes), sequence and CRC, rounded up.
constexpr size_t kDirectoryRecord = 512;

// How long a new model may run unconfirmed: a gateway needs seconds to prove it, a person who plugs a cable
// in again a minute or two.
#ifndef EDGE_TRIAL_S
#define EDGE_TRIAL_S 300
#endif
constexpr uint32_t kTrialSeconds = EDGE_TRIAL_S;
static_assert(kTrialSeconds >= 1 && kTrialSeconds <= 3600, "EDGE_TRIAL_S: 1 to 3600");

// Between two kicks of the watchdog while hashing: under a millisecond on the slowest board.
constexpr size_t kHashStep = 4096;

// Validator: tables of the model that it follows. Above any model that a microcontroller runs.
constexpr size_t kMaxTensors = 512;
constexpr size_t kMaxOperators = 512;
constexpr size_t kMaxOperatorCodes = 64;
constexpr size_t kMaxBuffers = 1024;
constexpr size_t kMaxRank = 6;
constexpr size_t kMaxModelIo = 8;
constexpr size_t kMaxTableFields =
    64;  // the schema's widest table has 13; bounds the time that a crafted file takes
constexpr size_t kMaxChannels = 4096;  // quantized one by one

// Tables of 1 KiB for the CRC, and bytes taken at a time: 1, or 4 to 8 where flash is plenty. 0 does with 64
// bytes and half a byte at a time.
#ifndef EDGE_CRC_TABLES
#define EDGE_CRC_TABLES 1
#endif
constexpr size_t kCrcTables = EDGE_CRC_TABLES;

// Text of an ERROR or LOG: one line.
constexpr size_t kMaxText = 96;

}  // namespace edge
