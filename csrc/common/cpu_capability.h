// Instruction sets, detected once; kernels ask `cpu_capability()` which of their variants to enter.
#pragma once

namespace planmill {

// Order matters: each level contains the ones before it.
enum class CpuCapability : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The highest level that this processor and this operating system allow.
CpuCapability cpu_capability_limit();

// The level in use: the limit, unless `set_cpu_capability` holds it lower.
CpuCapability cpu_capability();
void set_cpu_capability(CpuCapability level);

// Why `level` cannot be used; "" when it can.
const char* cpu_capability_reason(CpuCapability level);

}  // namespace planmill
