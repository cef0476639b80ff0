// From logits to a token: which tokens may be drawn, and the draw.
//
// Gumbel-max: the token with the largest score, logit / temperature + noise(key, token id), among
// equals the lowest id. The noise is a function of key and id alone, so a draw does not depend on the
// order or the number of candidates. The twin is src/duetto/runner/gumbel.py: the same arithmetic,
// operation by operation, in doubles that are rounded once each, so the same token always.
//
// Candidates: the twin is src/duetto/runner/candidates.py. Tokens are ranked by logit, equal ones by id.
// top_k, min_p and top_p each keep the first of this order. So whether a token is kept depends on what
// is ahead of it alone: nothing is sorted. The token is drawn from all first; if too much is ahead of
// it, it is drawn again from what is ahead, until it is one that may be drawn.
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

// A token among others: ahead of those with a smaller logit, and of equal ones with a higher id.
struct Ranked {
    double logit;
    int64_t id;
    bool is_ahead_of(const Ranked& other) const {
        return logit > other.logit || (logit == other.logit && id < other.id);
    }
};

// Logits of a vocabulary. Those that the request changed are doubles in a list, and -inf in the row.
struct Logits {
    const float* row;
    int64_t size;  // at most kMostWeighed
    const Ranked* changed;  // in any order
    int64_t num_changed;
    Ranked first;  // of all: finite
};

struct Filters {
    double temperature;  // > 0
    int64_t top_k;  // 0: all
    double lowest;  // the least logit that min_p keeps; -inf: all
    double top_p;  // 1: all
};

// The token that the filters leave and that has the largest score.
int64_t draw_filtered(const Kernels& kernels, const Logits& logits, const Filters& filters,
                      uint64_t key);

// First word of Philox4x64-10 (Salmon et al., SC 2011) of the counter (counter, 0, 0, 0).
uint64_t philox(uint64_t counter, uint64_t key_low, uint64_t key_high);

}  // namespace duetto
