// Blocks of rows are centred and packed, then the panels of one triangle are multiplied, block after block.
#include "common/torch_headers.h"

#include <utility>

#include "common/cpu_capability.h"
#include "moments/product_sums.h"

namespace planmill {
namespace {

constexpr int64_t kBlocks = 4;      // that a thread packs before they are multiplied
constexpr int64_t kRun = 16;        // blocks summed in float32 before the sum goes on in double
constexpr int64_t kWork = 1 << 17;  // multiplications, or numbers written, that are worth a second thread

}  // namespace

const CovarianceKernels& covariance_kernels() {
  return choose_kernels(covariance_baseline(), covariance_avx2(), covariance_avx512());
}

ProductSums::ProductSums(const CovarianceKernels& kernels, int64_t d, int64_t rows, bool higher)
    : kernels_(kernels),
      higher_(higher),
      d_(d),
      panel_(kernels.panel),
      panels_((d + panel_ - 1) / panel_),
      padded_(panels_ * panel_),
      group_(std::min((rows + kCovarianceRows - 1) / kCovarianceRows,
                      kBlocks * (at::in_parallel_region() ? 1 : at::get_num_threads()))),
      packed_(static_cast<size_t>(group_ * panels_ * kernels.stride())),
      sums_(static_cast<size_t>(higher ? group_ * sums_size() : 0)),
      products_(static_cast<size_t>(pairs() * panel_ * panel_)),
      first_(static_cast<size_t>(padded_)),
      third_(static_cast<size_t>(padded_)),
      second_(products_.size()) {}

void ProductSums::add(const float* x, const float* const* pivots, int64_t rows) {
  const int64_t blocks = (rows + kCovarianceRows - 1) / kCovarianceRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels_.pack(x + b * kCovarianceRows * d_, pivots + b * kCovarianceRows, rows_of(b, rows), d_, block(b), sums(b));
  });
  for (int64_t b = 0; higher_ && b < blocks; ++b) {
    for (int64_t c = 0; c < padded_; ++c) first_[c] += sums(b)[c], third_[c] += sums(b)[padded_ + c];
    fourth_ += sums(b)[2 * padded_];
  }
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, rows * panel_ * panel_));
  at::parallel_for(0, pairs(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < blocks; ++b) {
      multiply(begin, end, block(b), rows_of(b, rows));
      if ((blocks_ + b + 1) % kRun == 0) flush(begin, end);
    }
  });
  blocks_ += blocks;
}

// Pairs of panels [begin, end) of the triangle, counted column by column: a block's panels are read from the second-level
// cache, and those of a column from the first.
void ProductSums::multiply(int64_t begin, int64_t end, const float* packed, int64_t rows) {
  const int64_t size = panel_ * panel_, stride = kernels_.stride();
  int64_t j = 0;
  while ((j + 1) * (j + 2) / 2 <= begin) ++j;
  int64_t i = begin - j * (j + 1) / 2;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t columns = std::min(panel_, d_ - j * panel_);
    kernels_.multiply(packed + i * stride, packed + j * stride, rows, columns, products_.data() + pair * size);
    if (++i > j) i = 0, ++j;
  }
}

void ProductSums::flush(int64_t begin, int64_t end) {
  const int64_t size = panel_ * panel_;
  float* products = products_.data();
  for (int64_t e = begin * size; e < end * size; ++e) second_[e] += products[e], products[e] = 0.0f;
}

void ProductSums::finish(const double* off, double count, float* scatter, double* along) {
  at::parallel_for(0, pairs(), kWork / (panel_ * panel_), [&](int64_t begin, int64_t end) { flush(begin, end); });
  at::parallel_for(0, panels_, std::max<int64_t>(1, kWork / (panel_ * padded_)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < panels_; ++j) write_tile(i, j, off, count, scatter, along);
  });
}

double ProductSums::trace() const {
  double sum = 0.0;
  for (int64_t c = 0; c < d_; ++c) {
    const int64_t i = c / panel_, tile = (i * (i + 1) / 2 + i) * panel_ * panel_;
    sum += second_[static_cast<size_t>(tile + c % panel_ * (panel_ + 1))];
  }
  return sum;
}

// Rows of panel i, columns of panel j; below the diagonal from the tile above it.
void ProductSums::write_tile(int64_t i, int64_t j, const double* off, double count, float* scatter, double* along) const {
  const double* tile = second_.data() + (i <= j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j) * panel_ * panel_;
  const int64_t rows = std::min(panel_, d_ - i * panel_), columns = std::min(panel_, d_ - j * panel_);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = i * panel_ + r;
    float* out = scatter + row * d_ + j * panel_;
    for (int64_t c = 0; c < columns; ++c) {
      const bool above = i < j || (i == j && r <= c);
      const double sum = above ? tile[r * panel_ + c] : tile[c * panel_ + r];
      const int64_t column = j * panel_ + c;
      out[c] = static_cast<float>(sum - count * (off[row] * off[column]));
      along[row] += sum * off[column];
    }
  }
}

}  // namespace planmill
