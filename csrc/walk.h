// One thread's way through a plan's list: what it does of each operation, and where it waits.
//
// Work is shared out by rows (each thread has its own, the same ones in every operation: nothing to
// wait for between two of these), by outputs (linear), by items (attention), or by pieces (of what
// ranks exchange).
#pragma once

#include <chrono>
#include <cstdint>

#include "plan.h"

namespace duetto {

class Walk {
public:
    using Clock = std::chrono::steady_clock;

    Walk(Plan& plan, const StepInput& input, const KvArena* kv, int thread);

    void all();

    static size_t scratch_row_bytes(int64_t k);  // of one fp32 row before it is prepared

private:
    struct Rows {
        int64_t begin, end;
        int64_t count() const { return end - begin; }
    };

    bool waits_between(const Op& op, const Op& next) const;
    bool ends_by_rows(const Op& op) const;
    bool begins_by_rows(const Op& op) const;
    Rows mine(int64_t rows) const;
    float* row(const Ref& ref, int64_t row) const {
        return plan_.at(ref) + row * plan_.leading(ref);
    }

    void make_rope_tables();
    void run(const Embed& op, size_t place, int64_t rows);
    void run(const RmsNorm& op, size_t place, int64_t rows);
    void run(const Linear& op, size_t place, int64_t rows);
    void run(const Rope& op, size_t place, int64_t rows);
    void run(const WriteKv& op, size_t place, int64_t rows);
    void run(const Attention& op, size_t place, int64_t rows);
    void run(const GatedAct& op, size_t place, int64_t rows);
    void run(const Add& op, size_t place, int64_t rows);
    void run(const SelectRows& op, size_t place, int64_t rows);
    void run(const SoftCap& op, size_t place, int64_t rows);
    void run(const AllReduce& op, size_t place, int64_t rows);
    void run(const AllGather& op, size_t place, int64_t rows);

    // Rows and columns of what ranks exchange.
    struct Piece {
        Rows rows, columns;
    };
    template <class Exchange>
    void in_pieces(int64_t rows, int64_t columns, Exchange exchange);
    Piece mine(const Piece& piece) const;
    void copy(const Piece& part, const float* from, int64_t ldx, float* to, int64_t ldo) const;
    bool meet(size_t place, uint64_t question);

    void look(const Attention& op, const AttentionArgs& args, int64_t item);
    void prepare(const Linear& op, Rows rows, uint8_t* prepared);
    void multiply(const Linear& op, const uint8_t* prepared, Rows rows, int64_t tile_begin,
                  int64_t tile_end);
    void multiply_few(const Linear& op, const uint8_t* prepared, int64_t rows, Counter& counter);
    void multiply_many(const Linear& op, const uint8_t* prepared, int64_t rows, Counter& counter);

    Plan& plan_;
    const Kernels& kernels_;
    const StepInput& input_;
    const KvArena* kv_;
    const int thread_, num_threads_;
    uint8_t* scratch_;
    uint32_t round_;  // of the next meeting with other ranks
};

}  // namespace duetto
