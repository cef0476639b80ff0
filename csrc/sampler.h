// Gumbel-max: the token with the largest score, logit / temperature + noise(key, token id), among
// equals the lowest id. The noise is a function of key and id alone, so a draw does not depend on the
// order or the number of candidates. The twin is src/duetto/runner/gumbel.py: the same arithmetic,
// operation by operation, in doubles that are rounded once each, so the same token always.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace duetto {

// -log(-log(u)), u = (hash + 1/2) / 2^32; between -3.14 and 22.88.
double gumbel_noise(uint64_t key, uint32_t token_id);

// From logits, whose largest is row[best]; -inf is never drawn. Temperature > 0.
int64_t draw_row(const Kernels& kernels, const float* row, int64_t size, int64_t best,
                 double temperature, uint64_t key);

// From (logit - largest logit) / temperature of some tokens, by ascending id; ids nullptr: 0, 1, ...
// One of them at least is 0. Returns the token's id.
int64_t draw_scaled(const double* scaled, const int64_t* ids, int64_t count, uint64_t key);

}  // namespace duetto
