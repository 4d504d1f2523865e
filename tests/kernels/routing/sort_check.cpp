// sort_experts.cu on the host under -fsanitize=thread: its rows against a sort, its barriers against data races.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

#include "../common/cuda_emulation.h"
#include "cuda/routing/sort_experts.cu"

int main() {
  std::mt19937 source(11);
  for (int draw = 0; draw < 12; ++draw) {
    int rows = static_cast<int>(source() % 700), experts = 1 + static_cast<int>(source() % 40), shift = 4 + draw % 4;
    const int warps = 1 << draw % 3, low = draw % 3 - 1;
    std::vector<int> indices(rows), order(rows), want;
    for (int& e : indices) e = low + static_cast<int>(source() % (experts + 1));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return indices[a] < indices[b]; });
    int blocks = 0;
    for (int e = 0; e < experts; ++e) {
      for (int i : order) {
        if (indices[i] == e) want.push_back(i);
      }
      blocks = (static_cast<int>(want.size()) + (1 << shift) - 1) >> shift;
      want.resize(static_cast<size_t>(blocks) << shift, rows);
    }
    std::vector<int> sorted(want.size(), -7), expert_of_block(blocks, -7);
    int* pointers[] = {indices.data(), sorted.data(), expert_of_block.data()};
    int found = -7;
    int* count = &found;
    void* args[] = {&pointers[0], &pointers[1], &pointers[2], &count, &rows, &experts, &shift};
    const size_t shared = static_cast<size_t>(warps + 2) * experts * sizeof(int);
    if (emulated::launch(sort_experts, 1, warps * 32, shared, args) || found != blocks || sorted != want) {
      std::printf("draw %d: %d rows, %d experts are sorted wrongly\n", draw, rows, experts);
      return 1;
    }
  }
  std::printf("12 routings sorted\n");
}
