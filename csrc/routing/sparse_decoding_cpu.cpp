// sparse_decoding on the CPU: k rows of the dictionary summed per token, four at a time, while the next four are fetched.
#include "common/torch_headers.h"

#include "common/cpu_capability.h"
#include "routing/decoding.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 1 << 15;  // multiply-adds below which a second thread is not worth waking

const DecodingKernels& decoding_kernels() {
  return choose_kernels(decoding_baseline(), decoding_avx2(), decoding_avx512());
}

// A contiguous matrix and its rows as they lie.
struct Matrix {
  const char* data;
  at::ScalarType type;
  int64_t row_bytes;
  explicit Matrix(const at::Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())), type(x.scalar_type()), row_bytes(x.size(-1) * x.element_size()) {}
  const void* row(int64_t i) const { return data + i * row_bytes; }
};

const float* widen(const DecodingKernels& kernels, at::ScalarType type, const void* row, int64_t d, float* scratch) {
  if (type == at::kFloat) return static_cast<const float*>(row);
  (type == at::kBFloat16 ? kernels.widen_bfloat16 : kernels.widen_float16)(static_cast<const uint16_t*>(row), d, scratch);
  return scratch;
}

void store(const float* row, int64_t d, at::ScalarType type, void* out) {
  if (type == at::kBFloat16) std::copy(row, row + d, static_cast<at::BFloat16*>(out));
  else if (type == at::kHalf) std::copy(row, row + d, static_cast<at::Half*>(out));
}

struct Decoder {
  const DecodingKernels& kernels;
  const float* values;
  const int32_t* indices;
  Matrix dictionary;
  const float* bias;  // may be null
  int64_t k, d;

  // Row t of the result, in float32.
  void decode(int64_t t, float* sum, std::vector<float>& scale, std::vector<const void*>& found, float* scratch) const {
    if (bias != nullptr) std::copy(bias, bias + d, sum);
    else std::fill(sum, sum + d, 0.0f);
    int64_t count = 0;
    for (int64_t j = t * k; j < (t + 1) * k; ++j)
      if (indices[j] >= 0) scale[count] = values[j], found[count++] = dictionary.row(indices[j]);
    std::fill(found.begin() + count, found.begin() + count + 8, nullptr);  // nothing is fetched past the last row
    const float* rows[4];
    for (int64_t j = 0; j < count; j += 4) {
      const int64_t some = std::min<int64_t>(4, count - j);
      for (int64_t r = 0; r < some; ++r) rows[r] = widen(kernels, dictionary.type, found[j + r], d, scratch + r * d);
      kernels.add_rows(sum, rows, scale.data() + j, some, d, found.data() + j + 4, dictionary.row_bytes);
    }
  }
};

at::Tensor sparse_decoding(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& dictionary,
                           const at::Tensor& bias) {
  const at::Tensor v = values.to(at::kFloat).contiguous(), index = indices.contiguous(), rows = dictionary.contiguous();
  const at::Tensor b = bias.to(at::kFloat).contiguous();
  const int64_t tokens = v.size(0), k = v.size(1), m = rows.size(0), d = rows.size(1);
  at::Tensor out = at::empty({tokens, d}, rows.options());
  const int32_t* chosen = index.const_data_ptr<int32_t>();
  for (int64_t j = 0; j < tokens * k; ++j)
    TORCH_CHECK_VALUE(chosen[j] >= -1 && chosen[j] < m, "sparse_decoding: indices must be -1 or below M = ", m, ", got ",
                      chosen[j]);
  if (out.numel() == 0) return out;
  const Decoder decoder{decoding_kernels(), v.const_data_ptr<float>(), chosen, Matrix(rows),
                        b.numel() > 0 ? b.const_data_ptr<float>() : nullptr, k, d};
  auto* target = static_cast<char*>(out.data_ptr());
  const bool direct = out.scalar_type() == at::kFloat;
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / ((k + 1) * d)), [&](int64_t begin, int64_t end) {
    std::vector<float> scale(static_cast<size_t>(k)), scratch(direct ? 0 : static_cast<size_t>(5 * d));
    std::vector<const void*> found(static_cast<size_t>(k + 8));
    for (int64_t t = begin; t < end; ++t) {
      char* row = target + t * decoder.dictionary.row_bytes;
      float* sum = direct ? reinterpret_cast<float*>(row) : scratch.data() + 4 * d;
      decoder.decode(t, sum, scale, found, scratch.data());
      if (!direct) store(sum, d, out.scalar_type(), row);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("sparse_decoding", &sparse_decoding); }

}  // namespace
}  // namespace planmill
