// Stable counting sort of the routed rows by expert and the map from blocks of rows to experts: one CTA, one launch.
//
// Row i (token i div k, choice i mod k) belongs to expert indices[i]; a row whose index is outside [0, experts) is
// dropped. Every expert's rows, in their own order, fill whole blocks of 2^block_shift entries of sorted_ids; what is
// left of its last block holds `rows`, which no row is called. Block b belongs to expert_of_block[b]; entries from
// block num_blocks on are not written. Equal inputs give equal bits: the only atomics are integer counts.
//
// A warp owns a contiguous run of rows and a counter per expert, so that a rank inside the warp's 32 rows (match_any) is
// all the order that is ever needed. More rows make the runs longer: two walks of rows / (32 * warps) steps. Up to 16k
// rows that is 16 steps or fewer; a million rows cost about 1000 steps a walk, which products over a million rows hide.
//
// Shared memory: (warps + 2) * experts counters. Launched with one CTA of `warps` full warps.

extern __shared__ int shared_memory[];

constexpr unsigned kAll = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(1024)
    sort_experts(const int* __restrict__ indices, int* __restrict__ sorted_ids, int* __restrict__ expert_of_block,
                 int* __restrict__ num_blocks, int rows, int experts, int block_shift) {
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  const int warps = blockDim.x >> 5;
  int* count = shared_memory;               // [warps, experts]: of the warp's rows, then of the rows before the warp's
  int* total = count + warps * experts;     // [experts]
  int* first_row = total + experts;         // [experts]: where the expert's first block begins
  int* own = count + warp * experts;

  // Runs are whole steps of 32 rows; unsigned, since the end of the last one may pass 2^31.
  const unsigned end_of_rows = static_cast<unsigned>(rows);
  const unsigned run = ((end_of_rows + blockDim.x - 1) / blockDim.x) * 32u;
  const unsigned begin = run * static_cast<unsigned>(warp);
  const unsigned end = begin + run < end_of_rows ? begin + run : end_of_rows;

  for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) count[i] = 0;
  __syncthreads();
  for (unsigned i = begin + lane; i < end; i += 32) {
    const unsigned expert = static_cast<unsigned>(indices[i]);
    if (expert < static_cast<unsigned>(experts)) atomicAdd(own + expert, 1);
  }
  __syncthreads();

  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int before = 0;
    for (int w = 0; w < warps; ++w) {
      const int here = count[w * experts + e];
      count[w * experts + e] = before;
      before += here;
    }
    total[e] = before;
  }
  __syncthreads();

  const int block_rows = 1 << block_shift;
  if (warp == 0) {
    int before = 0;  // blocks of the experts before these 32
    for (int first = 0; first < experts; first += 32) {
      const int e = first + lane;
      const int blocks = e < experts ? (total[e] + block_rows - 1) >> block_shift : 0;
      int sum = blocks;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, sum, step);
        if (lane >= step) sum += other;
      }
      if (e < experts) first_row[e] = (before + sum - blocks) << block_shift;
      before += __shfl_sync(kAll, sum, 31);
    }
    if (lane == 0) *num_blocks = before;
  }
  __syncthreads();

  for (int e = warp; e < experts; e += warps) {
    const int blocks = (total[e] + block_rows - 1) >> block_shift;
    for (int b = lane; b < blocks; b += 32) expert_of_block[(first_row[e] >> block_shift) + b] = e;
    for (int i = total[e] + lane; i < blocks << block_shift; i += 32) sorted_ids[first_row[e] + i] = rows;
  }
  for (unsigned first = begin; first < end; first += 32) {
    const unsigned i = first + lane;
    const unsigned expert = i < end ? static_cast<unsigned>(indices[i]) : kAll;
    const bool kept = expert < static_cast<unsigned>(experts);
    const unsigned alike = __match_any_sync(kAll, kept ? expert : kAll);
    const int rank = __popc(alike & ((1u << lane) - 1u));
    const int before = kept ? own[expert] : 0;
    __syncwarp();
    if (kept && rank == 0) own[expert] = before + __popc(alike);
    __syncwarp();
    if (kept) sorted_ids[first_row[expert] + before + rank] = static_cast<int>(i);
  }
}
