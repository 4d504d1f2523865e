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

// The variant of some kernels for the level in use. Kernels that tile registers do not help have no variant for AMX.
template <class Kernels>
const Kernels& choose_kernels(const Kernels* baseline, const Kernels* avx2, const Kernels* avx512,
                              const Kernels* amx = nullptr) {
  const CpuCapability level = cpu_capability();
  if (level == CpuCapability::kAmx && amx != nullptr) return *amx;
  if (level >= CpuCapability::kAvx512) return *avx512;
  return level == CpuCapability::kAvx2 ? *avx2 : *baseline;
}

}  // namespace planmill
