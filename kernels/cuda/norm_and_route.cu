// The norm before a sparse layer, its router and the choice of experts in one kernel, for few tokens, on sm_90a.
//
// A token belongs to a cluster of RANKS CTAs. Each loads its rows of the router, WARPS times OWN experts, before it waits for the
// kernel before it in the stream: the router is on its way while that one ends. Then each computes the norm of the whole token
// (r = x + residual, y = norm(r), rounded as in rms_norm.py; each stores a part of both), and its experts' logits, rounded to the
// dtype of x. The first CTA gets all logits and chooses: the largest, of equals the lowest expert, by keys as in moe_routing.py.
//
// Set by the compiler's command line: HIDDEN (2048 or 4096), EXPERTS (64, 128, 256), FLOAT16.

#include "hopper.cuh"

constexpr int RANKS = 8, WARPS = 8, THREADS = 32 * WARPS;
constexpr int OWN = EXPERTS / (RANKS * WARPS);   // experts of a warp
constexpr int CHUNKS = HIDDEN / 256;             // of 8 inputs, of a lane, in a row of the router
constexpr int VECTORS = HIDDEN / (8 * THREADS);  // of 8 numbers of the token, of a thread
constexpr int KEYS = EXPERTS / 32;               // of a lane of the warp that chooses
constexpr int NO_KEY = -2147483647 - 1;

struct alignas(16) Eight {
  u32 pairs[4];
};

// Of what no kernel writes while the model runs; not after what follows it.
__device__ __forceinline__ Eight load_constant(const u16* source) {
  Eight eight;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "l"(source)
               : "memory");
  return eight;
}

__device__ __forceinline__ float low(u32 pair) { return widen_input(static_cast<u16>(pair & 0xffff)); }

__device__ __forceinline__ float high(u32 pair) { return widen_input(static_cast<u16>(pair >> 16)); }

// An integer that orders experts as they are chosen. Logits of 16 bits leave 13 bits of a float32 for the id.
__device__ __forceinline__ int key_of(float logit, int expert) {
  const int bits = logit == 0.0f ? 0 : __float_as_int(logit);  // -0 equals 0
  const int order = bits ^ ((bits >> 31) & 0x7fffffff);
  return (order & -0x2000) | (0x1fff - expert);
}

__device__ __forceinline__ float logit_of(int key) { return __int_as_float((key ^ ((key >> 31) & 0x7fffffff)) & -0x2000); }

// By one warp, from the logits of all experts: weights and experts of one token.
__device__ __forceinline__ void choose(const float* logits, float* weights, int* experts, int top_k, bool renormalize, int lane) {
  int keys[KEYS], chosen = NO_KEY;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) keys[i] = key_of(logits[32 * i + lane], 32 * i + lane);
  for (int c = 0; c < top_k; ++c) {
    int best = NO_KEY;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(ALL_LANES, best);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) keys[i] = keys[i] == best ? NO_KEY : keys[i];
    if (lane == c) chosen = best;
  }
  const float largest = __shfl_sync(ALL_LANES, logit_of(chosen), 0);
  const float weight = lane < top_k ? expf(logit_of(chosen) - largest) : 0.0f;
  float part = weight;  // of the sum over all experts: it cancels when the chosen ones' weights are divided by theirs
  if (!renormalize) {
    part = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) part += expf(logits[32 * i + lane] - largest);
  }
  const float total = add_lanes(part);
  if (lane < top_k) {
    weights[lane] = weight / total;
    experts[lane] = 0x1fff - (chosen & 0x1fff);
  }
}

// Grid: the CTAs of a cluster, tokens. residual may be null: then r is x, and new_residual is not written.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_and_route(const u16* x, const u16* residual, const u16* gain, const u16* router, u16* y, u16* new_residual, float* weights,
               int* experts, int stride_x, int stride_residual, float eps, int top_k, int renormalize) {
  __shared__ Eight normed[HIDDEN / 8];
  __shared__ float squares[WARPS];
  __shared__ float logits[EXPERTS];  // of the first CTA, and that all have come
  __shared__ u64 received;
  const int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_expert = (rank * WARPS + warp) * OWN;
  const long long token = blockIdx.y;

  if (rank == 0 && threadIdx.x == 0) {
    init_barrier(shared_address(&received), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_and_expect(shared_address(&received), EXPERTS * 4);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  let_next_start();
  Eight rows[OWN][CHUNKS], gains[VECTORS];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) rows[i][j] = load_constant(router + (first_expert + i) * HIDDEN + (32 * j + lane) * 8);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) gains[v] = load_constant(gain + (v * THREADS + threadIdx.x) * 8);
  wait_for_previous();

  Eight values[VECTORS];
  float square = 0.0f;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * THREADS + threadIdx.x) * 8;
    values[v] = *reinterpret_cast<const Eight*>(x + token * stride_x + column);
    if (residual != nullptr) {
      const Eight added = *reinterpret_cast<const Eight*>(residual + token * stride_residual + column);
      for (int i = 0; i < 4; ++i) {
        const u32 pair = values[v].pairs[i], other = added.pairs[i];
        values[v].pairs[i] = round_two(low(pair) + low(other), high(pair) + high(other));
      }
      if (warp == rank) *reinterpret_cast<Eight*>(new_residual + token * HIDDEN + column) = values[v];
    }
    for (int i = 0; i < 4; ++i) {
      square += low(values[v].pairs[i]) * low(values[v].pairs[i]) + high(values[v].pairs[i]) * high(values[v].pairs[i]);
    }
  }
  square = add_lanes(square);
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += squares[i];
  const float scale = rsqrtf(total / HIDDEN + eps);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int place = v * THREADS + threadIdx.x;
    for (int i = 0; i < 4; ++i) {
      const u32 pair = round_two(low(values[v].pairs[i]) * scale, high(values[v].pairs[i]) * scale);
      values[v].pairs[i] = round_two(low(pair) * low(gains[v].pairs[i]), high(pair) * high(gains[v].pairs[i]));
    }
    normed[place] = values[v];
    if (warp == rank) *reinterpret_cast<Eight*>(y + token * HIDDEN + place * 8) = values[v];
  }
  __syncthreads();

  float sums[OWN] = {};
#pragma unroll
  for (int j = 0; j < CHUNKS; ++j) {
    const Eight inputs = normed[32 * j + lane];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      for (int p = 0; p < 4; ++p) {
        sums[i] += low(inputs.pairs[p]) * low(rows[i][j].pairs[p]);
        sums[i] += high(inputs.pairs[p]) * high(rows[i][j].pairs[p]);
      }
    }
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // the first CTA is there
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const float logit = low(round_two(add_lanes(sums[i]), 0.0f));
    const u32 target = address_in_rank(shared_address(logits + first_expert + i), 0);
    if (lane == 0) {
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(target), "f"(logit),
                   "r"(address_in_rank(shared_address(&received), 0))
                   : "memory");
    }
  }
  if (rank != 0 || warp != 0) return;
  wait_for_peers(shared_address(&received), 0);
  choose(logits, weights + token * top_k, experts + token * top_k, top_k, renormalize, lane);
}
