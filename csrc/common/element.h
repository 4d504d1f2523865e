// What a tensor of numbers holds, for kernels that know no torch.
#pragma once

#include <cstdint>

namespace planmill {

enum class Element : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

inline int64_t bytes_of(Element type) { return type == Element::kFloat ? 4 : 2; }

}  // namespace planmill
