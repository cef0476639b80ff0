// A model as a flat list of operations over buffers, and the call that runs one step through it.
//
// Building checks every width, and run checks every number of a step, before any thread starts: what
// walks the list afterwards (walk.cpp) trusts it. Knows no Python; whoever builds a plan keeps weights
// alive. All errors are std::invalid_argument, but for GroupEnded where ranks meet (group.h).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "arena.h"
#include "attention_order.h"
#include "group.h"
#include "kernels.h"
#include "kv_arena.h"
#include "pool.h"

namespace duetto {

// Columns [start, start + width) of a buffer of T (or, after SelectRows, of the selected) rows.
struct Ref {
    int64_t buffer, start, width;
};

struct Norm {  // of whole rows
    const float* weight;
    float eps, offset;
};

struct Embed {
    Ref out;
    PackedWeight weight;  // of the tokens from `first` on; others become zeros
    float scale;
    int64_t first;
};
struct RmsNorm {
    Ref x, out;
    Norm norm;
    int64_t group;
};
struct Linear {
    Ref x, out;
    PackedWeight weight;
    const float* bias;  // [n], or nullptr
    bool accumulate;
    std::optional<Norm> norm;  // of x, first
    std::optional<Activation> gated_act;  // x is then gate and up, each k wide
    int64_t row_bytes;  // of a prepared row
};
struct Rope {
    Ref x;
    int64_t head_dim, spec;
};
struct WriteKv {
    Ref k, v;
    int64_t layer;
};
struct Attention {
    Ref q, out;
    int64_t layer;
    int32_t num_heads, num_kv_heads, head_dim;
    float scale;
    int32_t window;
    float softcap;
    size_t order;  // which of the plan's AttentionOrders
};
struct GatedAct {
    Ref x, out;
    Activation kind;
};
struct Add {
    Ref x, y, out;
};
struct SelectRows {
    Ref x, out;
};
struct SoftCap {
    Ref x;
    float cap;
};

struct AllReduce {
    Ref x;
};
struct AllGather {
    Ref out;
    std::vector<int64_t> starts;  // of each rank's columns in `out`, and where the last ones end
    int64_t widest;
};

struct Op {
    std::variant<Embed, RmsNorm, Linear, Rope, WriteKv, Attention, GatedAct, Add, SelectRows,
                 SoftCap, AllReduce, AllGather>
        what;
    bool after_select;  // works on the selected rows
};

struct RopeSpec {
    std::vector<float> inv_freq;
    double scale;  // of cosine and sine
    std::vector<float> cos, sin;  // [T, rotary_dim / 2], of this step
};

struct Buffer {
    int64_t width;
    bool all_rows = false;  // some operation before SelectRows touches it
    int64_t leading = 0;  // floats from row to row
    int64_t capacity = 0;  // rows
    std::shared_ptr<Arena> memory;
};

struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
};

// Whose attention a step tells: that of requests first ... last (which may be runs of one, over the
// same blocks), to positions begin ... end. It has end - begin + 1 places in `looked`: the sums, then
// how many rows and heads had weights that are no numbers (Kernels::look).
struct Look {
    int32_t first, last, begin, end;
};

// One step's arrays, as they came.
struct StepInput {
    StepView view;
    const int32_t* token_ids;  // [T]
    const int32_t* logit_rows;
    int64_t num_logit_rows;
    int64_t num_ops = INT64_MAX;  // operations behind that many are left out
    const Look* looks = nullptr;
    int64_t num_looks = 0;
    int64_t* looked = nullptr;  // of all looks, one after the other
};

struct Result {
    std::shared_ptr<Arena> memory;  // later runs write elsewhere for as long as somebody holds it
    const float* data;
    int64_t rows, width, leading;
};

class Plan {
public:
    // `group`: this plan is one rank's; its operations AllReduce and AllGather meet the others'.
    Plan(Pool& pool, const Kernels& kernels, Member* group = nullptr)
        : pool_(pool), kernels_(kernels), group_(group) {}

    // Each returns the number of what was added.
    int64_t buffer(int64_t width);
    int64_t rope_spec(std::vector<float> inv_freq, double scale);
    // The weight is that of tokens `first` and beyond, of a vocabulary of so many.
    int64_t embed(Ref out, const PackedWeight& weight, float scale, int64_t first,
                  int64_t vocabulary);
    int64_t rms_norm(Ref x, Ref out, Norm norm, int64_t group);
    int64_t linear(Ref x, Ref out, const PackedWeight& weight, const float* bias, bool accumulate,
                   std::optional<Norm> norm, std::optional<Activation> gated_act);
    int64_t rope(Ref x, int64_t head_dim, int64_t spec);
    int64_t write_kv(Ref k, Ref v, int64_t layer);
    int64_t attention(Attention op);
    int64_t gated_act(Ref x, Ref out, Activation kind);
    int64_t add(Ref x, Ref y, Ref out);
    int64_t select_rows(Ref x, Ref out);
    int64_t soft_cap(Ref x, float cap);
    int64_t all_reduce(Ref x);
    // starts: ranks + 1 of them, rising, counted from out's first column.
    int64_t all_gather(Ref out, std::vector<int64_t> starts);

    // kv may be nullptr if no operation needs it. After GroupEnded nothing of the step's is to be
    // used, its KV neither.
    Result run(const StepInput& input, const KvArena* kv, Ref result);
    std::vector<double> times()
        const;  // seconds of each operation, then of everything outside them

    // How many steps have begun, and how many layers, from the first on, have all of the last one's
    // KV. Any thread may ask while it runs; who sees a layer done sees its KV.
    std::pair<int64_t, int64_t> layers_done() const;

    void write(Ref ref, const float* values, int64_t rows);
    std::vector<float> read(Ref ref, int64_t* rows) const;

    const Kernels& kernels() const { return kernels_; }
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }
    int64_t num_bytes() const;

private:
    friend class Walk;

    int64_t append(Op op);
    void check(const char* name, const Ref& ref) const;
    void use(const char* name, const Ref& ref);
    void check_step(const StepInput& input, const KvArena* kv) const;
    void check_kv(const StepInput& input, const KvArena* kv) const;
    void check_looks(const StepInput& input) const;
    void hold_rows(Buffer& buffer, int64_t rows);
    void let_go(Buffer& buffer);
    void make_room(const StepInput& input, const KvArena* kv);
    void cut_attention(const StepInput& input, const KvArena* kv);
    void cut_looks(const StepInput& input);
    void sum_looks(const StepInput& input);
    AttentionArgs attention_args(const Attention& op, const KvArena& kv) const;
    float* at(const Ref& ref) const;
    int64_t leading(const Ref& ref) const { return buffers_[ref.buffer].leading; }
    bool prepares_alone(const Linear& op, int64_t rows) const;

    Pool& pool_;
    const Kernels& kernels_;
    Member* const group_;
    std::vector<Op> ops_;
    std::vector<Buffer> buffers_;
    std::vector<RopeSpec> ropes_;
    std::vector<AttentionOrder> orders_;
    int64_t smallest_vocabulary_ = INT64_MAX;
    bool selected_ = false, uses_kv_ = false;

    // of a step
    mutable std::mutex turn_;
    int64_t rows_ = 0, selected_rows_ = 0;
    std::vector<Counter> counters_;  // one per operation
    std::atomic<int64_t> failed_at_{INT64_MAX};  // the operation at which the group had ended
    Arena prepared_;  // rows for a linear operation, made together
    Arena partials_;  // of attention
    Arena scratch_;  // [thread][scratch_bytes_]
    size_t scratch_bytes_ = 0;
    struct LookTile {  // a part of a look, for each KV head
        LookItem item;
        int64_t place;  // of its look in `looked`
    };
    std::vector<LookTile> look_tiles_;  // none in most steps
    std::vector<int64_t> look_sums_;  // [thread][all looks' places]
    std::vector<double> times_;
    std::atomic<uint64_t> layers_done_{0};  // steps that have begun << 32 | layers of the last one
};

}  // namespace duetto
