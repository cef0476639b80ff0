// The pool under TSan (make sanitize): every barrier must order plain writes before it and reads after.
#include "pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

using duetto::Pool;

static void every_thread_runs_once(int num_threads) {
    Pool pool(num_threads);
    std::vector<int> calls(num_threads, 0);
    for (int step = 1; step <= 50; ++step) {
        pool.run([&](int thread) { ++calls[thread]; });
        for (int count : calls) CHECK(count == step);
    }
}

// Each thread writes its own place and, after the barrier, reads all others': without the barrier's
// ordering this is a race that TSan reports, and a sum that is wrong.
static void barriers_order_writes(int num_threads) {
    Pool pool(num_threads);
    std::vector<int> written(num_threads, 0), wrong(num_threads, 0);
    for (int step = 0; step < 20; ++step) {
        pool.run([&](int thread) {
            for (int round = 1; round <= 50; ++round) {
                written[thread] = step * 100 + round;
                pool.barrier();
                for (int other : written) wrong[thread] += other != step * 100 + round;
                pool.barrier();
            }
        });
    }
    for (int count : wrong) CHECK(count == 0);
}

static void late_threads_are_waited_for() {
    Pool pool(3);
    std::atomic<int> arrived{0};
    int seen[3] = {0, 0, 0};
    pool.run([&](int thread) {  // long enough for the others to sleep
        if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        ++arrived;
        pool.barrier();
        seen[thread] = arrived.load();
    });
    for (int count : seen) CHECK(count == 3);
}

static void sleeping_workers_wake() {
    Pool pool(3);
    for (int step = 0; step < 20; ++step) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        std::atomic<int> ran{0};
        pool.run([&](int) { ++ran; });
        CHECK(ran.load() == 3);
    }
}

static void callers_take_turns() {
    Pool pool(2);
    int inside = 0, most = 0;  // plain: written by thread 0 of one step at a time
    auto call = [&] {
        for (int step = 0; step < 200; ++step) {
            pool.run([&](int thread) {
                if (thread == 0) most = ++inside > most ? inside : most;
                pool.barrier();
                if (thread == 0) --inside;
            });
        }
    };
    std::thread other(call);
    call();
    other.join();
    CHECK(most == 1);
}

static double processor_seconds() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           1e-6 * (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void idle_workers_sleep() {
    Pool pool(4);
    pool.run([](int) {});
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // they spin a little first
    const double before = processor_seconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    CHECK(processor_seconds() - before < 0.002);  // under 1 % of one processor
}

static void a_fork_is_noticed() {
    Pool* pool = new Pool(2);
    pool->run([](int) {});
    const pid_t child = fork();
    if (child == 0) {
        int code = 1;
        try {
            pool->run([](int) {});
        } catch (const std::runtime_error&) {
            delete pool;  // must not wait for threads that are not here
            code = 0;
        }
        _exit(code);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    pool->run([](int) {});
    delete pool;
}

static void impossible_sizes_are_refused() {
    for (int size : {0, -1, 5000}) {
        bool refused = false;
        try {
            Pool pool(size);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        CHECK(refused);
    }
}

int main() {
    for (int num_threads : {1, 2, 3, 7}) {
        every_thread_runs_once(num_threads);
        barriers_order_writes(num_threads);
    }
    late_threads_are_waited_for();
    sleeping_workers_wake();
    callers_take_turns();
    impossible_sizes_are_refused();
    if (!kThreadSanitizer) {  // it has a thread of its own, and does not follow forks
        idle_workers_sleep();
        a_fork_is_noticed();
    }
    CHECK(duetto::available_threads() >= 1);
    return report("pool");
}
