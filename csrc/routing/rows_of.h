// The RowKernels of the instruction set in use.
#pragma once

#include "routing/rows.h"

namespace planmill {

const RowKernels& row_kernels();

}  // namespace planmill
