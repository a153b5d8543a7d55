// PTX bricks of Hopper: barriers in shared memory, TMA, wgmma fences, cluster access.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define FASTPEFT_DEVICE __device__ __forceinline__

namespace fastpeft::cuda {

FASTPEFT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory
FASTPEFT_DEVICE void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
FASTPEFT_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTPEFT_DEVICE void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
FASTPEFT_DEVICE void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// On a barrier of the neighbour, publishing this thread's writes to the cluster. Costs a full
// fence: never in a main loop.
FASTPEFT_DEVICE void barrier_arrive_cluster(uint32_t bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar)
               : "memory");
}
// On a barrier of the neighbour, without publishing anything: reads of shared memory are over.
FASTPEFT_DEVICE void barrier_arrive_peer(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
FASTPEFT_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\n"
      "bra W;\nD:\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
FASTPEFT_DEVICE void barrier_wait_cluster(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D;\nbra W;\nD:\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// Of a named barrier of `threads`, without waiting.
FASTPEFT_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTPEFT_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in one lane of a converged warp; the compiler then knows that the branch is taken by one
// thread, which keeps TMA's operands in uniform registers.
FASTPEFT_DEVICE bool elect_one() {
  uint32_t is_elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(is_elected));
  return is_elected != 0;
}

// ---- cluster
FASTPEFT_DEVICE uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
FASTPEFT_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
FASTPEFT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Publishes nothing, and so costs no fence.
FASTPEFT_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
FASTPEFT_DEVICE void cluster_sync_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Stores into another block's shared memory and counts the bytes on its barrier: published to
// whoever waits for that.
FASTPEFT_DEVICE void push_cluster(uint32_t to, const float4& v, uint32_t bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar)
      : "memory");
}
FASTPEFT_DEVICE float4 load_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// ---- TMA
FASTPEFT_DEVICE void tma_load_2d(uint32_t to, const CUtensorMap* map, uint32_t bar, int c0,
                                 int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(c0), "r"(c1)
      : "memory");
}
constexpr uint16_t kBoth = 3;  // mask of a cluster of two

// To the same place in every block of the cluster that `mask` names, counted on each one's barrier.
FASTPEFT_DEVICE void tma_multicast_2d(uint32_t to, const CUtensorMap* map, uint32_t bar, int c0,
                                      int c1, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"(mask)
      : "memory");
}
FASTPEFT_DEVICE void tma_load_3d(uint32_t to, const CUtensorMap* map, uint32_t bar, int c0, int c1,
                                 int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
FASTPEFT_DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(from), "r"(c0), "r"(c1)
      : "memory");
}
FASTPEFT_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
FASTPEFT_DEVICE void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
FASTPEFT_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
FASTPEFT_DEVICE void store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
FASTPEFT_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma
FASTPEFT_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FASTPEFT_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kInFlight>
FASTPEFT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}
// B descriptor: K-major tile, 128-byte swizzle, groups of 8 rows 1024 bytes apart.
FASTPEFT_DEVICE uint64_t swizzled_descriptor(uint32_t address) {
  return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (uint64_t(1) << 16) | (address >> 4);
}

// ---- small integer bricks
FASTPEFT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
FASTPEFT_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
FASTPEFT_DEVICE uint32_t mul_fp16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
FASTPEFT_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
FASTPEFT_DEVICE uint32_t load_shared_u32(uint32_t a) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(a));
  return r;
}
FASTPEFT_DEVICE void load_shared_u32x4(uint32_t from, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from));
}
FASTPEFT_DEVICE float4 load_shared_float4(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
template <bool kTransposed>
FASTPEFT_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t a) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
}

// Four 8x8 matrices of 16-bit units, transposed: lane L names the row of 8 units of matrix L / 8.
FASTPEFT_DEVICE void store_matrices_transposed(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Values that ptxas cannot rematerialise: without them it rebuilds each table word and lane offset
// in the main loop (215 against 150 instructions a k-block). A constant hides behind the lane
// number, or ptxas folds the shuffle; and it is not broadcast from one lane, or ptxas keeps it in a
// uniform register and copies it before every use.
FASTPEFT_DEVICE uint32_t opaque(uint32_t v) {
  return __shfl_sync(0xffffffffu, v, threadIdx.x & 31);
}
FASTPEFT_DEVICE uint32_t opaque_constant(uint32_t v) {
  const uint32_t lane = threadIdx.x & 31;
  return __shfl_sync(0xffffffffu, v ^ lane, lane) ^ lane;
}

}  // namespace fastpeft::cuda
