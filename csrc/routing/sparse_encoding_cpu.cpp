// sparse_encoding on the CPU: latents are packed and screened block by block as in knn, with the bias in the bounds; the few
// that may be among a token's k largest, or about which a threshold is undecided, are evaluated again in float32.
#include "common/torch_headers.h"

#include <limits>
#include <string_view>

#include "routing/sparse_encoding_cpu.h"

namespace planmill {
namespace {

constexpr int64_t kFewTokens = 12;   // below, packing the weights costs more than reading them
constexpr double kPlainWork = 1 << 18;  // multiply-adds below which a second thread is not worth waking

bool zero_row(const float* x, int64_t d) {
  return std::all_of(x, x + d, [](float value) { return value == 0.0f; });
}

}  // namespace

void Encoder::scores(const float* own, const int32_t* index, int64_t count, float* out, RowBuffers& buffers) const {
  const int64_t d = x.width();
  buffers.rows.resize(static_cast<size_t>(4 * d));
  const float* rows[4];
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t some = std::min<int64_t>(4, count - first);
    for (int64_t j = 0; j < some; ++j) rows[j] = weight.get(index[first + j], buffers.rows.data() + j * d);
    for (int64_t j = first + 4; j < std::min(first + 8, count); ++j) weight.fetch(index[j]);
    screen.dots(own, rows, some, d, out + first);
    for (int64_t j = 0; j < some; ++j) {
      const double offset = bias == nullptr ? 0.0 : bias[index[first + j]];
      const float product = out[first + j];
      // a padding token has many such products, and they need no second look
      const bool certain = product == 0.0f && zero_row(own, d) && finite_row(rows[j], d);
      out[first + j] = static_cast<float>((certain ? 0.0 : product_in_range(product, own, rows[j], d)) + offset);
    }
  }
}

void Encoder::write(int64_t t, const std::vector<Latent>& sorted, int64_t active) const {
  const auto found = static_cast<int64_t>(sorted.size());
  for (int64_t j = 0; j < k; ++j) {
    values[t * k + j] = j < found ? sorted[j].value : 0.0f;
    indices[t * k + j] = j < found ? sorted[j].index : -1;
  }
  counts[t] = static_cast<int32_t>(theta == nullptr ? found : active);
}

void Encoder::write_nothing_known(int64_t t) const {
  for (int64_t j = 0; j < k; ++j) {
    const bool there = j < weight.count();
    values[t * k + j] = there ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    indices[t * k + j] = there ? static_cast<int32_t>(j) : -1;
  }
  counts[t] = 0;
}

namespace {

// What a thread knows of one token after its share of the latents.
struct Share {
  explicit Share(int64_t k) : best(k) {}
  Best<Latent> best;
  int64_t active = 0, known = 0;  // known: scores that are not NaN
};

// A few tokens together: every row of the weights is read once and compared with all of them.
void scan_together(const Encoder& e, const int64_t* tokens, int64_t n) {
  const int64_t m = e.weight.count(), d = e.x.width();
  const double work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(d);
  const int64_t parts = work > kPlainWork ? at::get_num_threads() : 1, size = (m + parts - 1) / parts;
  std::vector<Share> shares(static_cast<size_t>(n * parts), Share(e.k));
  std::vector<float> copies(static_cast<size_t>(n * d));
  std::vector<const float*> own(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) own[i] = e.x.get(tokens[i], copies.data() + i * d);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    RowBuffers buffers;
    for (int64_t part = begin; part < end; ++part) {
      int32_t index[4];
      float found[4];
      const int64_t stop = std::min((part + 1) * size, m);
      for (int64_t row = part * size; row < stop; row += 4) {
        const int64_t count = std::min<int64_t>(4, stop - row);
        for (int64_t j = 0; j < count; ++j) index[j] = static_cast<int32_t>(row + j);
        for (int64_t i = 0; i < n; ++i) {
          Share& share = shares[i * parts + part];
          e.scores(own[i], index, count, found, buffers);
          for (int64_t j = 0; j < count; ++j) {
            share.known += found[j] == found[j];
            if (!e.active(found[j], index[j])) continue;
            ++share.active;
            share.best.add(e.latent(found[j], index[j]));
          }
        }
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    Share& all = shares[i * parts];
    for (int64_t part = 1; part < parts; ++part) {
      Share& other = shares[i * parts + part];
      for (const Latent& latent : other.best.sorted()) all.best.add(latent);
      all.active += other.active;
      all.known += other.known;
    }
    if (all.known > 0) e.write(tokens[i], all.best.sorted(), all.active);
    else e.write_nothing_known(tokens[i]);
  }
}

}  // namespace

void Encoder::scan(const std::vector<int64_t>& tokens) const {
  std::vector<int64_t> left;
  std::vector<float> scratch(static_cast<size_t>(x.width()));
  for (const int64_t t : tokens) {
    const float* own = x.get(t, scratch.data());
    if (std::any_of(own, own + x.width(), [](float value) { return value != value; })) write_nothing_known(t);
    else left.push_back(t);
  }
  for (size_t first = 0; first < left.size(); first += kFewTokens)
    scan_together(*this, left.data() + first, std::min<int64_t>(kFewTokens, static_cast<int64_t>(left.size() - first)));
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sparse_encoding(const at::Tensor& x, const at::Tensor& weight,
                                                               const at::Tensor& bias, const at::Tensor& threshold,
                                                               int64_t k, std::string_view mode) {
  const at::Tensor a = x.contiguous(), w = weight.contiguous();
  const at::Tensor b = bias.to(at::kFloat).contiguous(), theta = threshold.to(at::kFloat).contiguous();
  const int64_t tokens = a.size(0), m = w.size(0), d = a.size(1);
  at::Tensor values = at::empty({tokens, k}, at::kFloat), indices = at::empty({tokens, k}, at::kInt);
  at::Tensor counts = at::empty({tokens}, at::kInt);
  const Rows left(a, d), right(w, d);
  const Encoder encoder{left, right, b.numel() > 0 ? b.const_data_ptr<float>() : nullptr,
                        mode == "jump_relu" ? theta.const_data_ptr<float>() : nullptr, k, mode == "abs_topk",
                        screen_kernels(), values.data_ptr<float>(), indices.data_ptr<int32_t>(), counts.data_ptr<int32_t>()};
  if (m == 0) {
    for (int64_t t = 0; t < tokens; ++t) encoder.write(t, {}, 0);
    return {values, indices, counts};
  }
  const double work = static_cast<double>(tokens) * static_cast<double>(m) * static_cast<double>(d);
  if (tokens < kFewTokens || work <= kPlainWork) {
    std::vector<int64_t> all(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) all[t] = t;
    encoder.scan(all);
  } else if (!encoder.screen_all(frame_at_origin(right, false))) {
    encoder.screen_all(frame_at_origin(right, true));
  }
  return {values, indices, counts};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("sparse_encoding", &sparse_encoding); }

}  // namespace
}  // namespace planmill
