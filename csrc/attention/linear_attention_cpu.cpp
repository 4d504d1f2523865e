// linear_attention on the CPU: sums of the keys of 1008 tokens each, added in their order; then the queries. So a result
// depends on neither the number of threads nor the batch: whether a head goes to one thread or to several, its sums are
// taken in the same order.
#include "common/torch_headers.h"

#include "attention/linear_attention.h"
#include "common/cpu_capability.h"
#include "common/element_of.h"

namespace planmill {
namespace {

constexpr int64_t kSplit = 21 * 48;      // tokens whose keys are summed by themselves: a multiple of the kernels' tile
constexpr int64_t kTogether = 16;         // heads that one thread takes together
constexpr int64_t kGrain = 64 * 64 * 96;  // multiplications that are worth a thread

const LinearAttentionKernels& linear_kernels() {
  return choose_kernels(linear_attention_baseline(), linear_attention_avx2(), linear_attention_avx512());
}

FeatureMap feature_map_of(std::string_view name) {
  if (name == "elu") return FeatureMap::kElu;
  if (name == "relu") return FeatureMap::kRelu;
  return name == "identity" ? FeatureMap::kIdentity : FeatureMap::kSquaredRelu;
}

at::Tensor with_unit_stride(const at::Tensor& x) { return x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous(); }

// The heads of a call, and where their states are.
struct Heads {
  const LinearAttentionKernels& kernels;
  LinearHead first;
  const at::Tensor &q, &k, &v, &out;
  int64_t heads, queries, keys, state, scratch;

  LinearHead head(int64_t i) const {
    const int64_t b = i / heads, h = i % heads, bytes = bytes_of(first.type);
    const auto at = [&](const at::Tensor& x) {
      return static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + h * x.stride(1)) * bytes;
    };
    LinearHead one = first;
    one.q = at(q), one.k = at(k), one.v = at(v);
    one.mask = first.mask == nullptr ? nullptr : first.mask + b * keys;
    one.out = static_cast<char*>(first.out) + i * queries * first.values * bytes;
    return one;
  }

  std::vector<float> room(int64_t states) const {
    return std::vector<float>(static_cast<size_t>(states * state + scratch));
  }

  // Heads of one sample, split by split: where heads lie side by side in a token, they share its pages and the translation
  // of them.
  void run(int64_t begin, int64_t end, bool causal) const {
    std::vector<float> buffer = room(end - begin + 1);
    float *part = buffer.data() + (end - begin) * state, *rest = part + state;
    const auto over = [&](int64_t tokens, const auto& call) {
      for (int64_t n = 0; n < tokens; n += kSplit)
        for (int64_t i = begin; i < end; ++i)
          call(head(i), n, std::min(n + kSplit, tokens), buffer.data() + (i - begin) * state);
    };
    over(keys, [&](const LinearHead& one, int64_t first_key, int64_t last, float* total) {
      if (causal) return kernels.causal(one, first_key, last, total, rest);
      std::fill(part, part + state, 0.0f);
      kernels.add_keys(one, first_key, last, part, rest);
      kernels.add(total, part, state);
    });
    if (causal) return;
    over(queries, [&](const LinearHead& one, int64_t first_query, int64_t last, const float* total) {
      kernels.apply(one, first_query, last, total, rest);
    });
  }

  // Heads whose tokens are divided among threads: sums of the splits, their running totals, the queries.
  void run_split(int64_t count, bool causal) const {
    const int64_t splits = (keys + kSplit - 1) / kSplit, parts = (queries + kSplit - 1) / kSplit;
    std::vector<float> states(static_cast<size_t>(count * (splits + 1) * state));  // before each split, and after the last
    const auto state_of = [&](int64_t i, int64_t split) { return states.data() + (i * (splits + 1) + split) * state; };
    const auto over = [&](int64_t units, const auto& call) {
      at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer = room(0);
        for (int64_t unit = begin; unit < end; ++unit) call(unit, buffer.data());
      });
    };
    over(count * splits, [&](int64_t unit, float* scratch_of) {
      const int64_t i = unit / splits, split = unit % splits;
      kernels.add_keys(head(i), split * kSplit, std::min((split + 1) * kSplit, keys), state_of(i, split + 1), scratch_of);
    });
    over(count, [&](int64_t i, float*) {
      for (int64_t split = 0; split < splits; ++split) kernels.add(state_of(i, split + 1), state_of(i, split), state);
    });
    over(count * parts, [&](int64_t unit, float* scratch_of) {
      const int64_t i = unit / parts, first_query = unit % parts * kSplit;
      const int64_t last = std::min(first_query + kSplit, queries);
      if (causal) kernels.causal(head(i), first_query, last, state_of(i, unit % parts), scratch_of);
      else kernels.apply(head(i), first_query, last, state_of(i, splits), scratch_of);
    });
  }
};

at::Tensor linear_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                            std::string_view feature_map, bool normalize, bool causal, double scale, double eps) {
  const at::Tensor x = with_unit_stride(q), y = with_unit_stride(k), z = with_unit_stride(v), m = mask.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), keys = k.size(2);
  at::Tensor out = at::empty({batch, heads, queries, v.size(3)}, q.options());
  if (out.numel() == 0) return out;
  const LinearAttentionKernels& kernels = linear_kernels();
  LinearHead first{};
  first.type = element_of(q);
  first.q_row = x.stride(2), first.k_row = y.stride(2), first.v_row = z.stride(2);
  first.mask = m.numel() != 0 ? reinterpret_cast<const uint8_t*>(m.const_data_ptr<bool>()) : nullptr;
  first.out = out.mutable_data_ptr();
  first.width = width, first.values = v.size(3);
  first.map = feature_map_of(feature_map);
  first.normalize = normalize, first.scale = static_cast<float>(scale), first.eps = static_cast<float>(eps);
  const Heads all{kernels, first, x, y, z, out, heads, queries, keys, kernels.state(width, first.values),
                  kernels.scratch(width, first.values)};
  const int64_t count = batch * heads;
  if (count >= at::get_num_threads() || std::max(queries, keys) <= kSplit) {
    const int64_t work = (queries + keys) * width * first.values;
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, next; i < end; i = next) {
        next = std::min({end, i + kTogether, (i / heads + 1) * heads});
        all.run(i, next, causal);
      }
    });
  } else {
    all.run_split(count, causal);
  }
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("linear_attention", &linear_attention); }

}  // namespace
}  // namespace planmill
