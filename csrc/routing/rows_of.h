// The RowKernels of the instruction set in use, and the element type of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include "routing/rows.h"

namespace planmill {

const RowKernels& row_kernels();
Element element_of(at::ScalarType type);

}  // namespace planmill
