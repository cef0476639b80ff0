#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#include <unistd.h>

#include "spin.h"

namespace duetto {

namespace {

using Clock = std::chrono::steady_clock;

#if defined(__linux__)

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// The path of this process's group in the hierarchy with this controller ("" is that of cgroup v2).
std::string cgroup_path(const std::string& controller) {
    std::ifstream file(
        "/proc/self/cgroup");  // lines like 4:cpu,cpuacct:/some/group or 0::/some/group
    for (std::string line; std::getline(file, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string names(",");
        names.append(line, first + 1, second - first - 1).append(",");
        std::string wanted(",");
        wanted.append(controller).append(",");
        if (names.find(wanted) != std::string::npos) return line.substr(second + 1);
    }
    return "";
}

// quota / period, or 0 where there is no limit
double processors(const std::string& quota, const std::string& period) {
    const double share = std::atof(quota.c_str()), of = std::atof(period.c_str());
    return share > 0 && of > 0 ? share / of : 0;
}

double limit_v2(const std::string& folder) {  // "200000 100000" or "max 100000"
    std::istringstream line(first_line(folder + "/cpu.max"));
    std::string quota, period;
    line >> quota >> period;
    return processors(quota, period);
}

double limit_v1(const std::string& folder) {  // -1: none
    return processors(first_line(folder + "/cpu.cfs_quota_us"),
                      first_line(folder + "/cpu.cfs_period_us"));
}

// The lowest limit of a group and of those around it; 0: none. Inside a container the path may be
// the host's and not exist; the root is what is left then, and it is the container's own.
double lowest_limit(const std::string& root, std::string path,
                    double (*limit)(const std::string&)) {
    double lowest = 0;
    for (;;) {
        const double here = limit(root + path);
        if (here > 0 && (lowest == 0 || here < lowest)) lowest = here;
        const size_t slash = path.rfind('/');
        if (slash == std::string::npos) return lowest;
        path.resize(slash);
    }
}

double cgroup_processors() {
    const double v2 = lowest_limit("/sys/fs/cgroup", cgroup_path(""), limit_v2);
    if (v2 > 0) return v2;
    return lowest_limit("/sys/fs/cgroup/cpu", cgroup_path("cpu"), limit_v1);
}

// Beyond 1024 processors the kernel wants a larger mask than cpu_set_t.
int affinity_processors() {
    for (int size = 1024; size <= 1 << 20; size *= 4) {
        cpu_set_t* mask = CPU_ALLOC(size);
        if (mask == nullptr) break;
        const size_t bytes = CPU_ALLOC_SIZE(size);
        const int count = sched_getaffinity(0, bytes, mask) == 0 ? CPU_COUNT_S(bytes, mask) : 0;
        CPU_FREE(mask);
        if (count > 0) return count;
    }
    return std::max(1u, std::thread::hardware_concurrency());
}

#endif

// Signals are for the threads that Python knows.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

void name_this_thread(int thread) {
#if defined(__linux__)
    char name[16];
    std::snprintf(name, sizeof name, "duetto-%d", thread);
    pthread_setname_np(pthread_self(), name);
#else
    (void)thread;
#endif
}

}  // namespace

int available_threads() {
#if defined(__linux__)
    const int count = affinity_processors();
    const double quota = cgroup_processors();
    return quota > 0 ? std::max(1, std::min(count, static_cast<int>(std::ceil(quota)))) : count;
#else
    return std::max(1u, std::thread::hardware_concurrency());
#endif
}

void Gate::wait_while(uint32_t old) {
    const auto start = Clock::now();
    for (;;) {
        for (int i = 0; i < kPausesPerLook; ++i) {
            if (value() != old) return;
            pause_briefly();
        }
        const auto waited = Clock::now() - start;
        if (waited > kYield) break;
        if (waited > kSpin) std::this_thread::yield();
    }
    // Sequentially consistent, here and in set(): either set() sees the sleeper or the sleeper sees
    // the new value, so no wake-up is lost.
    sleepers_.fetch_add(1);
    value_.wait(old);
    sleepers_.fetch_sub(1);
}

void Gate::set(uint32_t value) {
    value_.store(value);
    if (sleepers_.load() > 0) value_.notify_all();
}

Pool::Pool(int num_threads) : num_threads_(num_threads), process_(getpid()), missing_(num_threads) {
    if (num_threads < 1 || num_threads > 4096)
        throw std::invalid_argument("a pool has 1 to 4096 threads, not " +
                                    std::to_string(num_threads));
    SignalsBlocked blocked;
    try {
        for (int thread = 1; thread < num_threads; ++thread)
            workers_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system has no more threads: those that there are must not outlive us
        stopping_ = true;
        steps_.set(1);
        for (std::thread& worker : workers_) worker.join();
        throw;
    }
}

Pool::~Pool() {
    if (getpid() !=
        process_) {  // a fork: the threads are the parent's, and only their handles are here
        new std::vector<std::thread>(std::move(workers_));
        return;
    }
    stopping_ = true;
    steps_.set(steps_.value() + 1);
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run_erased(Erased work, void* argument) {
    if (getpid() != process_)
        throw std::runtime_error(
            "this process was forked after its thread pool was made: make a new pool in the child");
    const std::lock_guard<std::mutex> turn(turn_);
    if (num_threads_ == 1) return work(argument, 0);
    work_ = work;
    argument_ = argument;
    steps_.set(steps_.value() + 1);
    work(argument, 0);
    barrier();  // all have returned
}

void Pool::serve(int thread) noexcept {
    name_this_thread(thread);
    for (uint32_t seen = 0;; ++seen) {
        steps_.wait_while(seen);
        if (stopping_) return;
        work_(argument_, thread);
        barrier();
    }
}

void Pool::barrier() noexcept {
    if (num_threads_ == 1) return;
    const uint32_t now = released_.value();
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        missing_.store(num_threads_, std::memory_order_relaxed);
        released_.set(now + 1);
    } else {
        released_.wait_while(now);
    }
}

}  // namespace duetto
