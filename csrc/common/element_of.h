// The element type of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/element.h"

namespace planmill {

inline Element element_of(const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return type == at::kFloat ? Element::kFloat : type == at::kBFloat16 ? Element::kBFloat16 : Element::kHalf;
}

}  // namespace planmill
