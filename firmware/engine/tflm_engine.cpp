// TensorFlow Lite Micro as the engine. Only what is common to the upstream tree and the library of
// PlatformIO's registry is used: a MicroInterpreter built with four arguments, and a resolver that names its
// operators.
#ifdef EDGE_TFLM

#include <cstring>
#include <new>

#include "engine/engine.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

#ifndef EDGE_ARENA
#define EDGE_ARENA 65536
#endif
#ifndef EDGE_TFLM_NAME
#define EDGE_TFLM_NAME "tflite-micro"
#endif

namespace edge {
namespace {

// Each by its function of the resolver and its code in the schema. What is not here is neither linked nor
// accepted.
#define EDGE_OPERATORS(X) \
  X(Add, 0)               \
  X(AveragePool2D, 1)     \
  X(Conv2D, 3)            \
  X(DepthwiseConv2D, 4)   \
  X(Dequantize, 6)        \
  X(FullyConnected, 9)    \
  X(Logistic, 14)         \
  X(MaxPool2D, 17)        \
  X(Relu, 19)             \
  X(Relu6, 21)            \
  X(Reshape, 22)          \
  X(Softmax, 25)          \
  X(Pad, 34)              \
  X(Mean, 40)             \
  X(Quantize, 114)

#define EDGE_CODE(name, code) code,
constexpr uint8_t kOperators[] = {EDGE_OPERATORS(EDGE_CODE)};
#undef EDGE_CODE

using Resolver = tflite::MicroMutableOpResolver<sizeof kOperators>;

// Aligned, because only then is what the interpreter says it uses exact.
#if defined(__arm__) && !defined(ARDUINO)
__attribute__((section(".arena")))
#endif
alignas(16) uint8_t arena[EDGE_ARENA];

// The interpreter's place. One is enough: there is one arena, and loading the model of the other slot
// replaces it.
alignas(tflite::MicroInterpreter) uint8_t place[sizeof(tflite::MicroInterpreter)];

class TflmEngine final : public Engine {
 public:
  const char* name() override { return EDGE_TFLM_NAME; }
  Span operators() override { return {kOperators, sizeof kOperators}; }
  uint32_t arena_size() override { return sizeof arena; }
  const char* last_error() override { return error_; }

  LoadResult load(Span model, ModelInfo* info) override {
    unload();
    if (!resolve()) return fail(LoadResult::kInvalid, "operator list");
    interpreter_ =
        new (place) tflite::MicroInterpreter(tflite::GetModel(model.data), resolver_, arena, sizeof arena);
    if (interpreter_->initialization_status() != kTfLiteOk) {
      return fail(LoadResult::kInvalid, "the interpreter refused it");
    }
    // It does not say which of the two it was. The validator has passed the file, so memory is the likelier
    // one.
    if (interpreter_->AllocateTensors() != kTfLiteOk) {
      return fail(LoadResult::kArena, "not prepared: over the arena, or shapes that do not go together");
    }
    *info = ModelInfo();
    for (size_t i = 0; i < interpreter_->inputs_size(); ++i)
      info->input_bytes += size_of(interpreter_->input(i));
    for (size_t i = 0; i < interpreter_->outputs_size(); ++i) {
      info->output_bytes += size_of(interpreter_->output(i));
    }
    info->arena_used = static_cast<uint32_t>(interpreter_->arena_used_bytes());
    return LoadResult::kOk;
  }

  bool invoke(Span inputs, uint8_t* outputs, size_t output_size) override {
    if (interpreter_ == nullptr) return refuse("no model is loaded");
    size_t at = 0;
    for (size_t i = 0; i < interpreter_->inputs_size(); ++i) {
      TfLiteTensor* tensor = interpreter_->input(i);
      if (tensor->bytes > inputs.size - at) return refuse("inputs are too short");
      memcpy(tensor->data.raw, inputs.data + at, tensor->bytes);
      at += tensor->bytes;
    }
    if (interpreter_->Invoke() != kTfLiteOk) return refuse("Invoke failed");
    at = 0;
    for (size_t i = 0; i < interpreter_->outputs_size(); ++i) {
      const TfLiteTensor* tensor = interpreter_->output(i);
      if (tensor->bytes > output_size - at) return refuse("outputs are too long");
      memcpy(outputs + at, tensor->data.raw, tensor->bytes);
      at += tensor->bytes;
    }
    return true;
  }

 private:
  static uint32_t size_of(const TfLiteTensor* tensor) { return static_cast<uint32_t>(tensor->bytes); }

  bool resolve() {
    if (resolved_) return true;
    bool good = true;
#define EDGE_ADD(name, code) good = resolver_.Add##name() == kTfLiteOk && good;
    EDGE_OPERATORS(EDGE_ADD)
#undef EDGE_ADD
    resolved_ = good;
    return good;
  }

  void unload() {
    if (interpreter_ != nullptr) interpreter_->~MicroInterpreter();
    interpreter_ = nullptr;
  }

  LoadResult fail(LoadResult result, const char* text) {
    unload();
    error_ = text;
    return result;
  }

  bool refuse(const char* text) {
    error_ = text;
    return false;
  }

  Resolver resolver_;
  bool resolved_ = false;
  tflite::MicroInterpreter* interpreter_ = nullptr;
  const char* error_ = "";
};

TflmEngine engine;

}  // namespace

Engine& tflm_engine() { return engine; }

}  // namespace edge

#endif  // EDGE_TFLM
