// The cores of this process, and a thread's place on one of them.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <vector>

namespace moe_ray {

inline bool all_cores(cpu_set_t& set) { return sched_getaffinity(getpid(), sizeof(set), &set) == 0; }

// Numbers of the cores that this process may use; {-1}: unknown.
inline std::vector<int> cores_of_this_process() {
  cpu_set_t set;
  std::vector<int> cores;
  if (all_cores(set))
    for (int i = 0; i < CPU_SETSIZE; i++)
      if (CPU_ISSET(i, &set)) cores.push_back(i);
  return cores.empty() ? std::vector<int>{-1} : cores;
}

// The calling thread's binding to one core.
class OnCore {
 public:
  // `core` -1: any. `polite`: the thread does not preempt others when it wakes.
  OnCore(int core, bool polite) {
    // Else, on a machine shared with the trunk, the first call that the trunk sends would take its core, and the calls to
    // the other experts would wait for that expert to finish.
    const sched_param normal{};
    if (polite) sched_setscheduler(0, SCHED_BATCH, &normal);
    CPU_ZERO(&mine_);
    if (core >= 0) CPU_SET(core, &mine_);
    bound_ = core >= 0 && all_cores(all_) && bind(mine_);
  }

  // Calls work() while the thread may be moved to a core that has become free, if `loose`.
  template <class Work>
  void during(bool loose, const Work& work) {
    const bool moved = bound_ && loose && bind(all_);
    work();
    if (moved) bind(mine_);
  }

 private:
  static bool bind(const cpu_set_t& set) { return sched_setaffinity(0, sizeof(set), &set) == 0; }

  cpu_set_t mine_, all_;
  bool bound_;
};

}  // namespace moe_ray
