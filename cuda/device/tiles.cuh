// How the blocks of a tensor-core kernel go over their tiles: the ring of stages, the order of
// tiles, and the last, partly filled wave cut over clusters of two.
#pragma once
#include "sm90.cuh"

namespace fastpeft::cuda {

// Position in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase;
  FASTPEFT_DEVICE explicit Ring(uint32_t first_phase) : phase(first_phase) {}
  FASTPEFT_DEVICE void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

struct TilePlace {
  int row, token;
};

// Tile `index` of tiles_r x tiles_t: row tiles in groups of kGroup, tokens outside them, so that
// neighbours in time share both operands in L2.
template <int kGroup>
FASTPEFT_DEVICE TilePlace tile_place(int index, int tiles_r, int tiles_t) {
  const int per = kGroup * tiles_t, group = index / per, within = index - group * per;
  const int width = min(kGroup, tiles_r - group * kGroup);
  const int token = width == kGroup ? within / kGroup : within / width;
  return {group * kGroup + within - token * width, token};
}

// One tile, or half of one tile's reduction.
struct Item {
  int row = 0, token = 0;  // tile coordinates
  int begin = 0, end = 0;  // k-blocks
  bool shared = false;     // the reduction is cut over the cluster
};

// Which items a block of a cluster of two works on: whole tiles; when the rest fills at most half
// of the blocks, the two of a cluster share a tile, each half of the reduction.
struct CutSchedule {
  static constexpr int kGroup = 16;
  int tiles_r, tiles_t, kblocks, blocks, block, full, rest;
  bool cut;

  FASTPEFT_DEVICE CutSchedule(int tiles_r, int tiles_t, int kblocks)
      : tiles_r(tiles_r), tiles_t(tiles_t), kblocks(kblocks), blocks(gridDim.x), block(blockIdx.x) {
    const int total = tiles_r * tiles_t;
    full = total / blocks * blocks;
    rest = total - full;
    cut = rest > 0 && 2 * rest <= blocks && kblocks >= 8;
  }
  FASTPEFT_DEVICE int count() const {
    const int last = cut ? block / 2 < rest : block < rest;
    return full / blocks + last;
  }
  FASTPEFT_DEVICE Item at(int i) const {
    Item item;
    item.shared = cut && i * blocks >= full;
    const int index = item.shared ? full + block / 2 : i * blocks + block;
    const TilePlace place = tile_place<kGroup>(index, tiles_r, tiles_t);
    item.token = place.token;
    item.row = place.row;
    const int half = kblocks / 2, second = block & 1;
    item.begin = item.shared && second ? half : 0;
    item.end = item.shared && !second ? half : kblocks;
    return item;
  }
};

// The same with pairs of row tiles: the two blocks of a cluster work on the same tokens, so each
// loads half of x and sends it to both; a tile of the cut wave is one block's of its pair. A pair's
// second row tile may lie outside the matrix.
struct PairSchedule {
  static constexpr int kGroup = 8;
  int pairs_r, tiles_t, kblocks, waves, clusters, cluster, rank, full, rest;
  bool cut;

  // waves: full ones, pairs / clusters; the host divides.
  FASTPEFT_DEVICE PairSchedule(int tiles_r, int tiles_t, int kblocks, int waves)
      : pairs_r((tiles_r + 1) / 2),
        tiles_t(tiles_t),
        kblocks(kblocks),
        waves(waves),
        clusters(gridDim.x / 2),
        cluster(blockIdx.x / 2),
        rank(blockIdx.x & 1),
        full(waves * clusters),
        rest(pairs_r * tiles_t - full),
        cut(rest > 0 && 2 * rest <= clusters && kblocks >= 8) {}
  FASTPEFT_DEVICE int count() const { return waves + (cut ? cluster / 2 < rest : cluster < rest); }
  FASTPEFT_DEVICE Item at(int i) const {
    Item item;
    item.shared = cut && i * clusters >= full;
    const int index = item.shared ? full + cluster / 2 : i * clusters + cluster;
    const TilePlace place = tile_place<kGroup>(index, pairs_r, tiles_t);
    item.token = place.token;
    item.row = place.row * 2 + (item.shared ? cluster & 1 : rank);
    const int half = kblocks / 2;
    item.begin = item.shared && rank ? half : 0;
    item.end = item.shared && !rank ? half : kblocks;
    return item;
  }
};

// The sums of a tile whose reduction two blocks share, for one warpgroup, through distributed
// shared memory: those of the other block's tokens go there, to `receive` (kTokens * 128 bytes),
// counted on the barrier `ready`; nothing is fenced and nothing is pulled.
template <int kTokens>
FASTPEFT_DEVICE void push_halves(float (&acc)[kTokens / 2], uint32_t receive, uint32_t ready,
                                 uint32_t half) {
  constexpr int kSent = kTokens / 16;  // float4 of a thread: half of the tokens
  const uint32_t mine = receive + (threadIdx.x & 127) * 16;
  const uint32_t to = cluster_address(mine, half ^ 1), bar = cluster_address(ready, half ^ 1);
  // Owned: accumulators [half * kTokens / 4, + kTokens / 4).
#pragma unroll
  for (int i = 0; i < kSent; i++) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = half ? acc[4 * i + e] : acc[kTokens / 4 + 4 * i + e];
    push_cluster(to + i * 2048, make_float4(v[0], v[1], v[2], v[3]), bar);
  }
  barrier_wait_cluster(ready, 0);
#pragma unroll
  for (int i = 0; i < kSent; i++) {
    const float4 v = load_shared_float4(mine + i * 2048);
    const float other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (half)
        acc[kTokens / 4 + 4 * i + e] += other[e];
      else
        acc[4 * i + e] += other[e];
    }
  }
}

}  // namespace fastpeft::cuda
