// Ranks of one model that meet in shared memory, to add up their numbers or to show them each other.
//
// Whoever makes the memory hands its descriptor to the others' processes. A meeting: each rank writes
// its numbers into its slot and says that it has come; once all have, each reads all slots. A slot is
// written again two meetings later, when everyone has come to the meeting between: so one wait each is
// enough. Ranks of one group trust each other: they are one engine.
//
// Nobody waits for ever. A rank whose process has ended or that does not come in time, one that asks
// for something else than the others, and a call of end() end the group for all, for good.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace duetto {

class GroupEnded : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The memory, mapped.
class Group {
public:
    static constexpr int kMostRanks = 64;

    // Makes it, all of it at once. Throws std::invalid_argument, std::system_error.
    static std::shared_ptr<Group> make(int ranks, int64_t slot_numbers, double timeout_s);
    // Maps what another process made. The descriptor stays the caller's.
    static std::shared_ptr<Group> open(int descriptor);
    ~Group();
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    int descriptor() const { return descriptor_; }
    int ranks() const { return ranks_; }
    int64_t slot_numbers() const { return slot_numbers_; }
    // Ends it for all. Whoever waits is woken.
    void end() noexcept;
    bool has_ended() const noexcept;
    std::string why_ended() const;  // "" if it has not

private:
    friend class Member;
    struct Head;
    enum class Why : uint32_t { asked = 1, late, gone, unlike };

    Group(int descriptor, void* memory, size_t num_bytes);
    void end(Why why, int rank) noexcept;

    const int descriptor_;
    Head* const head_;
    const size_t num_bytes_;
    int ranks_ = 0;  // copies: what is mapped may be written by others
    int64_t slot_numbers_ = 0;
    double timeout_s_ = 0;
    float* slots_ = nullptr;
};

// One rank of a group. All threads of the rank may call arrive, wait and slot; the rest is for one.
class Member {
public:
    // Throws std::invalid_argument if there is no such rank, or somebody has joined as it.
    Member(std::shared_ptr<Group> group, int rank);

    Group& group() const { return *group_; }
    std::shared_ptr<Group> shared() const { return group_; }
    int rank() const { return rank_; }
    int ranks() const { return group_->ranks_; }
    int64_t slot_numbers() const { return group_->slot_numbers_; }

    // Meetings are numbered, and the number of the next one is kept here between steps.
    uint32_t round() const { return round_; }
    void set_round(uint32_t round) { round_ = round; }

    float* slot(uint32_t round, int rank) const;  // slot_numbers() floats
    // This rank's slot is written. `question` is what it came for: all must have come for the same.
    void arrive(uint32_t round, uint64_t question) noexcept;
    // Until all have come, this rank too. False: the group has ended.
    bool wait(uint32_t round, uint64_t question) noexcept;

    // x = the sum of all ranks' x, in the order of ranks, in fp32. Throws GroupEnded.
    void sum(float* x, int64_t count);
    // out [ranks][count] = all ranks' x. Throws GroupEnded.
    void gather(const float* x, int64_t count, float* out);

private:
    bool wait_for(int rank, uint32_t round) noexcept;
    template <class Read>
    void exchange(const float* x, int64_t count, uint64_t kind, Read read);

    const std::shared_ptr<Group> group_;
    const int rank_;
    uint32_t round_ = 0;
};

// What ranks come to a meeting for, in a number.
inline uint64_t meeting_for(uint64_t kind, int64_t rows, int64_t columns) {
    return kind << 62 | static_cast<uint64_t>(rows) << 31 | static_cast<uint64_t>(columns);
}
inline constexpr uint64_t kToSum = 1, kToGather = 2;

}  // namespace duetto
