// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter =
// element index / 4, key = seed. The same numbers on every backend, so a dropout mask is
// recomputed, never stored.
#pragma once
#include "types.h"

namespace fastpeft {

struct Philox4 {
  uint32_t v[4];
};

FASTPEFT_HD Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is dropped when its 32 random bits are below this; p in [0, 1).
FASTPEFT_HD uint32_t drop_threshold(float p) {
  return uint32_t(double(p) * 4294967296.0);
}

}  // namespace fastpeft
