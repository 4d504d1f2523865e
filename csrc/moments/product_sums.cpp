// Blocks of rows are centred and packed, then the panels of one triangle are multiplied, block after block.
#include "moments/product_sums.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

#include "common/cpu_capability.h"

namespace planmill {
namespace {

constexpr int64_t kBlocks = 4;  // blocks summed in float32 before the sum goes on in double

}  // namespace

const CovarianceKernels& covariance_kernels() {
  return choose_kernels(covariance_baseline(), covariance_avx2(), covariance_avx512());
}

ProductSums::ProductSums(const CovarianceKernels& kernels, int64_t d)
    : kernels_(kernels),
      d_(d),
      panel_(kernels.panel),
      panels_((d + panel_ - 1) / panel_),
      padded_(panels_ * panel_),
      group_(kBlocks * (at::in_parallel_region() ? 1 : at::get_num_threads())),
      packed_(static_cast<size_t>(group_ * panels_ * kernels.stride())),
      sums_(static_cast<size_t>(group_ * sums_size())),
      first_(static_cast<size_t>(padded_)),
      third_(static_cast<size_t>(padded_)),
      second_(static_cast<size_t>(panels_ * (panels_ + 1) / 2 * panel_ * panel_)) {}

void ProductSums::add(const float* x, const float* const* pivots, int64_t rows) {
  const int64_t blocks = (rows + kCovarianceRows - 1) / kCovarianceRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels_.pack(x + b * kCovarianceRows * d_, pivots + b * kCovarianceRows, rows_of(b, rows), d_, block(b), sums(b));
  });
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < padded_; ++c) first_[c] += sums(b)[c], third_[c] += sums(b)[padded_ + c];
    fourth_ += sums(b)[2 * padded_];
  }
  at::parallel_for(0, panels_ * (panels_ + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products(static_cast<size_t>((end - begin) * panel_ * panel_));
    for (int64_t group = 0; group < blocks; group += kBlocks)
      multiply(begin, end, group, std::min(group + kBlocks, blocks), rows, products);
  });
}

double ProductSums::product(int64_t row, int64_t column) const {
  if (row > column) std::swap(row, column);
  const int64_t i = row / panel_, j = column / panel_;
  return second_[static_cast<size_t>(((j * (j + 1) / 2 + i) * panel_ + row % panel_) * panel_ + column % panel_)];
}

// Pairs of panels [begin, end) of the triangle, counted column by column; blocks [first, last). Block after block, so
// that its panels are read from the second-level cache, and those of a column from the first.
void ProductSums::multiply(int64_t begin, int64_t end, int64_t first, int64_t last, int64_t rows,
                           std::vector<float>& products) {
  const int64_t size = panel_ * panel_, stride = kernels_.stride();
  std::fill(products.begin(), products.end(), 0.0f);
  int64_t column = 0;
  while ((column + 1) * (column + 2) / 2 <= begin) ++column;
  for (int64_t b = first; b < last; ++b) {
    const float* packed = block(b);
    int64_t j = column, i = begin - j * (j + 1) / 2;
    for (int64_t pair = begin; pair < end; ++pair) {
      kernels_.multiply(packed + i * stride, packed + j * stride, rows_of(b, rows), &products[(pair - begin) * size]);
      if (++i > j) i = 0, ++j;
    }
  }
  double* target = second_.data() + begin * size;
  for (size_t e = 0; e < products.size(); ++e) target[e] += products[e];
}

}  // namespace planmill
