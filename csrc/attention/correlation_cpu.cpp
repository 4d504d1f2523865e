// correlation_attention and similarity_attention on the CPU: the weights of a few queries for all keys stay in the
// second-level cache, so that the softmax needs no second pass over the keys and weights of several maps meet the values once.
#include "common/torch_headers.h"

#include <string_view>

#include "attention/correlation.h"
#include "attention/correlation_packing.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

const CorrelationKernels& correlation_kernels_in_use() {
  return choose_kernels(correlation_baseline(), correlation_avx2(), correlation_avx512());
}

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

at::Tensor float_rows(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kFloat);
  return y.stride(-1) == 1 || y.size(-1) == 1 ? y : y.contiguous();
}

// One of q, k, v: [B, H, N, width] with its keys in panels.
struct Source {
  at::Tensor x, keys;

  HeadRows head(int64_t index) const {
    const int64_t b = index / x.size(1), h = index % x.size(1);
    return {x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(1), x.stride(2), x.size(2), x.size(3)};
  }
  int64_t panels() const { return blocks(x.size(2), kPanel); }
  int64_t head_size() const { return panels() * kPanel * x.size(3); }
  const float* keys_of(int64_t index) const { return keys.const_data_ptr<float>() + index * head_size(); }

  void pack() {
    const int64_t heads = x.size(0) * x.size(1), all = heads * panels();
    keys = at::empty({heads * head_size()}, x.options());
    float* out = keys.data_ptr<float>();
    at::parallel_for(0, all, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_keys(head(i / panels()), i % panels(), out + i * kPanel * x.size(3));
    });
  }
};

at::Tensor values_in_panels(const Source& v) {
  const int64_t heads = v.x.size(0) * v.x.size(1), panels = v.panels(), rows = panels * kPanel;
  const int64_t size = blocks(v.x.size(3), kPanel) * rows * kPanel;
  at::Tensor values = at::empty({heads * size}, v.x.options());
  float* out = values.data_ptr<float>();
  at::parallel_for(0, heads * panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_values(v.head(i / panels), i % panels, rows, out + i / panels * size);
  });
  return values;
}

// A product of a map: rows of one source against the keys of another.
struct Product {
  int64_t queries, keys;
  float factor;
};
using Products = std::vector<Product>;

std::vector<Products> parse_maps(std::string_view maps, float scale) {
  const auto source = [](char name) { return name == 'q' ? int64_t{0} : name == 'k' ? int64_t{1} : int64_t{2}; };
  std::vector<Products> made;
  while (!maps.empty()) {
    const std::string_view name = maps.substr(0, maps.find('+'));
    maps.remove_prefix(std::min(maps.size(), name.size() + 1));
    const float third = scale / std::sqrt(3.0f);
    if (name == "qkv") made.push_back({{0, 0, third}, {1, 1, third}, {2, 2, third}});
    else made.push_back({{source(name[0]), source(name[1]), scale}});
  }
  return made;
}

struct Attention {
  const CorrelationKernels& kernels;
  const Source* sources;
  const at::Tensor& values;
  const float* thresholds;  // one for each of the B, or null

  // `maps` of head `index`, rows [first, last), to out; scratch: see below
  void attend(const std::vector<Products>& maps, int64_t index, int64_t first, int64_t last, std::vector<float>& queries,
              std::vector<float>& weights, std::vector<float>& result, float* out) const {
    const Source& v = sources[2];
    const int64_t width = v.x.size(3), padded = blocks(width, kPanel) * kPanel, rows = last - first;
    CorrelationTile tile{};
    tile.rows = rows, tile.keys = v.x.size(2), tile.count = static_cast<int64_t>(maps.size());
    float* copy = queries.data();
    for (size_t m = 0; m < maps.size(); ++m) {
      for (size_t t = 0; t < maps[m].size(); ++t) {
        const Product& product = maps[m][t];
        const HeadRows head = sources[product.queries].head(index);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < head.width; ++c)
            copy[i * head.width + c] = head.data[(first + i) * head.stride + c] * product.factor;
        tile.maps[m].terms[t] = {copy, sources[product.keys].keys_of(index), head.width};
        copy += rows * head.width;
      }
      tile.maps[m].count = static_cast<int64_t>(maps[m].size());
    }
    tile.values = values.const_data_ptr<float>() + index * padded * v.panels() * kPanel;
    tile.value_width = width;
    tile.out = result.data();
    tile.limited = thresholds != nullptr;
    tile.threshold = thresholds != nullptr ? thresholds[index / v.x.size(1)] : 0.0f;
    tile.first = first;
    kernels.attend(tile, weights.data());
    for (int64_t i = 0; i < rows; ++i) std::copy_n(result.data() + i * padded, width, out + (first + i) * width);
  }

  // Results of every list of maps, each [B, H, N, width of v] float32; tiles do not depend on the number of threads.
  void run(const std::vector<std::pair<std::vector<Products>, float*>>& jobs) const {
    const Source& v = sources[2];
    const int64_t tokens = v.x.size(2), width = v.x.size(3), heads = v.x.size(0) * v.x.size(1);
    const int64_t rows = std::min(kCorrelationRows, tokens), tiles = blocks(tokens, rows);
    size_t copies = 0, most = 1;
    for (const auto& [maps, out] : jobs) {
      size_t columns = 0;
      for (const Products& map : maps)
        for (const Product& product : map) columns += static_cast<size_t>(sources[product.queries].x.size(3));
      copies = std::max(copies, columns), most = std::max(most, std::min<size_t>(maps.size(), 2));
    }
    at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> queries(copies * static_cast<size_t>(rows));
      std::vector<float> weights(most * static_cast<size_t>(v.panels() * kPanel * rows));
      std::vector<float> result(static_cast<size_t>(rows * blocks(width, kPanel) * kPanel));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = i / tiles, first = i % tiles * rows, last = std::min(first + rows, tokens);
        for (const auto& [maps, out] : jobs)
          attend(maps, index, first, last, queries, weights, result, out + index * tokens * width);
      }
    });
  }
};

std::tuple<at::Tensor, at::Tensor> correlation_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                         std::string_view maps, bool original, double scale) {
  Source sources[3] = {{float_rows(q), {}}, {float_rows(k), {}}, {float_rows(v), {}}};
  at::Tensor summed = at::empty(v.sizes(), v.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  at::Tensor plain = at::empty({original ? v.size(0) : 0, v.size(1), v.size(2), v.size(3)}, summed.options());
  if (v.numel() != 0) {
    std::vector<std::pair<std::vector<Products>, float*>> jobs{{parse_maps(maps, scale), summed.data_ptr<float>()}};
    if (original) jobs.push_back({parse_maps("qk", scale), plain.data_ptr<float>()});
    for (int64_t i = 0; i < 3; ++i) {
      const auto reads = [&](const Products& map) {
        return std::any_of(map.begin(), map.end(), [&](const Product& product) { return product.keys == i; });
      };
      if (std::any_of(jobs.begin(), jobs.end(), [&](const auto& job) {
            return std::any_of(job.first.begin(), job.first.end(), reads);
          }))
        sources[i].pack();
    }
    const at::Tensor values = values_in_panels(sources[2]);
    Attention{correlation_kernels_in_use(), sources, values, nullptr}.run(jobs);
  }
  return {summed.to(v.scalar_type()), plain.to(v.scalar_type())};
}

// Features over their lengths, and gamma beta |mean of them|^2: the mean cosine of all pairs, without the pairs.
std::vector<float> normalise(const at::Tensor& features, at::Tensor& unit, double beta, double gamma, bool coupled) {
  const int64_t batch = features.size(0), rows = features.size(1), width = features.size(2);
  std::vector<double> squares(static_cast<size_t>(batch));
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(static_cast<size_t>(width));
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = 0; i < rows; ++i) {
        const float* x = features.const_data_ptr<float>() + b * features.stride(0) + i * features.stride(1);
        float* y = unit.data_ptr<float>() + (b * rows + i) * width;
        double square = 0.0;
        for (int64_t c = 0; c < width; ++c) square += static_cast<double>(x[c]) * x[c];
        const double length = std::sqrt(square), inverse = 1.0 / (length < 1e-12 ? 1e-12 : length);
        for (int64_t c = 0; c < width; ++c) {
          const double value = x[c] * inverse;
          y[c] = static_cast<float>(value);
          sum[c] += value;
        }
      }
      double square = 0.0;
      for (const double s : sum) square += s / rows * (s / rows);
      squares[b] = square;
    }
  });
  double all = 0.0;
  for (const double s : squares) all += s / batch;
  std::vector<float> thresholds;
  for (const double s : squares) thresholds.push_back(static_cast<float>(gamma * beta * (coupled ? all : s)));
  return thresholds;
}

at::Tensor similarity_attention(const at::Tensor& features, const at::Tensor& values, double beta, double gamma,
                                bool batch_coupled) {
  const at::Tensor f = float_rows(features);
  at::Tensor out = at::empty(values.sizes(), values.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out.to(values.scalar_type());
  at::Tensor unit = at::empty(f.sizes(), out.options());
  const std::vector<float> thresholds = normalise(f, unit, beta, gamma, batch_coupled);
  Source sources[3] = {{unit.unsqueeze(1), {}}, {}, {float_rows(values).unsqueeze(1), {}}};
  sources[0].pack();
  const at::Tensor panels = values_in_panels(sources[2]);
  const std::vector<Products> map{{{0, 0, static_cast<float>(gamma)}}};
  Attention{correlation_kernels_in_use(), sources, panels, thresholds.data()}.run({{map, out.data_ptr<float>()}});
  return out.to(values.scalar_type());
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) {
  m.impl("correlation_attention", &correlation_attention);
  m.impl("similarity_attention", &similarity_attention);
}

}  // namespace
}  // namespace planmill
