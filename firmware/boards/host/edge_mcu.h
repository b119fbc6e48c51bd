/* The firmware as a shared library: one instance is one board whose hardware is a table of callbacks.
 *
 * Calls for one instance come from one thread. Instances share nothing. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of this file. */
#define EDGE_MCU_ABI 2u

typedef struct {
  uint32_t abi; /* EDGE_MCU_ABI of the caller */
  void* context;

  void (*uart_write)(void* context, const uint8_t* data, size_t size);
  uint64_t (*clock_us)(
      void* context); /* null: microseconds of the machine's monotonic clock since creation */
  uint64_t (*random64)(void* context);
  void (*request_reset)(void* context); /* the owner destroys the instance and creates another */

  /* Flash as memory at flash_base, changed only by these two; 0 is success. */
  const uint8_t* flash_base;
  uint32_t flash_size, flash_erase_size, flash_write_size;
  int (*flash_write)(void* context, uint32_t offset, const uint8_t* data, size_t size);
  int (*flash_erase)(void* context, uint32_t offset);

  /* Engine; engine_load null: none. engine_load returns a LoadResult (engine/engine.h), engine_invoke 0 on
   * success. */
  const char* engine_name;
  const uint8_t* operators;
  uint32_t operator_count;
  uint32_t arena_size;
  int (*engine_load)(void* context, const uint8_t* model, size_t size, uint32_t* input_bytes,
                     uint32_t* output_bytes, uint32_t* arena_used);
  int (*engine_invoke)(void* context, const uint8_t* inputs, size_t input_size, uint8_t* outputs,
                       size_t output_size);
  const char* (*engine_error)(void* context);

  /* Ed25519; null: the board does not verify. 0 is a good signature. */
  int (*verify)(void* context, const uint8_t* message, size_t size, const uint8_t* signature);

  /* The board's sensors, numbered from 0; sample null: none. sample writes the next reading, 0 on success. */
  int (*sample)(void* context, uint8_t source, uint8_t* out, size_t size);

  uint64_t unique_id;
  uint8_t sources;
  uint8_t reset_cause;
  uint8_t window;
} edge_mcu_config;

typedef struct edge_mcu edge_mcu;

/* Boots: loads the active model and writes HELLO. Null if the ABI differs or a callback is missing. */
edge_mcu* edge_mcu_create(const edge_mcu_config* config);
void edge_mcu_destroy(edge_mcu* mcu);
/* 1 if requests are queued: edge_mcu_poll has work. */
int edge_mcu_feed(edge_mcu* mcu, const uint8_t* data, size_t size);
/* Runs one queued request at most, or takes one sample; 1 if requests are queued still. */
int edge_mcu_poll(edge_mcu* mcu);
/* Microseconds for which edge_mcu_poll has nothing to serve unless bytes come; UINT64_MAX: for ever. */
uint64_t edge_mcu_idle_us(edge_mcu* mcu);

/* The parts, for tests. */
uint32_t edge_crc32(const uint8_t* data, size_t size);
void edge_sha256(const uint8_t* data, size_t size, uint8_t* digest);
size_t edge_frame_encode(uint8_t type, uint8_t flags, uint16_t seq, uint32_t id, const uint8_t* payload,
                         size_t size, uint8_t* out, size_t capacity);

typedef struct {
  uint8_t event; /* FrameDecoder::Event: 0 none, 1 frame, 2 decode, 3 short, 4 crc, 5 oversize */
  uint8_t type, flags;
  uint16_t seq;
  uint32_t id;
  const uint8_t* payload;
  size_t size;
} edge_decoded;

typedef struct edge_decoder edge_decoder;
edge_decoder* edge_decoder_create(size_t max_frame);
void edge_decoder_destroy(edge_decoder* decoder);
/* Consumes up to and including the byte that makes an event; returns how many. */
size_t edge_decoder_push(edge_decoder* decoder, const uint8_t* data, size_t size, edge_decoded* out);

/* The operator codes that the validator knows how to check: an engine offers some of them. Returns how many.
 */
size_t edge_known_operators(uint8_t* out, size_t capacity);

/* 0 if valid, else the error code of the wire protocol; `text` says why and is static. */
int edge_validate_model(const uint8_t* model, size_t size, const uint8_t* operators, size_t operator_count,
                        uint32_t* input_bytes, uint32_t* output_bytes, const char** text);

#ifdef __cplusplus
}
#endif
