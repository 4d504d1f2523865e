// cluster_attention on the CPU: the clusters of some heads, each with its rows gathered into scratch, and then for every
// token the mean of its rows. Sums run in the order of the clusters: results do not depend on the number of threads.
#include "common/torch_headers.h"

#include "attention/clusters_of.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 1 << 16;        // multiply-adds that are worth a thread
constexpr int64_t kBuffered = 1 << 19;     // floats of cluster results that are held before they are combined
constexpr int64_t kTokensOfATask = 64;

void check_range(const char* name, const at::Tensor& members, int64_t tokens) {
  const int32_t* p = members.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < members.numel(); ++i)
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < tokens, "cluster_attention: ", name, " must be from 0 to ", tokens - 1, ", got ",
                      p[i]);
}

// Causal and shared kernels find keys by their order.
at::Tensor ascending(const at::Tensor& members) {
  const int64_t window = members.size(3), rows = window == 0 ? 0 : members.numel() / window;
  const int32_t* p = members.const_data_ptr<int32_t>();
  bool sorted = true;
  for (int64_t r = 0; r < rows && sorted; ++r) sorted = std::is_sorted(p + r * window, p + (r + 1) * window);
  if (sorted) return members;
  at::Tensor copy = members.clone();
  int32_t* q = copy.data_ptr<int32_t>();
  for (int64_t r = 0; r < rows; ++r) std::sort(q + r * window, q + (r + 1) * window);
  return copy;
}

// Where the results of each token stand: slots[starts[n]] to slots[starts[n + 1]], ascending.
struct Slots {
  std::vector<int32_t> starts, slots;
  void find(const int32_t* members, int64_t count, int64_t tokens) {
    starts.assign(static_cast<size_t>(tokens + 2), 0);
    slots.resize(static_cast<size_t>(count));
    for (int64_t s = 0; s < count; ++s) ++starts[static_cast<size_t>(members[s]) + 2];
    for (int64_t n = 0; n < tokens; ++n) starts[static_cast<size_t>(n) + 2] += starts[static_cast<size_t>(n) + 1];
    for (int64_t s = 0; s < count; ++s) {
      const int32_t slot = starts[static_cast<size_t>(members[s]) + 1]++;
      slots[static_cast<size_t>(slot)] = static_cast<int32_t>(s);
    }
  }
};

struct Attention {
  at::Tensor q, k, v, q_members, k_members, memory_k, memory_v, q_mask, k_mask;
  float scale;
  bool causal, shared;
  int64_t heads = q.size(1), clusters = q_members.size(2), queries = q_members.size(3), keys = k_members.size(3);

  Cluster cluster(int64_t head, int64_t c) const {  // `head` counts over the batch
    const int64_t b = head / heads, h = head % heads, at = head * clusters + c, memory = memory_k.size(2);
    const auto mask = [&](const at::Tensor& m) {
      return m.numel() == 0 ? nullptr : reinterpret_cast<const uint8_t*>(m.const_data_ptr<bool>()) + b * m.size(1);
    };
    return {rows_of_head(q, b, h), rows_of_head(k, b, h), rows_of_head(v, b, h),
            q_members.const_data_ptr<int32_t>() + at * queries, k_members.const_data_ptr<int32_t>() + at * keys,
            queries, keys, memory,
            memory_k.const_data_ptr<float>() + (h * clusters + c) * memory * q.size(3),
            memory_v.const_data_ptr<float>() + (h * clusters + c) * memory * v.size(3),
            mask(q_mask), mask(k_mask), scale, causal, shared};
  }
};

// Heads [first, first + count): results of their clusters into `rows` [count, C w, padded], then the means into out.
void attend_heads(const ClusterKernels& kernels, const Attention& a, int64_t first, int64_t count, std::vector<Slots>& slots,
                  float* rows, int64_t padded, const at::Tensor& out) {
  const int64_t tokens = a.q.size(2), width = a.v.size(3), per_head = a.clusters * a.queries;
  const int64_t work = a.queries * (a.keys + a.memory_k.size(2)) * (a.q.size(3) + width) + 1;
  at::parallel_for(0, count * a.clusters, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kernels.attend_scratch(a.cluster(first, 0))));
    for (int64_t i = begin; i < end; ++i)
      kernels.attend(a.cluster(first + i / a.clusters, i % a.clusters), scratch.data(), rows + i * a.queries * padded);
  });
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      slots[static_cast<size_t>(i)].find(a.q_members.const_data_ptr<int32_t>() + (first + i) * per_head, per_head, tokens);
  });
  auto* results = static_cast<char*>(out.data_ptr());
  const int64_t blocks = (tokens + kTokensOfATask - 1) / kTokensOfATask;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kTokensOfATask * padded));
  at::parallel_for(0, count * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<const float*> chosen(static_cast<size_t>(a.clusters));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, from = i % blocks * kTokensOfATask;
      const Slots& of = slots[static_cast<size_t>(head)];
      for (int64_t n = from; n < std::min(from + kTokensOfATask, tokens); ++n) {
        const int32_t start = of.starts[static_cast<size_t>(n)], found = of.starts[static_cast<size_t>(n) + 1] - start;
        chosen.resize(std::max(chosen.size(), static_cast<size_t>(found)));
        const auto ahead = static_cast<size_t>(start + found) + 8;  // rows of the next tokens lie anywhere
        if (ahead < of.slots.size())
          for (int64_t d = 0; d < padded; d += 16)
            __builtin_prefetch(rows + (head * per_head + of.slots[ahead]) * padded + d);
        for (int32_t s = 0; s < found; ++s)
          chosen[static_cast<size_t>(s)] = rows + (head * per_head + of.slots[static_cast<size_t>(start + s)]) * padded;
        kernels.combine(chosen.data(), found, width, element_of(out),
                        results + ((first + head) * tokens + n) * width * static_cast<int64_t>(out.element_size()));
      }
    }
  });
}

at::Tensor cluster_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_members,
                             const at::Tensor& k_members, const at::Tensor& memory_k, const at::Tensor& memory_v,
                             const at::Tensor& q_mask, const at::Tensor& k_mask, double scale, bool causal, bool shared_qk) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  if (out.numel() == 0) return out;
  const at::Tensor of_queries = q_members.contiguous(), of_keys = shared_qk ? of_queries : k_members.contiguous();
  check_range("q_members", of_queries, q.size(2));
  check_range("k_members", of_keys, k.size(2));
  const at::Tensor keys = causal || shared_qk ? ascending(of_keys) : of_keys;
  const Attention a{with_whole_rows(q), with_whole_rows(k), with_whole_rows(v), shared_qk ? keys : of_queries, keys,
                    memory_k.contiguous(), memory_v.contiguous(), q_mask.contiguous(), k_mask.contiguous(),
                    static_cast<float>(scale), causal, shared_qk};
  TORCH_CHECK_VALUE(a.clusters * a.queries < (int64_t{1} << 31),
                    "cluster_attention: q_members must hold fewer than 2^31 a head, got ", a.clusters * a.queries);
  const ClusterKernels& kernels = cluster_kernels_in_use();
  const int64_t padded = (v.size(3) + kernels.width - 1) / kernels.width * kernels.width;
  const int64_t all = q.size(0) * q.size(1), per_head = a.clusters * a.queries * padded;
  const int64_t enough = a.clusters == 0 ? all : (4 * at::get_num_threads() + a.clusters - 1) / a.clusters;
  const int64_t group = std::min(all, std::max(enough, kBuffered / std::max<int64_t>(per_head, 1)));
  std::vector<Slots> slots(static_cast<size_t>(group));
  const at::Tensor rows = at::empty({group * per_head}, at::kFloat);
  for (int64_t first = 0; first < all; first += group)
    attend_heads(kernels, a, first, std::min(group, all - first), slots, rows.data_ptr<float>(), padded, out);
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("cluster_attention", &cluster_attention); }

}  // namespace
}  // namespace planmill
