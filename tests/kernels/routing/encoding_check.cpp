// Checks one EncodingKernels against double arithmetic: bounds hold what they must, every latent that may be active is
// listed and nothing else, latents with a NaN bias never are. Built by test_encoding_bounds.py, -DKERNELS=encoding_<isa>.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "routing/encoding.h"

using namespace planmill;

namespace {

int failures = 0;

void expect(bool holds, const char* what, bool integer, bool absolute, bool theta) {
  if (!holds && ++failures < 20) std::printf("%s fails: integer %d, absolute %d, theta %d\n", what, integer, absolute, theta);
}

void check(bool integer, bool absolute, bool with_theta, std::mt19937& source) {
  constexpr int64_t kColumns = 1024;
  std::normal_distribution<float> normal;
  const EncodingKernels& k = *KERNELS(integer);
  std::vector<float> raw(kColumns), inv(kColumns), norm(kColumns), res(kColumns), bias(kColumns), theta(kColumns);
  const TokenBound token{1.5e-3f, 4.0f, 2e-3f, 6.0f, 1e-15f};
  std::vector<double> v(kColumns), error(kColumns);
  for (int64_t c = 0; c < kColumns; ++c) {
    const auto number = static_cast<int32_t>(1e6f * normal(source));
    const auto value = static_cast<float>(number);
    integer ? std::memcpy(&raw[c], &number, 4) : std::memcpy(&raw[c], &value, 4);
    inv[c] = 1e-3f * (1.0f + 0.1f * normal(source)), norm[c] = 1.0f + std::fabs(normal(source)), res[c] = 1e-3f * norm[c];
    bias[c] = c % 37 == 5 ? std::numeric_limits<float>::quiet_NaN() : 0.2f * normal(source);
    theta[c] = 0.3f * std::fabs(normal(source));
    v[c] = static_cast<double>(number) * token.inv * inv[c] + static_cast<double>(token.factor) * bias[c];
    if (absolute) v[c] = std::fabs(v[c]);
    error[c] = static_cast<double>(token.slope) * norm[c] + static_cast<double>(token.reach) * res[c] +
               1e-6 * std::fabs(token.factor * bias[c]) + token.floor;
  }
  const Latents latents{inv.data(), norm.data(), res.data(), bias.data(), with_theta ? theta.data() : nullptr};
  const float least = with_theta ? 1.2e-38f : 1.0f;
  std::vector<int32_t> found(kColumns);
  std::vector<float> low(kColumns), high(kColumns), groups(kColumns);
  const int64_t count = k.list_active(raw.data(), kColumns, token, latents, absolute, least, found.data(), low.data(), high.data());
  std::vector<char> listed(kColumns);
  for (int64_t j = 0; j < count; ++j) {
    const int32_t c = found[j];
    listed[c] = 1;
    expect(j == 0 || found[j - 1] < c, "the order", integer, absolute, with_theta);
    expect(std::fabs(low[j] - (v[c] - error[c])) <= 1e-5 * (1.0 + v[c]), "a lower bound", integer, absolute, with_theta);
    expect(std::fabs(high[j] - (v[c] + error[c])) <= 1e-5 * (1.0 + v[c]), "an upper bound", integer, absolute, with_theta);
  }
  double best = -1e30;
  int64_t expected = 0;
  for (int64_t c = 0; c < kColumns; ++c) {
    const double limit = with_theta ? std::fmax(least, static_cast<double>(token.factor) * theta[c]) : least;
    const double room = v[c] + error[c] - limit;
    if (std::fabs(room) > 1e-4 || std::isnan(room)) expect(listed[c] == (room > 0.0), "the list", integer, absolute, with_theta);
    expected += room > 0.0;
    if (v[c] - error[c] > best) best = v[c] - error[c];
  }
  expect(expected > 20 && expected < kColumns - 20, "the draw itself", integer, absolute, with_theta);
  const int64_t many = k.group_bounds(raw.data(), kColumns, token, latents, absolute, groups.data());
  expect(many == kColumns / 8, "the number of groups", integer, absolute, with_theta);
  double top = -1e30, sum = 0.0;
  for (int64_t g = 0; g < many; ++g) {
    top = groups[g] > top ? groups[g] : top;
    sum += groups[g];
    int64_t at_least = 0;  // as many latents as groups reach a group's bound: what a first threshold is made of
    for (int64_t c = 0; c < kColumns; ++c) at_least += v[c] - error[c] >= groups[g] - 1e-5;
    int64_t above = 0;
    for (int64_t other = 0; other < many; ++other) above += groups[other] >= groups[g];
    expect(at_least >= above, "a group bound", integer, absolute, with_theta);
  }
  expect(std::fabs(top - best) <= 1e-5 * (1.0 + std::fabs(best)), "the largest group bound", integer, absolute, with_theta);
  expect(std::isfinite(sum), "a group of NaN", integer, absolute, with_theta);
}

}  // namespace

int main() {
  std::mt19937 source(7);
  for (int draw = 0; draw < 20; ++draw)
    for (int variant = 0; variant < 8; ++variant) check(variant & 1, variant & 2, variant & 4, source);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
