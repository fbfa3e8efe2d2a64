// A switch between network namespaces that stand for hosts: every packet waits for as long as it would on a network of
// the bandwidth and latency asked for. One TUN device a host; one thread forwards, others may steer it meanwhile.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <queue>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

constexpr int kMaxHosts = 64;
constexpr size_t kHeader = 10;  // virtio_net_hdr, before each packet: handed on as it came
constexpr size_t kBuffer = 65536 + kHeader;
constexpr int kBatch = 32;  // packets of one host before others have their turn
constexpr size_t kMaxWaiting = 8192;  // 512 MiB: what comes then is dropped
constexpr int64_t kMaxLateness = 100'000;
constexpr auto kRelaxed = std::memory_order_relaxed;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

struct Packet {
  int from = 0, to = 0;
  size_t size = 0;
  uint8_t data[kBuffer];
};

struct Event {
  int64_t when;
  uint64_t number;  // of equal times, who came first goes first
  Packet* packet;
  bool received;  // it has passed the receiver's port: deliver it
  bool operator<(const Event& other) const {
    return when != other.when ? when > other.when : number > other.number;
  }
};

struct Pair {  // from one host to another
  std::atomic<int64_t> latency_ns{0};
  std::atomic<double> ns_per_byte{0};  // 0: as fast as the machine can
  std::atomic<uint64_t> packets{0}, bytes{0}, dropped{0}, cut{0};
};

struct Host {
  int tun = -1, netns = -1;
  std::atomic<bool> cut{false};
  int64_t sent_at = 0, received_at = 0;  // when the port's last packet has passed it
};

class Switch {
 public:
  explicit Switch(uint32_t network, uint64_t queue_bytes)
      : network_(network), queue_bytes_(queue_bytes), wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

  ~Switch() {
    for (auto& host : hosts_) close(host.tun), close(host.netns);
    close(wake_);
    while (!waiting_.empty()) delete waiting_.top().packet, waiting_.pop();
    for (auto* packet : free_) delete packet;
  }

  // Makes a namespace with a TUN device; returns the host's number, or -errno.
  int add(const char* device) {
    if (count_ == kMaxHosts) return -ENOSPC;
    Host& host = hosts_[count_];
    int error = 0;
    std::thread([&] {  // a thread of its own: it stays in the namespace that it makes
      if (unshare(CLONE_NEWNET) || (host.netns = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC)) < 0 ||
          (host.tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0) {
        error = errno;
        return;
      }
      ifreq request{};
      request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
      std::snprintf(request.ifr_name, IFNAMSIZ, "%s", device);
      // The hosts share a memory that does not err: nobody need compute checksums of what crosses it.
      if (ioctl(host.tun, TUNSETIFF, &request) || ioctl(host.tun, TUNSETOFFLOAD, TUN_F_CSUM)) error = errno;
    }).join();
    if (error) return -error;
    return count_++;
  }

  int netns(int host) const { return hosts_[host].netns; }

  Pair& pair(int from, int to) { return pairs_[from * kMaxHosts + to]; }

  void cut(int host, bool cut) { hosts_[host].cut.store(cut); }

  // Forwards until `stop`.
  void run() {
    be_punctual();
    std::vector<pollfd> polls;
    for (int i = 0; i < count_; i++) polls.push_back({hosts_[i].tun, POLLIN, 0});
    polls.push_back({wake_, POLLIN, 0});
    while (!stopping_.load()) {
      const int64_t due = deliver_due();
      const int64_t sleep = std::max<int64_t>(due - now_ns() - lateness_, 0);
      const timespec wait{sleep / 1'000'000'000, sleep % 1'000'000'000};
      const int count = ppoll(polls.data(), polls.size(), due < 0 ? nullptr : &wait, nullptr);
      if (!count && sleep) {  // sleeps end late by about the same: the next will be as much shorter
        const int64_t late = now_ns() - (due - lateness_);
        lateness_ += (std::clamp<int64_t>(late, 0, kMaxLateness) - lateness_) / 16;
      }
      for (int i = 0; count > 0 && i < count_; i++)
        if (polls[i].revents) take(i);
    }
  }

  void stop() {
    stopping_.store(true);
    const uint64_t one = 1;
    if (write(wake_, &one, sizeof one) < 0) std::perror("switch");
  }

 private:
  // A packet that is due must not wait for a core that experts compute on, nor for timers to be bundled.
  static void be_punctual() {
    prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0);
    sched_param priority{};
    priority.sched_priority = 1;
    if (sched_setscheduler(0, SCHED_RR, &priority)) setpriority(PRIO_PROCESS, 0, -20);
  }

  void take(int from) {
    for (int i = 0; i < kBatch; i++) {
      Packet* packet = buffer();
      const ssize_t size = read(hosts_[from].tun, packet->data, kBuffer);
      packet->size = size > 0 ? size : 0;
      packet->from = from;
      if (size <= 0 || !addressed(packet)) {
        free_.push_back(packet);
        if (size <= 0) return;
      } else {
        send(packet);
      }
    }
  }

  // Whether it is IPv4 to one of our hosts; host i has the address network + 1 + i.
  bool addressed(Packet* packet) const {
    const uint8_t* ip = packet->data + kHeader;
    if (packet->size < kHeader + 20 || ip[0] >> 4 != 4) return false;
    uint32_t to;
    std::memcpy(&to, ip + 16, 4);
    const int64_t host = static_cast<int64_t>(ntohl(to)) - network_ - 1;
    packet->to = static_cast<int>(host);
    return host >= 0 && host < count_ && host != packet->from;
  }

  // Through the sender's port, and on its way.
  void send(Packet* packet) {
    Pair& pair = this->pair(packet->from, packet->to);
    if (refused(packet, pair)) return;
    const double ns_per_byte = pair.ns_per_byte.load(kRelaxed);
    const int64_t latency = pair.latency_ns.load(kRelaxed), now = now_ns();
    if (!latency && !ns_per_byte) return deliver(packet);
    if (waiting_.size() == kMaxWaiting) return drop(packet, pair.dropped);
    const int64_t passed = pass(hosts_[packet->from].sent_at, now, now, packet, ns_per_byte);
    if (passed < 0) return drop(packet, pair.dropped);
    waiting_.push({passed + latency, ++number_, packet, false});
  }

  // Its last byte is at the receiver's port, which has let its bytes through as they came unless it was busy.
  void receive(Packet* packet, int64_t now) {
    Pair& pair = this->pair(packet->from, packet->to);
    const double ns_per_byte = pair.ns_per_byte.load(kRelaxed);
    const auto duration = static_cast<int64_t>(ns_per_byte * packet->size);
    const int64_t passed = pass(hosts_[packet->to].received_at, now - duration, now, packet, ns_per_byte);
    if (passed < 0) return drop(packet, pair.dropped);
    if (passed <= now) return deliver(packet);
    waiting_.push({passed, ++number_, packet, true});
  }

  // When the packet has passed a port that is busy until `busy`, if it is there `from`; -1: the port's queue is full.
  int64_t pass(int64_t& busy, int64_t from, int64_t now, const Packet* packet, double ns_per_byte) const {
    const int64_t begin = std::max(from, busy);
    if (ns_per_byte && static_cast<double>(begin - now) > ns_per_byte * queue_bytes_) return -1;
    return busy = begin + static_cast<int64_t>(ns_per_byte * packet->size);
  }

  // Hands over whatever is due; when the next is, -1: nothing waits.
  int64_t deliver_due() {
    while (!waiting_.empty()) {
      const int64_t now = now_ns();
      const Event event = waiting_.top();
      if (event.when > now) return event.when;
      waiting_.pop();
      if (event.received)
        deliver(event.packet);
      else
        receive(event.packet, event.when);
    }
    return -1;
  }

  void deliver(Packet* packet) {
    Pair& pair = this->pair(packet->from, packet->to);
    if (refused(packet, pair)) return;
    pair.packets.fetch_add(1, kRelaxed);
    pair.bytes.fetch_add(packet->size, kRelaxed);
    if (write(hosts_[packet->to].tun, packet->data, packet->size) < 0) pair.dropped.fetch_add(1, kRelaxed);
    free_.push_back(packet);
  }

  bool refused(Packet* packet, Pair& pair) {
    if (!hosts_[packet->from].cut.load(kRelaxed) && !hosts_[packet->to].cut.load(kRelaxed)) return false;
    drop(packet, pair.cut);
    return true;
  }

  void drop(Packet* packet, std::atomic<uint64_t>& counter) {
    counter.fetch_add(1, kRelaxed);
    free_.push_back(packet);
  }

  Packet* buffer() {
    if (free_.empty()) free_.push_back(new Packet);
    Packet* packet = free_.back();  // the last used: its memory is in the cache
    free_.pop_back();
    return packet;
  }

  const int64_t network_;
  const double queue_bytes_;
  int wake_ = -1, count_ = 0;
  std::atomic<bool> stopping_{false};
  Host hosts_[kMaxHosts];
  std::vector<Pair> pairs_{kMaxHosts * kMaxHosts};
  std::priority_queue<Event> waiting_;
  std::vector<Packet*> free_;
  uint64_t number_ = 0;
  int64_t lateness_ = 0;  // ns
};

}  // namespace

extern "C" {

void* switch_new(uint32_t network, uint64_t queue_bytes) { return new Switch(network, queue_bytes); }
void switch_free(void* s) { delete static_cast<Switch*>(s); }
int switch_add(void* s, const char* device) { return static_cast<Switch*>(s)->add(device); }
int switch_netns(void* s, int host) { return static_cast<Switch*>(s)->netns(host); }
void switch_run(void* s) { static_cast<Switch*>(s)->run(); }
void switch_stop(void* s) { static_cast<Switch*>(s)->stop(); }
void switch_cut(void* s, int host, int cut) { static_cast<Switch*>(s)->cut(host, cut != 0); }

void switch_shape(void* s, int from, int to, int64_t latency_ns, double ns_per_byte) {
  auto& pair = static_cast<Switch*>(s)->pair(from, to);
  pair.latency_ns.store(latency_ns);
  pair.ns_per_byte.store(ns_per_byte);
}

// Packets and bytes that were delivered, packets that a full queue dropped, and those that a cut swallowed.
void switch_counters(void* s, int from, int to, uint64_t* out) {
  auto& pair = static_cast<Switch*>(s)->pair(from, to);
  out[0] = pair.packets.load(), out[1] = pair.bytes.load(), out[2] = pair.dropped.load(), out[3] = pair.cut.load();
}

}  // extern "C"
