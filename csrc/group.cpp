#include "group.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <thread>

#include "refuse.h"
#include "spin.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace duetto {

namespace {

using Clock = std::chrono::steady_clock;
using std::to_string;

constexpr uint64_t kMagic = 0x31706f7267747564;
constexpr size_t kPage = 4096;
constexpr int64_t kMostSlotNumbers = int64_t{1} << 28;
constexpr auto kSleep = std::chrono::milliseconds(50);  // then who is missing is looked for

// A rank's own line, which the others read, and one that those who sleep write.
struct alignas(64) Place {
    std::atomic<uint32_t> come{0};  // meetings that it has come to
    std::atomic<int32_t> process{0};  // 0: nobody has joined as this rank
    std::atomic<uint64_t> question[2]{};  // of the last two meetings
    alignas(64) std::atomic<uint32_t> sleepers{0};
};
static_assert(std::atomic<uint32_t>::is_always_lock_free &&
              std::atomic<uint64_t>::is_always_lock_free);

#if defined(__linux__)

// std::atomic's own waiting wakes threads of one process only.
void sleep_while(std::atomic<uint32_t>& number, uint32_t old) {
    const timespec most{0, std::chrono::nanoseconds(kSleep).count()};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&number), FUTEX_WAIT, old, &most, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& number) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&number), FUTEX_WAKE, INT_MAX, nullptr, nullptr,
            0);
}

// Ended, whether or not its parent has asked how. Both processes see one table of processes.
bool is_gone(int32_t process) {
    if (kill(process, 0) != 0) return errno == ESRCH;
    char path[32], text[512] = {};
    std::snprintf(path, sizeof path, "/proc/%d/stat", process);
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) return false;
    const size_t size = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    text[size] = 0;
    const char* name_end = std::strrchr(text, ')');  // 123 (name) S ...
    return name_end != nullptr && (name_end[1] == ' ') &&
           (name_end[2] == 'Z' || name_end[2] == 'X');
}

int make_memory(size_t num_bytes) {
    const int descriptor = memfd_create("duetto-group", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor < 0) throw std::system_error(errno, std::generic_category(), "a group's memory");
    // All of it now: memory that is not there when it is written would end the process.
    int error = posix_fallocate(descriptor, 0, static_cast<off_t>(num_bytes));
    if (error == 0 && fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        error = errno;
    if (error != 0) {
        close(descriptor);
        throw std::system_error(error, std::generic_category(), "a group's memory");
    }
    return descriptor;
}

bool has_fixed_size(int descriptor) {
    const int seals = fcntl(descriptor, F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK);
}

#else

void sleep_while(std::atomic<uint32_t>&, uint32_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}
void wake_all(std::atomic<uint32_t>&) {}
bool is_gone(int32_t process) { return kill(process, 0) != 0 && errno == ESRCH; }
int make_memory(size_t) { refuse("ranks in shared memory need Linux"); }
bool has_fixed_size(int) { return false; }

#endif

}  // namespace

struct Group::Head {
    uint64_t magic;
    int64_t ranks, slot_numbers;
    double timeout_s;
    alignas(64) std::atomic<uint32_t> ended{0};  // why << 8 | rank
    Place places[kMostRanks];

    static size_t bytes() { return (sizeof(Head) + kPage - 1) / kPage * kPage; }
    static size_t all_bytes(int64_t ranks, int64_t slot_numbers) {
        return bytes() + 2 * ranks * slot_numbers * sizeof(float);
    }
};

namespace {

void* map_shared(int descriptor, size_t num_bytes) {
    void* memory =
        mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (memory == MAP_FAILED) {
        const int error = errno;
        close(descriptor);
        throw std::system_error(error, std::generic_category(), "a group's memory");
    }
    return memory;
}

}  // namespace

// -- the memory ---------------------------------------------------------------------------------------

Group::Group(int descriptor, void* memory, size_t num_bytes)
    : descriptor_(descriptor), head_(static_cast<Head*>(memory)), num_bytes_(num_bytes) {}

Group::~Group() {
    munmap(head_, num_bytes_);
    close(descriptor_);
}

std::shared_ptr<Group> Group::make(int ranks, int64_t slot_numbers, double timeout_s) {
    if (ranks < 2 || ranks > kMostRanks)
        refuse("a group has 2 to 64 ranks, not " + to_string(ranks));
    if (slot_numbers < 16 || slot_numbers > kMostSlotNumbers || slot_numbers % 16 != 0)
        refuse("slots of " + to_string(slot_numbers) +
               " numbers: must be 16 to 2^28, a multiple of 16");
    if (!(timeout_s > 0 && timeout_s < 1e6)) refuse("a group's timeout must be above 0 s");
    const size_t num_bytes = Head::all_bytes(ranks, slot_numbers);
    const int descriptor = make_memory(num_bytes);
    auto* head = new (map_shared(descriptor, num_bytes)) Head{};
    std::shared_ptr<Group> group(new Group(descriptor, head, num_bytes));
    head->magic = kMagic;
    head->ranks = group->ranks_ = ranks;
    head->slot_numbers = group->slot_numbers_ = slot_numbers;
    head->timeout_s = group->timeout_s_ = timeout_s;
    group->slots_ = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(head) + Head::bytes());
    return group;
}

std::shared_ptr<Group> Group::open(int descriptor) {
    struct stat status;
    if (fstat(descriptor, &status) != 0 || !has_fixed_size(descriptor) ||
        status.st_size < static_cast<off_t>(Head::bytes()))
        refuse("descriptor " + to_string(descriptor) + " is no group's memory");
    const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (own < 0) throw std::system_error(errno, std::generic_category(), "a group's memory");
    const auto num_bytes = static_cast<size_t>(status.st_size);
    std::shared_ptr<Group> group(new Group(own, map_shared(own, num_bytes), num_bytes));
    const Head& head = *group->head_;
    const int64_t ranks = head.ranks, numbers = head.slot_numbers;
    if (head.magic != kMagic || ranks < 2 || ranks > kMostRanks || numbers < 16 ||
        numbers > kMostSlotNumbers || num_bytes != Head::all_bytes(ranks, numbers))
        refuse("descriptor " + to_string(descriptor) +
               " is no group's memory, or another version's");
    group->ranks_ = static_cast<int>(ranks);
    group->slot_numbers_ = numbers;
    group->timeout_s_ = head.timeout_s;
    group->slots_ =
        reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(group->head_) + Head::bytes());
    return group;
}

void Group::end() noexcept { end(Why::asked, 0); }

void Group::end(Why why, int rank) noexcept {
    uint32_t none = 0;  // the first reason stays
    head_->ended.compare_exchange_strong(none, static_cast<uint32_t>(why) << 8 | rank);
    for (int each = 0; each < ranks_; ++each) wake_all(head_->places[each].come);
}

bool Group::has_ended() const noexcept { return head_->ended.load() != 0; }

std::string Group::why_ended() const {
    const uint32_t ended = head_->ended.load();
    const std::string rank = "rank " + to_string(ended & 255);
    switch (static_cast<Why>(ended >> 8)) {
        case Why::asked:
            return "the group of ranks was ended";
        case Why::late: {
            char seconds[32];
            std::snprintf(seconds, sizeof seconds, "%g s", timeout_s_);
            return rank + " did not come within " + seconds;
        }
        case Why::gone:
            return rank + "'s process has ended";
        case Why::unlike:
            return rank + " computes another step than the others";
    }
    return "";
}

// -- a rank -------------------------------------------------------------------------------------------

Member::Member(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {
    if (rank < 0 || rank >= ranks())
        refuse("rank " + to_string(rank) + ": this group has ranks 0 to " + to_string(ranks() - 1));
    int32_t nobody = 0;
    if (!group_->head_->places[rank].process.compare_exchange_strong(nobody, getpid()))
        refuse("rank " + to_string(rank) + " is taken, by process " + to_string(nobody));
}

float* Member::slot(uint32_t round, int rank) const {
    const int64_t place = int64_t{round & 1} * ranks() + rank;
    return group_->slots_ + place * group_->slot_numbers_;
}

void Member::arrive(uint32_t round, uint64_t question) noexcept {
    Place& place = group_->head_->places[rank_];
    place.question[round & 1].store(question, std::memory_order_relaxed);
    // Sequentially consistent, as in Gate: either this sees who sleeps, or he the new number.
    place.come.store(round + 1);
    if (place.sleepers.load() > 0) wake_all(place.come);
}

bool Member::wait(uint32_t round, uint64_t question) noexcept {
    Place* places = group_->head_->places;
    for (int rank = 0; rank < ranks(); ++rank)
        if (!wait_for(rank, round)) return false;
    for (int rank = 0; rank < ranks(); ++rank)
        if (places[rank].question[round & 1].load(std::memory_order_relaxed) != question) {
            group_->end(Group::Why::unlike, rank);
            return false;
        }
    return true;
}

bool Member::wait_for(int rank, uint32_t round) noexcept {
    Place& place = group_->head_->places[rank];
    const auto has_come = [&](uint32_t come) { return static_cast<int32_t>(come - round) > 0; };
    const auto start = Clock::now();
    for (;;) {
        for (int i = 0; i < kPausesPerLook; ++i) {
            if (has_come(place.come.load(std::memory_order_acquire))) return true;
            pause_briefly();
        }
        if (group_->has_ended()) return false;
        const auto waited = Clock::now() - start;
        if (waited > kYield) break;
        if (waited > kSpin) std::this_thread::yield();
    }
    for (;;) {
        place.sleepers.fetch_add(1);
        const uint32_t come = place.come.load();
        if (!has_come(come) && !group_->has_ended()) sleep_while(place.come, come);
        place.sleepers.fetch_sub(1);
        if (has_come(place.come.load())) return true;
        if (group_->has_ended()) return false;
        const int32_t process = place.process.load();
        if (process != 0 && process != getpid() && is_gone(process))
            group_->end(Group::Why::gone, rank);
        else if (std::chrono::duration<double>(Clock::now() - start).count() > group_->timeout_s_)
            group_->end(Group::Why::late, rank);
    }
}

// -- numbers at hand ----------------------------------------------------------------------------------

template <class Read>
void Member::exchange(const float* x, int64_t count, uint64_t kind, Read read) {
    for (int64_t begin = 0; begin < count; begin += slot_numbers(), ++round_) {
        const int64_t size = std::min(slot_numbers(), count - begin);
        std::memcpy(slot(round_, rank_), x + begin, size * sizeof(float));
        const uint64_t question = meeting_for(kind, 0, size);
        arrive(round_, question);
        if (!wait(round_, question)) throw GroupEnded(group_->why_ended());
        for (int rank = 0; rank < ranks(); ++rank) read(rank, slot(round_, rank), begin, size);
    }
}

void Member::sum(float* x, int64_t count) {
    exchange(x, count, kToSum, [&](int rank, const float* from, int64_t begin, int64_t size) {
        if (rank == 0)
            std::memcpy(x + begin, from, size * sizeof(float));
        else
            for (int64_t i = 0; i < size; ++i) x[begin + i] += from[i];
    });
}

void Member::gather(const float* x, int64_t count, float* out) {
    exchange(x, count, kToGather, [&](int rank, const float* from, int64_t begin, int64_t size) {
        std::memcpy(out + rank * count + begin, from, size * sizeof(float));
    });
}

}  // namespace duetto
