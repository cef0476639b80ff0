// Threads that run a step together. Entered once per step: everyone calls the same function and meets
// the others at barriers. Knows nothing of what is computed.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace duetto {

// Processors that this process may use: its affinity mask, and its cgroup's quota (v1 or v2) rounded up.
int available_threads();

// A number that threads wait for a change of: they spin, then yield, then sleep.
class Gate {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void wait_while(uint32_t old);
    void set(uint32_t value);  // and wakes whoever sleeps

private:
    alignas(64) std::atomic<uint32_t> value_{0};
    alignas(64) std::atomic<uint32_t> sleepers_{0};  // apart from what the others spin on
};

class Pool {
public:
    explicit Pool(int num_threads);  // throws std::invalid_argument, std::system_error
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls work(thread) on every thread, 0 being the caller; returns when all have returned. `work`
    // must not throw. A second caller waits for the first. Throws std::runtime_error in a process
    // that was forked after the pool was made, where its threads do not exist.
    template <class Work>
    void run(Work work) {
        run_erased([](void* w, int thread) noexcept { (*static_cast<Work*>(w))(thread); }, &work);
    }

    // Inside run, by every thread: nobody goes on before all have come. What was written before it
    // by any thread is seen after it by all.
    void barrier() noexcept;

private:
    using Erased = void (*)(void*, int) noexcept;
    void run_erased(Erased work, void* argument);
    void serve(int thread) noexcept;

    const int num_threads_;
    const int64_t process_;  // that made the threads
    std::mutex turn_;
    Erased work_ = nullptr;  // of the step that steps_ counts
    void* argument_ = nullptr;
    bool stopping_ = false;
    std::vector<std::thread> workers_;

    Gate steps_;  // one more for every step
    Gate released_;  // one more for every barrier that all have reached
    alignas(64) std::atomic<int> missing_;  // at the barrier
};

}  // namespace duetto
