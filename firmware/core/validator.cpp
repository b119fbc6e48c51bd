#include "core/validator.h"

#include <cstring>

#include "core/flatbuffer.h"
#include "core/limits.h"

namespace edge {
namespace {

using flatbuffer::Buffer;
using flatbuffer::Table;
using flatbuffer::Vector;

constexpr uint32_t kSchemaVersion = 3;
constexpr uint32_t kAny = 0xFF;
constexpr uint32_t kInfinity = 0x7F800000;  // the bits of floats
constexpr uint32_t kMinusZero = 0x80000000;

// Kinds of options.
constexpr uint8_t kConvOptions = 1;
constexpr uint8_t kDepthwiseOptions = 2;
constexpr uint8_t kPoolOptions = 5;
constexpr uint8_t kSoftmaxOptions = 9;
constexpr uint8_t kReshapeOptions = 17;
constexpr uint8_t kSqueezeOptions = 30;
constexpr uint8_t kTransposeConvOptions = 49;
constexpr uint32_t kMaxStride = 0x7FFF;
constexpr float kLeastSoftmaxScale = 1.0f / (1 << 26);

// The one that TensorFlow Lite Micro looks for: a memory plan that it would follow unchecked.
constexpr char kOfflinePlan[] = "OfflineMemoryAllocation";

// What the kernels read without looking: an operator with fewer tensors would make them read behind a list.
struct Arity {
  uint8_t code;
  uint8_t min_inputs;
  uint8_t max_inputs;
  uint8_t outputs;
  uint8_t options;      // kind that it must have, 0: none that is read without looking
  uint8_t rank;         // of input 0 and output 0; 0: any
  uint8_t filter_rank;  // of input 1
};

constexpr Arity kArity[] = {
    {0, 2, 2, 1, 11, 0, 0},      // ADD
    {1, 1, 1, 1, 5, 4, 0},       // AVERAGE_POOL_2D
    {2, 1, 16, 1, 10, 0, 0},     // CONCATENATION
    {3, 2, 3, 1, 1, 4, 4},       // CONV_2D
    {4, 2, 3, 1, 2, 4, 4},       // DEPTHWISE_CONV_2D
    {6, 1, 1, 1, 0, 0, 0},       // DEQUANTIZE
    {9, 2, 3, 1, 8, 0, 2},       // FULLY_CONNECTED
    {14, 1, 1, 1, 0, 0, 0},      // LOGISTIC
    {17, 1, 1, 1, 5, 4, 0},      // MAX_POOL_2D
    {18, 2, 2, 1, 21, 0, 0},     // MUL
    {19, 1, 1, 1, 0, 0, 0},      // RELU
    {21, 1, 1, 1, 0, 0, 0},      // RELU6
    {22, 1, 2, 1, 0, 0, 0},      // RESHAPE
    {25, 1, 1, 1, 9, 0, 0},      // SOFTMAX
    {28, 1, 1, 1, 0, 0, 0},      // TANH
    {34, 2, 2, 1, 0, 0, 0},      // PAD
    {39, 2, 2, 1, 0, 0, 0},      // TRANSPOSE
    {40, 2, 2, 1, 27, 0, 0},     // MEAN
    {41, 2, 2, 1, 28, 0, 0},     // SUB
    {43, 1, 1, 1, 30, 0, 0},     // SQUEEZE
    {45, 4, 4, 1, 32, 0, 0},     // STRIDED_SLICE
    {49, 2, 2, kAny, 35, 0, 0},  // SPLIT
    {55, 2, 2, 1, 0, 0, 0},      // MAXIMUM
    {56, 2, 2, 1, 40, 0, 0},     // ARG_MAX
    {57, 2, 2, 1, 0, 0, 0},      // MINIMUM
    {60, 3, 3, 1, 0, 0, 0},      // PADV2
    {67, 3, 4, 1, 49, 0, 0},     // TRANSPOSE_CONV
    {70, 2, 2, 1, 0, 0, 0},      // EXPAND_DIMS
    {74, 2, 2, 1, 27, 0, 0},     // SUM
    {77, 1, 1, 1, 0, 0, 0},      // SHAPE
    {83, 1, 16, 1, 59, 0, 0},    // PACK
    {97, 2, 2, 1, 74, 4, 0},     // RESIZE_NEAREST_NEIGHBOR
    {98, 1, 1, 1, 75, 0, 0},     // LEAKY_RELU
    {114, 1, 1, 1, 0, 0, 0},     // QUANTIZE
    {117, 1, 1, 1, 0, 0, 0},     // HARD_SWISH
};

// Bytes per element of the tensor types that the kernels take, 0 for the others.
size_t element_size(uint8_t type) {
  switch (type) {
    case 0:  // FLOAT32
    case 2:  // INT32
      return 4;
    case 3:  // UINT8
    case 6:  // BOOL
    case 9:  // INT8
      return 1;
    case 4:  // INT64
      return 8;
    case 7:  // INT16
      return 2;
    default:
      return 0;
  }
}

Status invalid(const char* text) { return {Code::kInvalidModel, text}; }

class Validator {
 public:
  Validator(Span model, Span operators) : file_(model), operators_(operators) {}

  Status run(Span model, ModelShape* shape) {
    if (model.size < 8 || memcmp(model.data + 4, "TFL3", 4) != 0) return invalid("not a TFL3 file");
    Table root(&file_, file_.scalar(0, 4));
    if (root.u(0, 4) != kSchemaVersion) return invalid("schema version");
    codes_ = root.vector(1, 4);
    buffers_ = root.vector(4, 4);
    const Vector subgraphs = root.vector(2, 4);
    if (!file_.ok()) return invalid("root table");
    if (subgraphs.size() != 1) return invalid("one subgraph expected");

    Status status = operator_codes();
    if (status.ok()) status = buffers();
    if (status.ok()) status = metadata(root.vector(6, 4));
    if (!status.ok()) return status;

    Table graph(&file_, subgraphs.table_at(0));
    tensors_ = graph.vector(0, 4);
    const Vector inputs = graph.vector(1, 4);
    const Vector outputs = graph.vector(2, 4);
    const Vector operators = graph.vector(3, 4);
    if (!file_.ok()) return invalid("subgraph");
    status = tensors();
    if (status.ok()) status = graph_io(inputs, &shape->input_bytes, true);
    if (status.ok()) status = graph_operators(operators);
    if (status.ok()) status = graph_io(outputs, &shape->output_bytes, false);
    return status;
  }

 private:
  Status operator_codes() {
    if (codes_.size() == 0 || codes_.size() > kMaxOperatorCodes) return invalid("number of operator codes");
    for (uint32_t i = 0; i < codes_.size(); ++i) {
      Table code(&file_, codes_.table_at(i));
      const uint32_t deprecated = code.u(0, 1);
      const uint32_t builtin = code.u(3, 4);
      const bool custom = code.has(1);
      if (!file_.ok()) return invalid("operator code table");
      const uint32_t value = builtin > deprecated ? builtin : deprecated;
      if (custom) return {Code::kOperator, "custom operator"};
      if (!allowed(value)) return {Code::kOperator, "operator that the engine lacks"};
      code_of_[i] = arity_index(value);
    }
    return {};
  }

  bool allowed(uint32_t code) const {
    if (arity_index(code) == kAny) return false;
    return code < 128 && operators_.size > 0 &&
           memchr(operators_.data, static_cast<int>(code), operators_.size) != nullptr;
  }

  static uint8_t arity_index(uint32_t code) {
    for (uint8_t i = 0; i < sizeof kArity / sizeof kArity[0]; ++i) {
      if (kArity[i].code == code) return i;
    }
    return kAny;
  }

  Status buffers() {
    if (buffers_.size() == 0 || buffers_.size() > kMaxBuffers) return invalid("number of buffers");
    for (uint32_t i = 0; i < buffers_.size(); ++i) {
      const Vector data = buffer_data(i);
      if (!file_.ok()) return invalid("buffer outside the file");
      if (i == 0 && data.size() != 0) return invalid("buffer 0 is not empty");
    }
    return {};
  }

  Status metadata(const Vector& entries) {
    if (!file_.ok() || entries.size() > kMaxBuffers) return invalid("metadata");
    for (uint32_t i = 0; i < entries.size(); ++i) {
      Table entry(&file_, entries.table_at(i));
      const Vector name = entry.vector(0, 1);
      // A text ends with a zero that its length does not count.
      const bool ends = file_.inside(name.position(), name.size(), 1) &&
                        file_.scalar(name.position() + name.size(), 1) == 0 && name.position() != 0;
      if (!file_.ok() || !ends) return invalid("metadata");
      const size_t length = sizeof kOfflinePlan - 1;
      if (name.size() >= length && memcmp(file_.at(name.position()), kOfflinePlan, length) == 0) {
        return invalid("offline memory plan");
      }
    }
    return {};
  }

  Vector buffer_data(uint32_t index) {
    Table buffer(&file_, buffers_.table_at(index));
    // Data behind the FlatBuffer (`offset`, `size`) is for files over 2 GB. 1 is how converters write "not
    // used".
    if (buffer.u64(1) > 1 || buffer.u64(2) > 1) file_.fail();
    return buffer.vector(0, 1);
  }

  Status tensors() {
    if (tensors_.size() == 0 || tensors_.size() > kMaxTensors) return invalid("number of tensors");
    for (uint32_t i = 0; i < tensors_.size(); ++i) {
      Table tensor(&file_, tensors_.table_at(i));
      const Vector shape = tensor.vector(0, 4);
      const uint32_t size = tensor_bytes(i);
      const uint32_t buffer = tensor.u(2, 4);
      const bool variable = tensor.u(5, 1) != 0;
      if (!file_.ok()) return invalid("tensor table");
      if (size == 0) return invalid("tensor type or shape");
      if (buffer >= buffers_.size()) return invalid("buffer index");
      if (tensor.has(6) || tensor.has(9)) return invalid("sparse or variant tensor");
      const Vector data = buffer_data(buffer);
      if (data.size() != 0) {
        if (data.size() != size) return invalid("buffer and tensor differ in size");
        if (variable) return invalid("variable tensor with data");
        if (data.position() % 4 != 0) return invalid("buffer is not aligned");
      }
      if (data.size() != 0 || variable) made(i);
      if (!quantization(tensor, shape)) return invalid("quantization parameters");
    }
    return {};
  }

  // 0 if the type or a dimension is not one that can be computed with.
  uint32_t tensor_bytes(uint32_t index) {
    Table tensor(&file_, tensors_.table_at(index));
    const Vector shape = tensor.vector(0, 4);
    uint64_t size = element_size(static_cast<uint8_t>(tensor.u(1, 1)));
    if (shape.size() > kMaxRank) return 0;
    for (uint32_t d = 0; d < shape.size(); ++d) {
      const int32_t dimension = shape.i32(d);
      if (dimension < 1) return 0;
      size *= static_cast<uint32_t>(dimension);
      if (size > INT32_MAX) return 0;  // below 2^31 before, times less than 2^31: no overflow in 64 bits
    }
    return static_cast<uint32_t>(size);
  }

  bool quantization(Table& tensor, const Vector& shape) {
    const uint32_t at = tensor.target(4);
    if (at == 0) return file_.ok();
    Table table(&file_, at);
    const Vector scale = table.vector(2, 4);
    const Vector zero_point = table.vector(3, 8);
    const uint32_t axis = table.u(6, 4);
    if (!file_.ok() || table.u(4, 1) != 0) return false;
    if (scale.size() == 0) return zero_point.size() == 0;
    if (zero_point.size() != scale.size() || scale.size() > kMaxChannels) return false;
    for (uint32_t i = 0; i < scale.size(); ++i) {
      // Bits of a float: neither negative nor infinite nor a NaN. Zero is written for a channel whose weights
      // are all zero.
      const uint32_t bits = scale.u(i);
      if (bits >= kInfinity && bits != kMinusZero) return false;
    }
    if (scale.size() == 1) return true;
    return axis < shape.size() && scale.size() == static_cast<uint32_t>(shape.i32(axis));
  }

  Status graph_io(const Vector& list, uint32_t* total, bool is_input) {
    if (list.size() == 0 || list.size() > kMaxModelIo) return invalid("number of inputs or outputs");
    uint64_t sum = 0;
    for (uint32_t i = 0; i < list.size(); ++i) {
      const uint32_t index = list.u(i);
      if (index >= tensors_.size()) return invalid("input or output index");
      if (is_input && is_made(index)) return invalid("input that is constant or named twice");
      if (!is_input && !is_made(index)) return invalid("output that nothing makes");
      if (is_input) made(index);
      sum += tensor_bytes(index);
    }
    if (sum > kMaxMessage - (is_input ? kModelTag + 4 : kResultHead))
      return invalid("inputs or outputs over max_message");
    *total = static_cast<uint32_t>(sum);
    return {};
  }

  Status graph_operators(const Vector& operators) {
    if (operators.size() == 0 || operators.size() > kMaxOperators) return invalid("number of operators");
    for (uint32_t i = 0; i < operators.size(); ++i) {
      Table op(&file_, operators.table_at(i));
      const uint32_t code = op.u(0, 4);
      const Vector inputs = op.vector(1, 4);
      const Vector outputs = op.vector(2, 4);
      const Vector intermediates = op.vector(8, 4);
      if (!file_.ok()) return invalid("operator table");
      if (code >= codes_.size()) return invalid("operator code index");
      const Arity& arity = kArity[code_of_[code]];
      if (inputs.size() < arity.min_inputs || inputs.size() > arity.max_inputs)
        return invalid("operator inputs");
      if (arity.outputs == kAny ? outputs.size() < 1 || outputs.size() > kMaxModelIo
                                : outputs.size() != arity.outputs) {
        return invalid("operator outputs");
      }
      if (intermediates.size() != 0) return invalid("operator with intermediates");
      if (op.has(9) || op.has(10) || op.has(12)) return invalid("large or second options");
      if (!options(op, arity, inputs.u(0))) return invalid("operator options");

      for (uint32_t k = 0; k < inputs.size(); ++k) {
        // -1 is an optional tensor that is absent: only behind those that the kernel always reads.
        if (inputs.i32(k) == -1 && k >= arity.min_inputs) continue;
        const uint32_t tensor = inputs.u(k);
        if (tensor >= tensors_.size()) return invalid("operator input index");
        if (!is_made(tensor)) return invalid("operator reads what nothing made");
      }
      for (uint32_t k = 0; k < outputs.size(); ++k) {
        const uint32_t tensor = outputs.u(k);
        if (tensor >= tensors_.size()) return invalid("operator output index");
        if (is_made(tensor)) return invalid("tensor is written twice");
        made(tensor);
      }
      if (!has_rank(inputs.u(0), arity.rank) || !has_rank(outputs.u(0), arity.rank) ||
          !has_rank(inputs.u(1), arity.filter_rank)) {
        return invalid("rank of an operator's tensor");
      }
    }
    return {};
  }

  bool has_rank(uint32_t tensor, uint32_t rank) {
    return rank == 0 || Table(&file_, tensors_.table_at(tensor)).vector(0, 4).size() == rank;
  }

  // Options are scalars, except for RESHAPE and SQUEEZE, whose field 0 is a list of integers.
  bool options(Table& op, const Arity& arity, uint32_t input) {
    const uint32_t kind = op.u(3, 1);
    const uint32_t at = op.target(4);
    if (arity.options != 0 && (at == 0 || kind != arity.options)) return false;
    if (at == 0) return file_.ok();
    Table table(&file_, at);
    // An option may be read as a scalar of up to 8 bytes that begins at the table's last byte.
    file_.inside(table.end(), 1, 7);
    if (kind == kReshapeOptions || kind == kSqueezeOptions) {
      return table.vector(0, 4).size() <= kMaxRank && file_.ok();
    }
    if (arity.options == kSoftmaxOptions && !is_beta(table.u(0, 4), input)) return false;
    // Fields 1 and 2 are strides, 3 and 4 the sides of a pool's window: engines divide by them.
    unsigned last = 0;
    if (kind == kConvOptions || kind == kDepthwiseOptions || kind == kTransposeConvOptions) last = 2;
    if (kind == kPoolOptions) last = 4;
    for (unsigned field = 1; field <= last; ++field) {
      const uint32_t value = table.u(field, 4);
      if (value < 1 || value > kMaxStride) return false;
    }
    return file_.ok();
  }

  // The factor of SOFTMAX: quantized, engines take it as a number of at least 2^-26 of the input's scale.
  bool is_beta(uint32_t bits, uint32_t input) {
    if (bits == 0 || bits >= kInfinity || input >= tensors_.size()) return false;
    Table tensor(&file_, tensors_.table_at(input));
    const uint32_t quantization = tensor.target(4);
    if (quantization == 0) return true;
    const Vector scale = Table(&file_, quantization).vector(2, 4);
    return scale.size() == 0 || as_float(bits) * as_float(scale.u(0)) > kLeastSoftmaxScale;
  }

  static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  void made(uint32_t tensor) { made_[tensor / 8] |= static_cast<uint8_t>(1u << (tensor % 8)); }
  bool is_made(uint32_t tensor) const { return (made_[tensor / 8] >> (tensor % 8) & 1) != 0; }

  Buffer file_;
  Span operators_;
  Vector codes_;
  Vector buffers_;
  Vector tensors_;
  uint8_t code_of_[kMaxOperatorCodes] = {};  // operator code -> its place in kArity
  uint8_t made_[kMaxTensors / 8] = {};       // tensors that have a value so far
};

}  // namespace

Status validate_model(Span model, Span operators, ModelShape* shape) {
  return Validator(model, operators).run(model, shape);
}

size_t known_operators(uint8_t* out, size_t capacity) {
  size_t count = 0;
  for (const Arity& arity : kArity) {
    if (count < capacity) out[count++] = arity.code;
  }
  return count;
}

}  // namespace edge
