// hash_embedding on the CPU: a block of table rows is hashed and asked of the memory before the first of them is read.
#include "common/torch_headers.h"

#include <cstring>

#include "common/element_of.h"
#include "routing/rows_of.h"

namespace planmill {
namespace {

constexpr int64_t kBlock = 64;  // lookups in flight: covers the latency of the memory, and their rows stay in the cache

// The finaliser of SplitMix64 (Stafford's variant 13): a bijection of 64-bit words.
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct Lookup {
  const int64_t* values;    // [B, F, L]
  const int32_t* lengths;   // [B, F], or null: all L
  const float* weights;     // [B, F, L], or null: all one
  const int64_t* seeds;     // [J]
  const int32_t* features;  // [J]
  const char* table;        // [M, d]
  int64_t inputs, most, lookups, rows, width, bytes;
  Element type;
  bool mean;

  // The table row of a mixed value: floor(h * M / 2^64), M < 2^31.
  const char* row(uint64_t mixed, int64_t seed) const {
    const uint64_t h = mix(mixed ^ static_cast<uint64_t>(seed)), m = static_cast<uint64_t>(rows);
    return table + static_cast<int64_t>(((h >> 32) * m + (((h & 0xffffffffu) * m) >> 32)) >> 32) * bytes;
  }
  void fetch(const char* address) const {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(address + line);
  }
  void run(int64_t first, int64_t last, char* out) const;
  void run_single(int64_t first, int64_t last, char* out) const;
};

// Output slots [first, last) of [B, J] where each is the row of one value: nothing to add.
void Lookup::run_single(int64_t first, int64_t last, char* out) const {
  const char* found[kBlock];
  int64_t entry = first / lookups, j = first % lookups, last_input = -1;
  uint64_t mixed = 0;
  for (; first < last; first += kBlock) {
    const int64_t block = std::min(kBlock, last - first);
    for (int64_t s = 0; s < block; ++s) {
      const int64_t input = entry * inputs + features[j];
      if (input != last_input) mixed = mix(static_cast<uint64_t>(values[input])), last_input = input;
      found[s] = row(mixed, seeds[j]);
      fetch(found[s]);
      if (++j == lookups) j = 0, ++entry;
    }
    for (int64_t s = 0; s < block; ++s)
      std::memcpy(out + (first + s) * bytes, found[s], static_cast<size_t>(bytes));
  }
}

// The same where there are several values, or weights.
void Lookup::run(int64_t first, int64_t last, char* out) const {
  const RowKernels& kernels = row_kernels();
  std::vector<const void*> found;
  int64_t begin[kBlock + 1], at[kBlock];  // rows found by each lookup, and where its values begin
  for (; first < last; first += kBlock) {
    const int64_t block = std::min(kBlock, last - first);
    found.clear();
    for (int64_t s = 0; s < block; ++s) {
      const int64_t slot = first + s, j = slot % lookups, input = slot / lookups * inputs + features[j];
      const int64_t count = lengths == nullptr ? most : std::clamp<int64_t>(lengths[input], 0, most);
      begin[s] = static_cast<int64_t>(found.size());
      at[s] = input * most;
      for (int64_t k = 0; k < count; ++k) {
        const char* address = row(mix(static_cast<uint64_t>(values[at[s] + k])), seeds[j]);
        fetch(address);
        found.push_back(address);
      }
    }
    begin[block] = static_cast<int64_t>(found.size());
    for (int64_t s = 0; s < block; ++s) {
      const int64_t count = begin[s + 1] - begin[s];
      const float factor = mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
      kernels.sum(type, found.data() + begin[s], weights == nullptr ? nullptr : weights + at[s], count, width, factor,
                  out + (first + s) * bytes);
    }
  }
}

at::Tensor hash_embedding(const at::Tensor& values, const at::Tensor& lengths, const at::Tensor& weights,
                          const at::Tensor& table, const at::Tensor& seeds, const at::Tensor& features, bool mean) {
  const at::Tensor v = values.contiguous(), n = lengths.contiguous(), w = weights.contiguous(), t = table.contiguous(),
                   s = seeds.contiguous(), f = features.contiguous();
  const int64_t batch = v.size(0), lookups = s.size(0), width = t.size(1);
  at::Tensor out = at::empty({batch, lookups * width}, t.options());
  if (out.numel() == 0) return out;
  const Element type = element_of(t);
  const Lookup lookup{v.const_data_ptr<int64_t>(),
                      n.numel() == 0 ? nullptr : n.const_data_ptr<int32_t>(),
                      w.numel() == 0 ? nullptr : w.const_data_ptr<float>(),
                      s.const_data_ptr<int64_t>(),
                      f.const_data_ptr<int32_t>(),
                      static_cast<const char*>(t.const_data_ptr()),
                      v.size(1),
                      v.size(2),
                      lookups,
                      t.size(0),
                      width,
                      width * bytes_of(type),
                      type,
                      mean};
  auto* target = static_cast<char*>(out.data_ptr());
  const bool single = lookup.most == 1 && lookup.lengths == nullptr && lookup.weights == nullptr;
  at::parallel_for(0, batch * lookups, std::max<int64_t>(kBlock, 32768 / width), [&](int64_t first, int64_t last) {
    if (single) lookup.run_single(first, last, target);
    else lookup.run(first, last, target);
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("hash_embedding", &hash_embedding); }

}  // namespace
}  // namespace planmill
