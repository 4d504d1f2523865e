#include "common/cpu_capability.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace planmill {
namespace {

struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Cpuid(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux hands out the AMX tile registers on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tile_registers_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

struct Detected {
  CpuCapability limit = CpuCapability::kBaseline;
  const char* why_not_next = "";
};

Detected detect() {
#ifdef PLANMILL_EMULATE  // a test build: AVX-512 and AMX run over plain C++ (common/vec.h, common/amx_emulation.h)
  return {CpuCapability::kAmx, ""};
#endif
  const Cpuid one(1, 0), seven(7, 0);
  if (!bit(one.c, 27)) return {CpuCapability::kBaseline, "the operating system does not enable AVX state (OSXSAVE)"};
  const uint64_t state = enabled_state();
  const bool avx2 = bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5) && (state & 0x6) == 0x6;  // FMA, F16C, AVX2
  if (!avx2) return {CpuCapability::kBaseline, "the processor has no AVX2 with FMA and F16C"};
  // F, DQ, BW, VL and VNNI, and the operating system saves opmask and upper ZMM state.
  const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) &&
                      bit(seven.c, 11) && (state & 0xe6) == 0xe6;
  if (!avx512) return {CpuCapability::kAvx2, "the processor has no AVX-512 with BW, VL and VNNI"};
  if (!(bit(seven.d, 22) && bit(seven.d, 24))) return {CpuCapability::kAvx512, "the processor has no AMX-bf16"};
  if ((state & 0x60000) != 0x60000 || !tile_registers_granted())
    return {CpuCapability::kAvx512, "the operating system does not grant this process the AMX tile registers"};
  return {CpuCapability::kAmx, ""};
}

const Detected& detected() {
  static const Detected found = detect();
  return found;
}

std::atomic<int>& level_in_use() {
  static std::atomic<int> level{static_cast<int>(detected().limit)};
  return level;
}

}  // namespace

CpuCapability cpu_capability_limit() { return detected().limit; }

CpuCapability cpu_capability() { return static_cast<CpuCapability>(level_in_use().load(std::memory_order_relaxed)); }

void set_cpu_capability(CpuCapability level) {
  level_in_use() = std::min(static_cast<int>(level), static_cast<int>(cpu_capability_limit()));
}

const char* cpu_capability_reason(CpuCapability level) {
  if (level > cpu_capability_limit()) return detected().why_not_next;
  if (level > cpu_capability()) return "held back with cpu_capability()";
  return "";
}

}  // namespace planmill
