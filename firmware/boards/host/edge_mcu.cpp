#include "boards/host/edge_mcu.h"

#include <chrono>
#include <cstring>
#include <new>

#include "core/crc32.h"
#include "core/frame.h"
#include "core/session.h"
#include "core/sha256.h"
#include "core/validator.h"

#define EDGE_EXPORT __attribute__((visibility("default")))

namespace {

class HostHal final : public edge::Hal {
 public:
  explicit HostHal(const edge_mcu_config& config) : config_(config) {}

  const char* board_name() override { return "host"; }
  void uart_write(const uint8_t* data, size_t size) override {
    config_.uart_write(config_.context, data, size);
  }
  uint64_t clock_us() override {
    if (config_.clock_us != nullptr) return config_.clock_us(config_.context);
    const auto passed = std::chrono::steady_clock::now() - created_;
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(passed).count());
  }
  edge::FlashGeometry flash_geometry() override {
    return {config_.flash_size, config_.flash_erase_size, config_.flash_write_size};
  }
  bool flash_read(uint32_t offset, void* out, size_t size) override {
    if (offset > config_.flash_size || size > config_.flash_size - offset) return false;
    memcpy(out, config_.flash_base + offset, size);
    return true;
  }
  bool flash_write(uint32_t offset, const void* data, size_t size) override {
    return config_.flash_write(config_.context, offset, static_cast<const uint8_t*>(data), size) == 0;
  }
  bool flash_erase(uint32_t offset) override { return config_.flash_erase(config_.context, offset) == 0; }
  const uint8_t* flash_map(uint32_t offset) override { return config_.flash_base + offset; }
  void watchdog_kick() override {}  // the host has none
  edge::ResetCause reset_cause() override { return static_cast<edge::ResetCause>(config_.reset_cause); }
  uint64_t random64() override { return config_.random64(config_.context); }
  uint64_t unique_id() override { return config_.unique_id; }
  void request_reset() override { config_.request_reset(config_.context); }
  uint8_t sources() override { return config_.sample != nullptr ? config_.sources : 0; }
  bool sample(uint8_t source, uint8_t* out, size_t size) override {
    return config_.sample(config_.context, source, out, size) == 0;
  }
  const edge::HalCounters* counters() override { return &counters_; }

 private:
  const edge_mcu_config& config_;
  const edge::HalCounters
      counters_;  // a process has no UART to overrun, and its stack says nothing of a board's
  std::chrono::steady_clock::time_point created_ = std::chrono::steady_clock::now();
};

class HostEngine final : public edge::Engine {
 public:
  explicit HostEngine(const edge_mcu_config& config) : config_(config) {}

  const char* name() override { return config_.engine_name; }
  edge::Span operators() override { return {config_.operators, config_.operator_count}; }
  uint32_t arena_size() override { return config_.arena_size; }
  const char* last_error() override { return config_.engine_error(config_.context); }
  edge::LoadResult load(edge::Span model, edge::ModelInfo* info) override {
    return static_cast<edge::LoadResult>(config_.engine_load(
        config_.context, model.data, model.size, &info->input_bytes, &info->output_bytes, &info->arena_used));
  }
  bool invoke(edge::Span inputs, uint8_t* outputs, size_t output_size) override {
    return config_.engine_invoke(config_.context, inputs.data, inputs.size, outputs, output_size) == 0;
  }

 private:
  const edge_mcu_config& config_;
};

class HostVerifier final : public edge::Verifier {
 public:
  explicit HostVerifier(const edge_mcu_config& config) : config_(config) {}
  bool verify(const uint8_t* message, size_t size, const uint8_t signature[edge::kSignatureSize]) override {
    return config_.verify(config_.context, message, size, signature) == 0;
  }

 private:
  const edge_mcu_config& config_;
};

bool complete(const edge_mcu_config& config) {
  const bool engine =
      config.engine_load == nullptr || (config.engine_name != nullptr && config.engine_invoke != nullptr &&
                                        config.engine_error != nullptr && config.operators != nullptr);
  return config.abi == EDGE_MCU_ABI && config.uart_write != nullptr && config.random64 != nullptr &&
         config.request_reset != nullptr && config.flash_base != nullptr && config.flash_write != nullptr &&
         config.flash_erase != nullptr && engine;
}

}  // namespace

// Everything that a board keeps in static memory.
struct edge_mcu {
  explicit edge_mcu(const edge_mcu_config& from)
      : config(from),
        hal(config),
        engine(config),
        verifier(config),
        session(hal, config.engine_load != nullptr ? static_cast<edge::Engine&>(engine) : edge::null_engine(),
                config.verify != nullptr ? &verifier : nullptr, config.window) {}

  const edge_mcu_config config;
  HostHal hal;
  HostEngine engine;
  HostVerifier verifier;
  edge::Session session;
};

struct edge_decoder {
  explicit edge_decoder(size_t max_frame, uint8_t* buffer) : buffer(buffer), decoder(buffer, max_frame) {}
  ~edge_decoder() { delete[] buffer; }
  uint8_t* buffer;
  edge::FrameDecoder decoder;
};

EDGE_EXPORT edge_mcu* edge_mcu_create(const edge_mcu_config* config) {
  if (config == nullptr || !complete(*config)) return nullptr;
  edge_mcu* mcu = new (std::nothrow) edge_mcu(*config);
  if (mcu != nullptr) mcu->session.start();
  return mcu;
}

EDGE_EXPORT void edge_mcu_destroy(edge_mcu* mcu) { delete mcu; }

EDGE_EXPORT int edge_mcu_feed(edge_mcu* mcu, const uint8_t* data, size_t size) {
  mcu->session.feed(data, size);
  return mcu->session.pending() ? 1 : 0;
}

EDGE_EXPORT int edge_mcu_poll(edge_mcu* mcu) { return mcu->session.poll() ? 1 : 0; }

EDGE_EXPORT uint64_t edge_mcu_idle_us(edge_mcu* mcu) { return mcu->session.idle_us(); }

EDGE_EXPORT uint32_t edge_crc32(const uint8_t* data, size_t size) { return edge::crc32(0, data, size); }

EDGE_EXPORT void edge_sha256(const uint8_t* data, size_t size, uint8_t* digest) {
  edge::Sha256 sha;
  sha.update(data, size);
  sha.finish(digest);
}

EDGE_EXPORT size_t edge_frame_encode(uint8_t type, uint8_t flags, uint16_t seq, uint32_t id,
                                     const uint8_t* payload, size_t size, uint8_t* out, size_t capacity) {
  return edge::encode_frame({type, flags, seq, id}, {}, {payload, size}, out, capacity);
}

EDGE_EXPORT edge_decoder* edge_decoder_create(size_t max_frame) {
  return new edge_decoder(max_frame, new uint8_t[max_frame]);
}

EDGE_EXPORT void edge_decoder_destroy(edge_decoder* decoder) { delete decoder; }

EDGE_EXPORT size_t edge_decoder_push(edge_decoder* decoder, const uint8_t* data, size_t size,
                                     edge_decoded* out) {
  edge::FrameDecoder::Event event;
  const size_t used = decoder->decoder.push(data, size, &event);
  memset(out, 0, sizeof *out);
  out->event = static_cast<uint8_t>(event);
  if (event == edge::FrameDecoder::Event::kFrame) {
    const edge::Frame& frame = decoder->decoder.frame();
    out->type = frame.header.type;
    out->flags = frame.header.flags;
    out->seq = frame.header.seq;
    out->id = frame.header.id;
    out->payload = frame.payload.data;
    out->size = frame.payload.size;
  }
  return used;
}

EDGE_EXPORT size_t edge_known_operators(uint8_t* out, size_t capacity) {
  return edge::known_operators(out, capacity);
}

EDGE_EXPORT int edge_validate_model(const uint8_t* model, size_t size, const uint8_t* operators,
                                    size_t operator_count, uint32_t* input_bytes, uint32_t* output_bytes,
                                    const char** text) {
  edge::ModelShape shape;
  const edge::Status status = edge::validate_model({model, size}, {operators, operator_count}, &shape);
  *input_bytes = shape.input_bytes;
  *output_bytes = shape.output_bytes;
  *text = status.text;
  return static_cast<int>(status.code);
}
