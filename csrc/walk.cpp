#include "walk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace duetto {

namespace {

constexpr int64_t kFewRows =
    8;       // up to here, weights are read from memory about as fast as multiplied
constexpr int64_t kAlone =
    16384;     // numbers that a thread rather prepares itself than waits for others
constexpr int64_t kStaticShare = 85;  // % of the tiles; the rest goes to whoever is done first
constexpr int64_t kRowChunk = 768;    // rows whose prepared form stays in the last cache
constexpr int64_t kLeastRowChunk = 96;
constexpr int64_t kChunksPerThread = 6;  // so that the last one to finish is not late by much

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_collective(const Op& op) {
    return std::holds_alternative<AllReduce>(op.what) || std::holds_alternative<AllGather>(op.what);
}

}  // namespace

// With few rows every thread makes all of them for itself: that takes as long as a barrier.
bool Plan::prepares_alone(const Linear& op, int64_t rows) const {
    if (pool_.num_threads() == 1) return rows <= kFewRows;
    return rows <= kFewRows && (rows == 1 || rows * op.x.width <= kAlone);
}

size_t Walk::scratch_row_bytes(int64_t k) { return ceil_div(k * sizeof(float), 64) * 64; }

Walk::Walk(Plan& plan, const StepInput& input, const KvArena* kv, int thread)
    : plan_(plan),
      kernels_(plan.kernels_),
      input_(input),
      kv_(kv),
      thread_(thread),
      num_threads_(plan.pool_.num_threads()),
      scratch_(plan.scratch_.data() + thread * plan.scratch_bytes_),
      round_(plan.group_ == nullptr ? 0 : plan.group_->round()) {}

// Where all threads are waited for after an operation, the waiting is that operation's time.
void Walk::all() {
    make_rope_tables();
    auto last = Clock::now();
    const std::vector<Op>& ops = plan_.ops_;
    const size_t end = std::min<size_t>(ops.size(), input_.num_ops);
    int64_t written = 0, told = 0;  // layers' KV: by this thread; surely by all
    for (size_t place = 0; place < end; ++place) {
        const Op& op = ops[place];
        const int64_t rows = op.after_select ? plan_.selected_rows_ : plan_.rows_;
        if (rows > 0) std::visit([&](const auto& what) { run(what, place, rows); }, op.what);
        const auto* kv = std::get_if<WriteKv>(&op.what);
        if (kv != nullptr && kv->layer == written) ++written;
        const bool waited = place + 1 == end || waits_between(op, ops[place + 1]);
        if (waited) plan_.pool_.barrier();
        if (thread_ == 0 && waited && told != written)
            plan_.layers_done_.fetch_add(written - std::exchange(told, written));
        if (thread_ == 0) {
            const auto now = Clock::now();
            plan_.times_[place] = std::chrono::duration<double>(now - last).count();
            last = now;
        }
        // Only collectives fail, and all threads have been waited for behind one: each leaves here.
        if (plan_.failed_at_.load(std::memory_order_relaxed) <= static_cast<int64_t>(place)) return;
    }
    if (thread_ == 0 && plan_.group_ != nullptr) plan_.group_->set_round(round_);
}

bool Walk::waits_between(const Op& op, const Op& next) const {
    return !ends_by_rows(op) || !begins_by_rows(next) || op.after_select != next.after_select;
}

bool Walk::ends_by_rows(const Op& op) const {
    return !std::holds_alternative<Linear>(op.what) &&
           !std::holds_alternative<Attention>(op.what) && !is_collective(op);
}

// SelectRows reads the rows of others.
bool Walk::begins_by_rows(const Op& op) const {
    if (const auto* linear = std::get_if<Linear>(&op.what))
        return !plan_.prepares_alone(*linear, op.after_select ? plan_.selected_rows_ : plan_.rows_);
    return !std::holds_alternative<Attention>(op.what) &&
           !std::holds_alternative<SelectRows>(op.what) && !is_collective(op);
}

// Thread 0 has the most: it is awake, and a single row is its.
Walk::Rows Walk::mine(int64_t rows) const {
    return {ceil_div(rows * thread_, num_threads_), ceil_div(rows * (thread_ + 1), num_threads_)};
}

// Angles are rounded to fp32 before their cosine is taken in double, as in backends/reference.
void Walk::make_rope_tables() {
    const Rows rows = mine(plan_.rows_);
    for (RopeSpec& rope : plan_.ropes_) {
        const size_t half = rope.inv_freq.size();
        for (int64_t t = rows.begin; t < rows.end; ++t) {
            const auto position = static_cast<float>(input_.view.positions[t]);
            for (size_t i = 0; i < half; ++i) {
                const double angle = position * rope.inv_freq[i];
                rope.cos[t * half + i] = static_cast<float>(std::cos(angle) * rope.scale);
                rope.sin[t * half + i] = static_cast<float>(std::sin(angle) * rope.scale);
            }
        }
    }
}

// -- by rows ------------------------------------------------------------------------------------------

void Walk::run(const Embed& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    for (int64_t t = part.begin; t < part.end; ++t) {
        const int64_t token = input_.token_ids[t] - op.first;
        if (token >= 0 && token < op.weight.n)
            kernels_.unpack_row(&op.weight, token, row(op.out, t));
        else  // another rank's
            std::memset(row(op.out, t), 0, op.out.width * sizeof(float));
    }
    if (op.scale != 1.0f)
        kernels_.scale(row(op.out, part.begin), plan_.leading(op.out), part.count(), op.out.width,
                       op.scale);
}

void Walk::run(const RmsNorm& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    kernels_.rms_norm(row(op.x, part.begin), plan_.leading(op.x), row(op.out, part.begin),
                      plan_.leading(op.out), part.count(), op.x.width, op.group, op.norm.weight,
                      op.norm.offset, op.norm.eps);
}

void Walk::run(const Rope& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    const RopeSpec& spec = plan_.ropes_[op.spec];
    const auto half = static_cast<int64_t>(spec.inv_freq.size());
    kernels_.rope(row(op.x, part.begin), plan_.leading(op.x), part.count(),
                  op.x.width / op.head_dim, op.head_dim, 2 * half,
                  spec.cos.data() + part.begin * half, spec.sin.data() + part.begin * half);
}

void Walk::run(const WriteKv& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    kernels_.write_kv(&kv_->layers()[op.layer], input_.view.slots, plan_.at(op.k), plan_.at(op.v),
                      plan_.leading(op.k), part.begin, part.end);
}

void Walk::run(const GatedAct& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    kernels_.gated_act(row(op.x, part.begin), plan_.leading(op.x), row(op.out, part.begin),
                       plan_.leading(op.out), part.count(), op.out.width, op.kind);
}

void Walk::run(const Add& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    kernels_.add(row(op.x, part.begin), plan_.leading(op.x), row(op.y, part.begin),
                 plan_.leading(op.y), row(op.out, part.begin), plan_.leading(op.out), part.count(),
                 op.out.width);
}

void Walk::run(const SelectRows& op, size_t, int64_t) {
    const Rows part = mine(plan_.selected_rows_);
    for (int64_t i = part.begin; i < part.end; ++i)
        std::memcpy(row(op.out, i), row(op.x, input_.logit_rows[i]), op.out.width * sizeof(float));
}

void Walk::run(const SoftCap& op, size_t, int64_t rows) {
    const Rows part = mine(rows);
    kernels_.soft_cap(row(op.x, part.begin), plan_.leading(op.x), part.count(), op.x.width, op.cap);
}

// -- by outputs ---------------------------------------------------------------------------------------

void Walk::run(const Linear& op, size_t place, int64_t rows) {
    const size_t row_bytes = scratch_row_bytes(op.weight.k);
    const bool alone = plan_.prepares_alone(op, rows);
    uint8_t* prepared = alone ? scratch_ + row_bytes : plan_.prepared_.data();
    prepare(op, alone ? Rows{0, rows} : mine(rows), prepared);
    if (!alone) plan_.pool_.barrier();
    Counter& counter = plan_.counters_[place];
    if (rows <= kFewRows)
        multiply_few(op, prepared, rows, counter);
    else
        multiply_many(op, prepared, rows, counter);
}

void Walk::prepare(const Linear& op, Rows rows, uint8_t* prepared) {
    const int64_t k = op.weight.k;
    if (!op.norm && !op.gated_act) {
        kernels_.prepare_rows(&op.weight, row(op.x, rows.begin), plan_.leading(op.x), rows.count(),
                              prepared + rows.begin * op.row_bytes);
        return;
    }
    auto* made = reinterpret_cast<float*>(scratch_);  // stays in the first cache
    for (int64_t t = rows.begin; t < rows.end; ++t) {
        if (op.norm)
            kernels_.rms_norm(row(op.x, t), k, made, k, 1, k, k, op.norm->weight, op.norm->offset,
                              op.norm->eps);
        else
            kernels_.gated_act(row(op.x, t), 2 * k, made, k, 1, k, *op.gated_act);
        kernels_.prepare_rows(&op.weight, made, k, 1, prepared + t * op.row_bytes);
    }
}

void Walk::multiply(const Linear& op, const uint8_t* prepared, Rows rows, int64_t tile_begin,
                    int64_t tile_end) {
    kernels_.linear(&op.weight, prepared + rows.begin * op.row_bytes, rows.count(), tile_begin,
                    tile_end, row(op.out, rows.begin), plan_.leading(op.out), op.bias,
                    op.accumulate);
}

// Bound by memory: each thread reads one run of tiles, and the last ones go to whoever is done first,
// because a processor that the system or another guest takes away for a while must not hold up the rest.
void Walk::multiply_few(const Linear& op, const uint8_t* prepared, int64_t rows, Counter& counter) {
    const int64_t tiles = num_tiles(op.weight.n);
    const int64_t share = num_threads_ == 1 ? tiles : tiles * kStaticShare / 100 / num_threads_;
    if (share > 0) multiply(op, prepared, {0, rows}, thread_ * share, (thread_ + 1) * share);
    const int64_t first = share * num_threads_;
    for (int64_t tile;
         (tile = first + counter.next.fetch_add(1, std::memory_order_relaxed)) < tiles;)
        multiply(op, prepared, {0, rows}, tile, tile + 1);
}

// Bound by arithmetic: chunks of rows times one tile, all rows of a tile one after the other so that a
// tile is read from memory once.
void Walk::multiply_many(const Linear& op, const uint8_t* prepared, int64_t rows,
                         Counter& counter) {
    const int64_t tiles = num_tiles(op.weight.n);
    int64_t chunk = kRowChunk;
    while (chunk > kLeastRowChunk &&
           tiles * ceil_div(rows, chunk) < kChunksPerThread * num_threads_)
        chunk /= 2;
    const int64_t row_chunks = ceil_div(rows, chunk), chunks = tiles * row_chunks;
    for (int64_t i; (i = counter.next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        const int64_t begin = i % row_chunks * chunk, tile = i / row_chunks;
        multiply(op, prepared, {begin, std::min(rows, begin + chunk)}, tile, tile + 1);
    }
}

// -- by items -----------------------------------------------------------------------------------------

void Walk::run(const Attention& op, size_t place, int64_t) {
    AttentionOrder& order = plan_.orders_[op.order];
    const AttentionArgs args = plan_.attention_args(op, *kv_);
    auto* partials = reinterpret_cast<float*>(plan_.partials_.data());
    const auto count = static_cast<int64_t>(order.items.size());
    // As program/looks.first_attending_layer has it.
    const bool is_late = op.layer >= static_cast<int64_t>(kv_->layers().size()) / 2;
    const int64_t looks =
        is_late ? static_cast<int64_t>(plan_.look_tiles_.size()) * op.num_kv_heads : 0;
    Counter& counter = plan_.counters_[place];
    for (int64_t item;
         (item = counter.next.fetch_add(1, std::memory_order_relaxed)) < count + looks;) {
        if (item >= count) {
            look(op, args, item - count);
            continue;
        }
        kernels_.attention(&args, &input_.view, &order.items[item], partials, scratch_);
        if (order.group_of[item] < 0) continue;
        const AttentionOrder::Group group = order.groups[order.group_of[item]];
        const int32_t done =
            1 + order.done[order.group_of[item]].fetch_add(1, std::memory_order_acq_rel);
        if (done % group.size == 0)  // the last one of this layer joins them
            kernels_.attention_merge(&args, &input_.view, &order.items[group.first], group.size,
                                     partials);
    }
}

// Sums are whole numbers, and each thread's own: nobody waits, and no order changes them.
void Walk::look(const Attention& op, const AttentionArgs& args, int64_t item) {
    const Plan::LookTile& tile = plan_.look_tiles_[item / op.num_kv_heads];
    LookItem part = tile.item;
    part.kv_head = static_cast<int32_t>(item % op.num_kv_heads);
    const size_t places = plan_.look_sums_.size() / num_threads_;
    kernels_.look(&args, &input_.view, &part,
                  plan_.look_sums_.data() + thread_ * places + tile.place, scratch_);
}

// -- by pieces ----------------------------------------------------------------------------------------

// As many rows as a slot has room for, or a part of the columns of one.
template <class Exchange>
void Walk::in_pieces(int64_t rows, int64_t columns, Exchange exchange) {
    const int64_t room = plan_.group_->slot_numbers(), wide = std::min(columns, room),
                  high = std::max<int64_t>(1, room / wide);
    for (int64_t left = 0; left < columns; left += wide)
        for (int64_t top = 0; top < rows; top += high, ++round_)
            if (!exchange(Piece{{top, std::min(rows, top + high)},
                                {left, std::min(columns, left + wide)}}))
                return;
}

Walk::Piece Walk::mine(const Piece& piece) const {
    if (piece.rows.count() >= num_threads_) {
        const Rows part = mine(piece.rows.count());
        return {{piece.rows.begin + part.begin, piece.rows.begin + part.end}, piece.columns};
    }
    const Rows lines = mine(ceil_div(piece.columns.count(), 16));
    const auto column = [&](int64_t line) {
        return std::min(piece.columns.begin + line * 16, piece.columns.end);
    };
    return {piece.rows, {column(lines.begin), column(lines.end)}};
}

void Walk::copy(const Piece& part, const float* from, int64_t ldx, float* to, int64_t ldo) const {
    for (int64_t t = 0; t < part.rows.count(); ++t)
        std::memcpy(to + t * ldo, from + t * ldx, part.columns.count() * sizeof(float));
}

// A rank has come when the last of its threads has.
bool Walk::meet(size_t place, uint64_t question) {
    Member& group = *plan_.group_;
    const int64_t come = 1 + plan_.counters_[place].next.fetch_add(1, std::memory_order_acq_rel);
    if (come % num_threads_ == 0) group.arrive(round_, question);
    const bool all = group.wait(round_, question);
    if (!all) plan_.failed_at_.store(static_cast<int64_t>(place), std::memory_order_relaxed);
    return all;
}

// Every rank adds up all of it: what each is spared by adding up a part, it would wait for once more.
void Walk::run(const AllReduce& op, size_t place, int64_t rows) {
    const Member& group = *plan_.group_;
    in_pieces(rows, op.x.width, [&](const Piece& piece) {
        const Piece part = mine(piece);
        const int64_t wide = piece.columns.count(), width = part.columns.count();
        const int64_t here =
            (part.rows.begin - piece.rows.begin) * wide + part.columns.begin - piece.columns.begin;
        const auto slot = [&](int rank) { return group.slot(round_, rank) + here; };
        const int64_t ldx = plan_.leading(op.x), count = part.rows.count();
        float* x = row(op.x, part.rows.begin) + part.columns.begin;
        copy(part, x, ldx, slot(group.rank()), wide);
        if (!meet(place, meeting_for(kToSum, piece.rows.count(), wide))) return false;
        kernels_.add(slot(0), wide, slot(1), wide, x, ldx, count, width);
        for (int rank = 2; rank < group.ranks(); ++rank)
            kernels_.add(x, ldx, slot(rank), wide, x, ldx, count, width);
        return true;
    });
}

// Pieces are of the widest rank's columns; the others have fewer in some.
void Walk::run(const AllGather& op, size_t place, int64_t rows) {
    const Member& group = *plan_.group_;
    const int64_t ldo = plan_.leading(op.out);
    in_pieces(rows, op.widest, [&](const Piece& piece) {
        const int64_t wide = piece.columns.count();
        const auto exchange = [&](int rank, bool brings) {
            Piece own = piece;
            const int64_t width = op.starts[rank + 1] - op.starts[rank];
            own.columns.end = std::min(own.columns.end, width);
            if (own.columns.count() <= 0) return;
            const Piece part = mine(own);
            float* slot = group.slot(round_, rank) + (part.rows.begin - piece.rows.begin) * wide +
                          part.columns.begin - piece.columns.begin;
            float* out = row(op.out, part.rows.begin) + op.starts[rank] + part.columns.begin;
            if (brings)
                copy(part, out, ldo, slot, wide);
            else
                copy(part, slot, wide, out, ldo);
        };
        exchange(group.rank(), true);
        if (!meet(place, meeting_for(kToGather, piece.rows.count(), wide))) return false;
        for (int rank = 0; rank < group.ranks(); ++rank)
            if (rank != group.rank()) exchange(rank, false);
        return true;
    });
}

}  // namespace duetto
