// Ranks that meet, as threads of one process that share one mapping: TSan (make sanitize) then sees
// whether a meeting orders what is written before it and read after. And as processes, which end, stay
// away and ask for something else.
#include "group.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

#include "plan.h"
#include "tests/check.h"

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

using namespace duetto;

namespace {

float number(int rank, int64_t place) {
    return std::sin(static_cast<float>(place % 9973)) *
           std::pow(10.0f, static_cast<float>(rank % 3));
}

// The sum in the order of ranks, each sum rounded once.
float expected_sum(int ranks, int64_t place) {
    float sum = number(0, place);
    for (int rank = 1; rank < ranks; ++rank) sum += number(rank, place);
    return sum;
}

void on_ranks(Group& group, const std::shared_ptr<Group>& shared,
              const std::function<void(Member&)>& work) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < group.ranks(); ++rank)
        threads.emplace_back([&work, shared, rank] {
            Member member(shared, rank);
            work(member);
        });
    for (std::thread& thread : threads) thread.join();
}

void sums_and_gathers(int ranks, int64_t slot_numbers) {
    const auto group = Group::make(ranks, slot_numbers, 30);
    on_ranks(*group, group, [&](Member& member) {
        for (int64_t count : {1, 15, 16, 100, 1000, 1}) {
            std::vector<float> x(count), all(ranks * count);
            for (int64_t i = 0; i < count; ++i) x[i] = number(member.rank(), i);
            member.gather(x.data(), count, all.data());
            member.sum(x.data(), count);
            for (int64_t i = 0; i < count; ++i) {
                CHECK(x[i] == expected_sum(ranks, i));
                for (int rank = 0; rank < ranks; ++rank)
                    CHECK(all[rank * count + i] == number(rank, i));
            }
        }
    });
    CHECK(!group->has_ended());
}

// -- in a plan ----------------------------------------------------------------------------------------

// x [rows, 70] summed, then `out` [rows, 45] gathered from parts of 20, 20 and 5 (of the last rank).
void one_plan(Member& member, int threads, int64_t rows) {
    Pool pool(threads);
    Plan plan(pool, *baseline_kernels(), &member);
    const Ref x{plan.buffer(80), 3, 70}, copied{plan.buffer(70), 0, 70},
        out{plan.buffer(50), 2, 45};
    const std::vector<int64_t> starts =
        member.ranks() == 2 ? std::vector<int64_t>{0, 25, 45} : std::vector<int64_t>{0, 20, 40, 45};
    std::vector<float> x_numbers(rows * x.width), out_numbers(rows * out.width, -1.0f);
    for (size_t i = 0; i < x_numbers.size(); ++i) x_numbers[i] = number(member.rank(), i);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = starts[member.rank()]; c < starts[member.rank() + 1]; ++c)
            out_numbers[row * out.width + c] = number(7, row * out.width + c);
    plan.write(x, x_numbers.data(), rows);
    plan.write(out, out_numbers.data(), rows);
    plan.all_reduce(x);
    plan.add(x, x, copied);  // by rows, so by other threads than those that summed
    plan.all_gather(out, starts);
    const std::vector<int32_t> ids(rows, 0);
    std::vector<int32_t> positions(rows);
    for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(i);
    const int32_t query_starts[] = {0, static_cast<int32_t>(rows)}, table = 0;
    const auto length = static_cast<int32_t>(rows);
    const StepInput input{{rows, 1, 1, positions.data(), ids.data(), query_starts, &length, &table},
                          ids.data(),
                          nullptr,
                          0};
    plan.run(input, nullptr, out);
    int64_t found_rows = 0;
    const std::vector<float> sums = plan.read(copied, &found_rows),
                             gathered = plan.read(out, &found_rows);
    for (size_t i = 0; i < sums.size(); ++i) {
        const float sum = expected_sum(member.ranks(), static_cast<int64_t>(i));
        CHECK(sums[i] == sum + sum);
    }
    for (size_t i = 0; i < gathered.size(); ++i) CHECK(gathered[i] == number(7, i));
}

void ranks_of_any_threads_meet_in_plans(int ranks, int64_t slot_numbers) {
    const auto group = Group::make(ranks, slot_numbers, 30);
    on_ranks(*group, group, [&](Member& member) {
        for (int64_t rows : {1, 2, 3, 40})
            for (int more : {0, 1}) one_plan(member, 1 + (member.rank() + more) % 3, rows);
    });
    CHECK(!group->has_ended());
}

// -- what goes wrong ----------------------------------------------------------------------------------

template <class Error, class Call>
std::string refusal(Call call) {
    try {
        call();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

void a_rank_that_stays_away_ends_the_group() {
    const auto group = Group::make(2, 16, 0.2);
    Member member(group, 0);
    float x = 1;
    const std::string why = refusal<GroupEnded>([&] { member.sum(&x, 1); });
    CHECK(why == "rank 1 did not come within 0.2 s", "%s", why.c_str());
    CHECK(refusal<GroupEnded>([&] { member.sum(&x, 1); }) == why);  // at once
}

void an_end_wakes_who_waits() {
    const auto group = Group::make(3, 16, 1e5);
    std::string why;
    std::thread waiting([&] {
        Member member(group, 2);
        float x = 1;
        why = refusal<GroupEnded>([&] { member.sum(&x, 1); });
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    group->end();
    waiting.join();
    CHECK(why == "the group of ranks was ended", "%s", why.c_str());
}

void a_plan_whose_group_ends_fails_on_all_threads() {
    const auto group = Group::make(2, 16, 0.1);
    Member member(group, 0);
    CHECK(refusal<GroupEnded>([&] { one_plan(member, 3, 5); }).starts_with("rank 1 did not come"));
}

void ranks_that_differ_are_told() {
    const auto group = Group::make(2, 16, 30);
    std::atomic<int> told{0};
    on_ranks(*group, group, [&](Member& member) {
        std::vector<float> x(4);
        told += refusal<GroupEnded>([&] {
                    member.sum(x.data(), 3 + member.rank());
                }).ends_with("computes another step than the others");
    });
    CHECK(told == 2);
}

void what_cannot_be_is_refused() {
    const auto group = Group::make(2, 16, 30);
    using Refused = std::invalid_argument;
    for (int ranks : {-1, 1, 65})
        CHECK(refusal<Refused>([&] { Group::make(ranks, 16, 1); }).find("2 to 64") !=
              std::string::npos);
    CHECK(!refusal<Refused>([] { Group::make(2, 17, 1); }).empty());
    CHECK(!refusal<Refused>([] { Group::make(2, 16, 0); }).empty());
    CHECK(!refusal<Refused>([&] { Member(group, 2); }).empty());
    const Member first(group, 0);
    CHECK(refusal<Refused>([&] { Member(group, 0); }).starts_with("rank 0 is taken"));
    const int other = open("/proc/self/exe", O_RDONLY);
    CHECK(refusal<Refused>([&] { Group::open(other); }).ends_with("is no group's memory"));
    close(other);
}

// -- processes ----------------------------------------------------------------------------------------

pid_t in_a_child(const std::function<bool()>& work) {
    const pid_t child = fork();
    if (child == 0) _exit(work() ? 0 : 1);
    return child;
}

bool succeeds(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void processes_meet() {
    const auto group = Group::make(2, 32, 30);
    const auto work = [&](int rank) {
        const auto own = Group::open(group->descriptor());  // another mapping
        Member member(own, rank);
        for (int round = 0; round < 300; ++round) {
            float x[40];
            for (int i = 0; i < 40; ++i) x[i] = number(rank, i + round);
            member.sum(x, 40);
            for (int i = 0; i < 40; ++i)
                if (x[i] != expected_sum(2, i + round)) return false;
        }
        return true;
    };
    const pid_t child = in_a_child([&] { return work(1); });
    CHECK(work(0));
    CHECK(succeeds(child));
}

void a_process_that_ends_ends_the_group() {
    const auto group = Group::make(2, 16, 1e5);
    const pid_t child = in_a_child([&] {
        Member member(Group::open(group->descriptor()), 1);
        float x = 1;
        member.sum(&x, 1);
        return true;  // and never comes again
    });
    Member member(group, 0);
    float x = 1;
    member.sum(&x, 1);
    CHECK(refusal<GroupEnded>([&] { member.sum(&x, 1); }) == "rank 1's process has ended");
    CHECK(succeeds(child));
}

}  // namespace

int main() {
    for (int ranks : {2, 3, 5})
        for (int64_t slot_numbers : {16, 112, 4096}) sums_and_gathers(ranks, slot_numbers);
    for (int64_t slot_numbers : {16, 112, 4096}) {
        ranks_of_any_threads_meet_in_plans(2, slot_numbers);
        ranks_of_any_threads_meet_in_plans(3, slot_numbers);
    }
    a_rank_that_stays_away_ends_the_group();
    an_end_wakes_who_waits();
    a_plan_whose_group_ends_fails_on_all_threads();
    ranks_that_differ_are_told();
    what_cannot_be_is_refused();
    if (!kThreadSanitizer) {  // it does not follow forks
        processes_meet();
        a_process_that_ends_ends_the_group();
    }
    return report("group");
}
