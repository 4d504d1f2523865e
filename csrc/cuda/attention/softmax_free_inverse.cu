// The small inverse of softmax_free_attention, one CTA a head: U = D pinv(A + ridge I) D W from the landmarks [heads, m, d],
// W [heads, splits, m, dv] in parts whose sum, in order, is left in the first. Float32 throughout, no tensor cores.
//
// newton_inverse: four matrices [mp, mp] in shared memory, m in whole quads: P, V, X and the next V. A thread makes tiles
// of 4 x 4, whose operands are quads of rows. It stops where every entry of P V is within 1e-3 / m of I's: a step squares
// what is left.
// solve_inverse: P = L D L^T by elimination, the right-hand sides along with it: one barrier a column, since row k is used
// as it stands, unscaled. P is in shared memory, or in `scratch` where it does not fit.

extern __shared__ int shared_memory[];

struct alignas(16) Quad {
  float x[4];
};

__device__ __forceinline__ float* shared_floats() { return reinterpret_cast<float*>(shared_memory); }

// P [m, ld] = A + ridge I, and the row sums of A.
__device__ void make_gram(const float* landmarks, float* p, float* sums, int m, int d, int ld, float ridge) {
  for (int t = threadIdx.x; t < ld * m; t += blockDim.x) {
    const int i = t / ld, j = t % ld;
    float square = 0.0f;
    for (int c = 0; j < m && c < d; ++c) {
      const float difference = landmarks[i * d + c] - landmarks[j * d + c];
      square += difference * difference;
    }
    p[t] = j < m ? expf(-0.5f * square) : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m; i += blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < m; ++j) sum += p[i * ld + j];
    sums[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m; i += blockDim.x) p[i * ld + i] += ridge;
}

// w [m, dv] += the other parts; times D^-1/2 where sums are given.
__device__ void gather_parts(float* w, const float* sums, int m, int dv, int splits, bool normalize) {
  const int size = m * dv;
  for (int t = threadIdx.x; t < size; t += blockDim.x) {
    float sum = w[t];
    for (int s = 1; s < splits; ++s) sum += w[static_cast<long long>(s) * size + t];
    w[t] = normalize ? sum / sqrtf(sums[t / dv]) : sum;
  }
}

// Tiles of 4 x 4 of a b, [mp, mp] each, handed to `finish(row, column, sums of that row)`.
template <class Finish>
__device__ __forceinline__ void multiply(const float* a, const float* b, int mp, Finish finish) {
  const int tiles = mp / 4;
  for (int t = threadIdx.x; t < tiles * tiles; t += blockDim.x) {
    const int i = t / tiles * 4, j = t % tiles * 4;
    float sums[4][4] = {};
    const float* left = a + i * mp;
#pragma unroll 2
    for (int k = 0; k < mp; ++k) {
      const Quad right = *reinterpret_cast<const Quad*>(b + k * mp + j);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += left[r * mp + k] * right.x[c];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) finish(i + r, j, sums[r]);
  }
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    newton_inverse(const float* __restrict__ landmarks, const float* __restrict__ steps, float* partials,
                   float* __restrict__ out, int m, int d, int dv, int splits, int iterations, int normalize,
                   int step_given, float ridge) {
  const long long head = blockIdx.x;
  const int mp = (m + 3) / 4 * 4, size = mp * mp;
  float *p = shared_floats(), *v = p + size, *x = v + size, *next = x + size, *sums = next + size;
  float* w = partials + head * splits * m * dv;
  for (int t = threadIdx.x; t < size; t += blockDim.x) p[t] = 0.0f;  // rows behind m
  __syncthreads();
  make_gram(landmarks + head * m * d, p, sums, m, d, mp, ridge);
  gather_parts(w, sums, m, dv, splits, normalize);
  float rho = 0.0f;
  for (int i = 0; i < m; ++i) rho = sums[i] > rho || sums[i] != sums[i] ? sums[i] : rho;
  const float alpha = step_given ? steps[head] : 1.8f / (rho * rho);
  __syncthreads();
  for (int t = threadIdx.x; t < size; t += blockDim.x) v[t] = alpha * p[t];
  __syncthreads();
  const float near = 1e-3f / static_cast<float>(m);
  for (int step = 0; step < iterations; ++step) {
    int far = 0;
    multiply(p, v, mp, [&](int i, int j, const float* row) {
      Quad made;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        made.x[c] = row[c];
        far |= i < m && !(fabsf(row[c] - (i == j + c ? 1.0f : 0.0f)) <= near);
      }
      *reinterpret_cast<Quad*>(x + i * mp + j) = made;
    });
    const int unfinished = __syncthreads_or(far);
    multiply(v, x, mp, [&](int i, int j, const float* row) {
      Quad made = *reinterpret_cast<const Quad*>(v + i * mp + j);
#pragma unroll
      for (int c = 0; c < 4; ++c) made.x[c] = 2.0f * made.x[c] - row[c];
      *reinterpret_cast<Quad*>(next + i * mp + j) = made;
    });
    __syncthreads();
    float* old = v;
    v = next;
    next = old;
    if (!unfinished) break;
  }
  for (int t = threadIdx.x; t < m * dv; t += blockDim.x) {
    const int i = t / dv, c = t % dv;
    float sum = 0.0f;
    for (int k = 0; k < m; ++k) sum += v[i * mp + k] * w[k * dv + c];
    out[head * m * dv + t] = normalize ? sum / sqrtf(sums[i]) : sum;
  }
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    solve_inverse(const float* __restrict__ landmarks, float* scratch, float* partials, float* __restrict__ out, int m,
                  int d, int dv, int splits, int normalize, int shared, float ridge) {
  const long long head = blockIdx.x;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  float* sums = shared_floats();
  float* p = shared ? sums + m : scratch + head * m * m;
  float* w = partials + head * splits * m * dv;
  make_gram(landmarks + head * m * d, p, sums, m, d, m, ridge);
  gather_parts(w, sums, m, dv, splits, normalize);
  __syncthreads();
  for (int k = 0; k + 1 < m; ++k) {  // row k as it stands is D_k times that of L^T
    const float* row = p + k * m;
    const float inverse = row[k] > 0.0f ? 1.0f / row[k] : nanf("");
    for (int i = k + 1 + warp; i < m; i += warps) {
      const float factor = row[i] * inverse;
      for (int j = i + lane; j < m; j += 32) p[i * m + j] -= factor * row[j];
      for (int c = lane; c < dv; c += 32) w[i * dv + c] -= factor * w[k * dv + c];
    }
    __syncthreads();
  }
  for (int c = threadIdx.x; c < dv; c += blockDim.x) {  // every column of W is one thread's
    for (int k = m - 1; k >= 0; --k) {
      float sum = w[k * dv + c];
      for (int j = k + 1; j < m; ++j) sum -= p[k * m + j] * w[j * dv + c];
      w[k * dv + c] = p[k * m + k] > 0.0f ? sum / p[k * m + k] : nanf("");
    }
    for (int k = 0; k < m; ++k)
      out[(head * m + k) * dv + c] = normalize ? w[k * dv + c] / sqrtf(sums[k]) : w[k * dv + c];
  }
}
