// Checks one ExpertMixtureKernels against double arithmetic: packing is exact, products are right, streaming has the bits of
// packing, and neither reads what it must not. Built by test_expert_mixture.py, with -DKERNELS=expert_mixture_<isa>.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "routing/expert_mixture.h"

using namespace planmill;

namespace {

int failures = 0;
std::mt19937 source(11);

void expect(bool holds, const char* what, Storage storage, int64_t rows, int64_t k) {
  if (holds) return;
  if (++failures < 20)
    std::printf("%s fails: storage %d, %lld rows, %lld channels\n", what, static_cast<int>(storage),
                static_cast<long long>(rows), static_cast<long long>(k));
}

// Numbers of one storage type, and what they are worth.
struct Numbers {
  Storage storage;
  std::vector<float> value;
  std::vector<uint16_t> narrow;

  Numbers(Storage kind, int64_t n) : storage(kind), value(static_cast<size_t>(n)), narrow(static_cast<size_t>(n)) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < value.size(); ++i) {
      value[i] = normal(source);
      if (kind == Storage::kHalf) {
        // any half, subnormal ones too, but no infinity or NaN: sign, exponent below 31, mantissa
        narrow[i] = static_cast<uint16_t>((source() & 0x83ff) | ((source() % 31) << 10));
        const int exponent = (narrow[i] >> 10) & 31, mantissa = narrow[i] & 0x3ff;
        const float size = exponent ? std::ldexp(1.0f + static_cast<float>(mantissa) / 1024, exponent - 15)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
        value[i] = narrow[i] & 0x8000 ? -size : size;
      } else if (kind == Storage::kBFloat16) {
        uint32_t bits;
        std::memcpy(&bits, &value[i], 4);
        narrow[i] = static_cast<uint16_t>(bits >> 16);
        bits &= 0xffff0000u;
        std::memcpy(&value[i], &bits, 4);
      }
    }
  }
  const void* at(int64_t i) const {
    return storage == Storage::kFloat ? static_cast<const void*>(value.data() + i) : narrow.data() + i;
  }
};

void check_products(const ExpertMixtureKernels& kernels, Storage storage, int64_t rows, int64_t k) {
  const int64_t width = kernels.panel_width, ld = k + 3, ldz = width + 5;
  const Numbers w(storage, width * ld);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * kChannelBlock), NAN), panel(static_cast<size_t>(width * k));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < k; ++c) x[i * kChannelBlock + c] = normal(source);
  for (const int64_t used : {width, width - 3, int64_t{1}}) {
    std::fill(panel.begin(), panel.end(), NAN);
    kernels.pack(w.at(0), storage, ld, used, k, panel.data());
    bool exact = true;
    for (int64_t c = 0; c < k; ++c)
      for (int64_t r = 0; r < width; ++r) exact &= panel[c * width + r] == (r < used ? w.value[r * ld + c] : 0.0f);
    expect(exact, "packing", storage, used, k);
  }
  kernels.pack(w.at(0), storage, ld, width, k, panel.data());
  std::vector<float> once(static_cast<size_t>(rows * ldz), 7.0f), streamed = once;
  const char* next = static_cast<const char*>(w.at(0));
  for (const bool first : {true, false}) {
    kernels.multiply(x.data(), rows, panel.data(), k, once.data(), ldz, first, next, ld, k);
    kernels.stream(w.at(0), storage, ld, k, x.data(), rows, streamed.data(), ldz, first, first ? w.at(0) : nullptr);
  }
  expect(std::memcmp(once.data(), streamed.data(), once.size() * 4) == 0, "streaming", storage, rows, k);
  bool right = true;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < ldz; ++r) {
      double sum = 0.0, size = 0.0;
      for (int64_t c = 0; c < k && r < width; ++c) {
        const double term = static_cast<double>(x[i * kChannelBlock + c]) * w.value[r * ld + c];
        sum += 2 * term, size += std::fabs(2 * term);
      }
      right &= r < width ? std::fabs(once[i * ldz + r] - sum) <= 4e-6 * size : once[i * ldz + r] == 7.0f;
    }
  expect(right, "the product", storage, rows, k);
}

// Tiles against double products of the rounded x; what no tile may touch is watched.
void check_tiles(const ExpertMixtureKernels& kernels, int64_t rows, int64_t columns, int64_t k) {
  const int64_t ld = k + 2, stride = k + 5, ldz = 40, steps = (k + 31) / 32, blocks = (rows + 31) / 32;
  const Numbers w(Storage::kBFloat16, columns * ld), rounded(Storage::kBFloat16, rows * stride);
  std::vector<float> x = rounded.value;
  for (float& value : x) value *= 1.0f + 0x1p-10f;  // less than half of what bfloat16 resolves: rounds back
  std::vector<uint32_t> tiles(static_cast<size_t>(blocks * steps * 512), 0x7fc07fc0u);
  const int64_t split = k > 64 ? 64 : 0;
  if (split) kernels.tiles.arrange(x.data(), stride, rows, split, 0, steps, tiles.data());
  kernels.tiles.arrange(x.data() + split, stride, rows, k - split, split / 32, steps, tiles.data());
  std::vector<float> z(static_cast<size_t>(rows * ldz), 7.0f);
  TileState before;
  kernels.tiles.start(&before);
  for (const bool first : {true, false})
    kernels.tiles.multiply(w.at(0), ld, columns, tiles.data(), rows, k, z.data(), ldz, first,
                           columns == 32 ? static_cast<const char*>(w.at(0)) : nullptr);
  kernels.tiles.stop(&before);
  bool right = true;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < ldz; ++r) {
      double sum = 0.0, size = 1e-30;
      for (int64_t c = 0; c < k && r < columns; ++c) {
        const double term = 2.0 * rounded.value[i * stride + c] * w.value[r * ld + c];
        sum += term, size += std::fabs(term);
      }
      if (r < columns) right &= std::fabs(z[i * ldz + r] - sum) <= 4e-6 * size;
      else if (r >= (columns > 16 ? 32 : 16)) right &= z[i * ldz + r] == 7.0f;
    }
  expect(right, "the product of tiles", Storage::kBFloat16, rows, k);
}

void check_rows(const ExpertMixtureKernels& kernels, Storage storage, int64_t n) {
  const Numbers x(storage, n);
  std::vector<float> out(static_cast<size_t>(n + 1), 7.0f);
  kernels.load_row(x.at(0), storage, n, 0.5f, out.data());
  bool right = out[n] == 7.0f;
  for (int64_t i = 0; i < n; ++i) right &= out[i] == 0.5f * x.value[i];
  kernels.accumulate(x.value.data(), 2.0f, n, out.data());
  for (int64_t i = 0; i < n; ++i) right &= std::fabs(out[i] - 2.5f * x.value[i]) <= 1e-6f * std::fabs(x.value[i]);
  expect(right && out[n] == 7.0f, "loading and adding rows", storage, 1, n);
}

}  // namespace

int main() {
  const ExpertMixtureKernels& kernels = *KERNELS();
  for (const Storage storage : {Storage::kFloat, Storage::kBFloat16, Storage::kHalf}) {
    for (const int64_t k : {1, 3, 4, 8, 15, 37, 192, 256})
      for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 12, 13, 25}) check_products(kernels, storage, rows, k);
    for (int64_t n = 0; n < 70; ++n) check_rows(kernels, storage, n);
  }
  if (kernels.tiles.multiply != nullptr)
    for (const int64_t k : {1, 2, 31, 32, 33, 64, 100, 256})
      for (const int64_t rows : {1, 5, 16, 17, 32, 33, 50})
        for (const int64_t columns : {1, 15, 16, 17, 31, 32}) check_tiles(kernels, rows, columns, k);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
