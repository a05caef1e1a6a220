// The norm before a sparse layer, its router and the choice of experts in one kernel, for few tokens, on sm_90a.
//
// TOKENS tokens belong to a cluster of RANKS CTAs, each of which has OWN experts. A CTA loads its rows of the router before it
// waits for the kernel before it in the stream: the router is on its way while that one ends. Then it computes the norms of the
// cluster's tokens (r = x + residual, y = norm(r), rounded as in rms_norm.py; each stores a part of both) and its experts' logits,
// rounded to the dtype of x. A warp has a slice of the inputs, and has it where the tensor cores want it: lane 4 g + q holds 16
// bytes of the rows of token g and of experts g and g + 8, which are the inputs that two products take from it, in the same order
// for both operands. CTA t of the cluster gets the logits of all experts of token t and chooses: the largest, of equals the lowest
// expert, by keys as in moe_routing.py.
//
// Set by the compiler's command line: HIDDEN (2048 or 4096), EXPERTS (64, 128, 256), TOKENS (1 or 8), FLOAT16.

#include "route.cuh"

constexpr int RANKS = 8;
constexpr int WARPS = HIDDEN / 256, THREADS = 32 * WARPS;
constexpr int VECTORS = 8;                // of 8 inputs, of a lane, in its warp's slice of a row
constexpr int OWN = EXPERTS / RANKS;      // experts of a CTA
constexpr int TILES = (OWN + 15) / 16;    // of 16 of them

// r of 8 inputs; adds the sum of their squares.
__device__ __forceinline__ Eight add_residual(const u16* x, const u16* residual, float& square) {
  Eight values = *reinterpret_cast<const Eight*>(x);
  const Eight added = *reinterpret_cast<const Eight*>(residual);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values.pairs[i] = add_pairs(values.pairs[i], added.pairs[i]);
    square += low(values.pairs[i]) * low(values.pairs[i]) + high(values.pairs[i]) * high(values.pairs[i]);
  }
  return values;
}

// Grid: the CTAs of a cluster, clusters.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_and_route(const u16* x, const u16* residual, const u16* gain, const u16* router, u16* y, u16* new_residual, float* weights,
               int* experts, int num_tokens, int stride_x, int stride_residual, float eps, int top_k, int renormalize) {
  __shared__ Eight gains[HIDDEN / 8];
  __shared__ Eight normed[TOKENS == 1 ? HIDDEN / 8 : 1];
  __shared__ float squares[WARPS][TOKENS];
  __shared__ float parts[WARPS][TILES * 16][8];  // of the logits
  __shared__ float logits[EXPERTS];              // of the token that this CTA chooses for, and that all have come
  __shared__ u64 received;
  const int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int first_token = blockIdx.y * TOKENS, first_expert = rank * OWN, column = warp * 256 + q * 8;

  if (threadIdx.x == 0) {
    init_barrier(shared_address(&received), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_and_expect(shared_address(&received), EXPERTS * 4);
  }
  __syncwarp();
  arrive_at_cluster();
  let_next_start();
  Eight rows[TILES][2][VECTORS];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = tile * 16 + half * 8 + g;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        rows[tile][half][v] = own < OWN ? load_constant(router + (first_expert + own) * HIDDEN + column + 32 * v) : Eight{};
      }
    }
  }
  const Eight own_gains = load_constant(gain + threadIdx.x * 8);
  if (TOKENS > 1) gains[threadIdx.x] = own_gains;
  wait_for_previous();

  const bool is_there = TOKENS == 1 || first_token + g < num_tokens;
  const long long token = is_there && TOKENS > 1 ? first_token + g : first_token;
  const bool stores = is_there && warp % RANKS == rank;
  const u16 *own_x = x + token * stride_x, *own_residual = residual + token * stride_residual;
  const auto scale_of = [&](int of_token) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += squares[w][of_token];
    return rsqrtf(total / HIDDEN + eps);
  };
  float square = 0.0f;
  Eight values[VECTORS];
  if constexpr (TOKENS == 1) {  // a lane norms 8 inputs, and takes what others of its warp have normed
    const int own_column = threadIdx.x * 8;
    Eight own = add_residual(own_x + own_column, own_residual + own_column, square);
    if (stores) *reinterpret_cast<Eight*>(new_residual + token * HIDDEN + own_column) = own;
    square = add_lanes(square);
    if (lane == 0) squares[warp][0] = square;
    __syncthreads();
    norm(own, own_gains, scale_of(0));
    if (stores) *reinterpret_cast<Eight*>(y + token * HIDDEN + own_column) = own;
    normed[threadIdx.x] = own;
    __syncwarp();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) values[v] = normed[column / 8 + 4 * v];
  } else {  // a lane norms what it multiplies
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) values[v] = add_residual(own_x + column + 32 * v, own_residual + column + 32 * v, square);
    square += __shfl_xor_sync(ALL_LANES, square, 1);
    square += __shfl_xor_sync(ALL_LANES, square, 2);
    if (q == 0) squares[warp][g] = square;
    __syncthreads();
    const float scale = scale_of(g);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const long long place = token * HIDDEN + column + 32 * v;
      if (stores) *reinterpret_cast<Eight*>(new_residual + place) = values[v];
      norm(values[v], gains[column / 8 + 4 * v], scale);
      if (stores) *reinterpret_cast<Eight*>(y + place) = values[v];
    }
  }

  float sums[TILES][4] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const u32* inputs = values[v].pairs;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const u32 *first = rows[tile][0][v].pairs, *second = rows[tile][1][v].pairs;
      multiply(sums[tile], first[0], second[0], first[1], second[1], inputs[0], inputs[1]);
      multiply(sums[tile], first[2], second[2], first[3], second[3], inputs[2], inputs[3]);
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    *reinterpret_cast<float2*>(&parts[warp][tile * 16 + g][2 * q]) = make_float2(sums[tile][0], sums[tile][1]);
    *reinterpret_cast<float2*>(&parts[warp][tile * 16 + g + 8][2 * q]) = make_float2(sums[tile][2], sums[tile][3]);
  }
  __syncthreads();

  wait_for_cluster();  // all CTAs are there
  for (int i = threadIdx.x; i < OWN * TOKENS; i += THREADS) {
    const int own = i / TOKENS, receiver = i % TOKENS;
    if (first_token + receiver >= num_tokens) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[w][own][receiver];
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                     address_in_rank(shared_address(logits + first_expert + own), receiver)),
                 "f"(low(round_two(sum, 0.0f))), "r"(address_in_rank(shared_address(&received), receiver))
                 : "memory");
  }
  if (warp != 0 || rank >= TOKENS || first_token + rank >= num_tokens) return;
  wait_for_peers(shared_address(&received), 0);
  const long long chosen_for = first_token + rank;
  choose(logits, weights + chosen_for * top_k, experts + chosen_for * top_k, top_k, renormalize, lane);
}
