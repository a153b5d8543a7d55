// Sums of a tile whose reduction the 2, 3 or 4 blocks of a cluster share, 128 rows x kTokens in the
// registers of warpgroups 1 and 2. Of four pieces of the tokens a block owns some: it leaves the
// pieces of others in its shared memory and adds what the others left for it, in their order, so
// the bits are the same on every run.
#pragma once
#include "sm90.cuh"

namespace fastpeft::cuda {

// Cluster rank of a block, and how many share its tile (1: nobody does).
struct Sharing {
  int rank = 0, sharers = 1;
  FASTPEFT_DEVICE bool owns(int piece) const { return sharers == 1 || piece * sharers / 4 == rank; }
};

// `base`: kTokens * 512 bytes of shared memory that the consumers are done with; `ready`: a barrier
// of 8 * (sharers - 1) arrivals, used once.
template <int kTokens>
FASTPEFT_DEVICE void exchange_pieces(float (&acc)[kTokens / 2], uint32_t base, uint32_t ready,
                                     const Sharing& sharing) {
  constexpr int kSums = kTokens / 8, kQuads = kSums / 4, kQuadBytes = 256 * 16;
  const uint32_t mine = base + (threadIdx.x - 128) * 16;
  named_barrier(3, 256);  // both warpgroups are done with `base`
#pragma unroll
  for (int piece = 0; piece < 4; piece++) {
    if (sharing.owns(piece)) continue;
#pragma unroll
    for (int i = 0; i < kQuads; i++) {
      const float* v = acc + piece * kSums + 4 * i;
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(mine + (piece * kQuads + i) *
                                                                               kQuadBytes),
                   "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                   : "memory");
    }
  }
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  const int lane = threadIdx.x & 31;
  if (lane < sharing.sharers && lane != sharing.rank)
    barrier_arrive_cluster(cluster_address(ready, lane));
  barrier_wait_cluster(ready, 0);
#pragma unroll
  for (int piece = 0; piece < 4; piece++) {
    if (!sharing.owns(piece)) continue;
#pragma unroll
    for (int i = 0; i < kQuads; i++) {
      float* const v = acc + piece * kSums + 4 * i;
      float sum[4] = {};
      for (int from = 0; from < sharing.sharers; from++) {
        float4 got = make_float4(v[0], v[1], v[2], v[3]);
        if (from != sharing.rank)
          got = load_cluster(
              cluster_address(mine + (piece * kQuads + i) * kQuadBytes, uint32_t(from)));
        sum[0] += got.x, sum[1] += got.y, sum[2] += got.z, sum[3] += got.w;
      }
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] = sum[e];
    }
  }
}

}  // namespace fastpeft::cuda
