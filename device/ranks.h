#pragma once
// Several processes that train one model together, one on each GPU: who they are, how they start, how they talk on the
// host, and how all of them end when one does. Each is a rank: 0, 1, ...
//
// Rank 0 holds two TCP sockets to every other rank. Over the first travel small gathers, and what rank 0 writes to
// files; over the second nothing travels as long as all is well, and a thread on each rank listens there: when a process
// or its host is gone, it says so in one line and ends its own process, also while the main thread waits for the GPU.
// Tensors go another way: device/comm.h.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "run/error.h"

extern char** environ;

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Who am I?

struct Process {
  int rank = 0, ranks = 1;
  int local = 0;  // number among the ranks of this host: which GPU
  std::string address = "127.0.0.1";  // of rank 0
  int port = 29500;
  // Only of a rank that `train --ranks N` started: the end of a pipe that closes when the starter is gone, and on rank
  // 0 the socket that already listens.
  int starter = -1, listener = -1;
};

// From what torchrun, mpirun or srun put into the environment, or start_ranks(); without any of that the only rank.
// mpirun comes before srun, by which it starts its daemons inside of a Slurm job. UserError where that makes no sense.
inline Process process_from_environment() {
  auto number = [](const char* name, int missing) {
    const char* text = std::getenv(name);
    if (!text) return missing;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end || value < 0 || value > INT32_MAX)
      throw UserError(std::string(name) + "=" + text + " in the environment: must be a number of at least 0");
    return int(value);
  };
  struct Names {
    const char *rank, *ranks, *local;
  };
  Process process;
  for (const Names& names : {Names{"RANK", "WORLD_SIZE", "LOCAL_RANK"},
                             Names{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
                             Names{"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"}}) {
    if (!std::getenv(names.rank) || !std::getenv(names.ranks)) continue;
    process.rank = number(names.rank, 0);
    process.ranks = number(names.ranks, 1);
    process.local = number(names.local, process.rank);
    if (process.rank >= process.ranks)
      throw UserError(std::string(names.rank) + "=" + std::to_string(process.rank) + ": must be below " + names.ranks +
                      "=" + std::to_string(process.ranks));
    break;
  }
  if (const char* address = std::getenv("MASTER_ADDR")) process.address = address;
  // Two jobs of Slurm may share a host. torchrun itself listens at the port that it names, so we take the next.
  if (const int job = number("SLURM_JOB_ID", 0)) process.port = 20000 + job % 10000;
  process.port = number("MASTER_PORT", process.port);
  if (const char* taken = std::getenv("TORCHELASTIC_USE_AGENT_STORE"); taken && std::string(taken) == "True")
    ++process.port;
  if (process.port < 1 || process.port > 65535)
    throw UserError("MASTER_PORT=" + std::to_string(process.port) + ": must lie between 1 and 65535");
  process.starter = number("PARTIAL_ROPE_STARTER", -1);
  process.listener = number("PARTIAL_ROPE_LISTENER", -1);
  return process;
}

inline std::string host_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sockets

// A socket that listens, on this host alone or for all. Port 0: any free one. UserError if the port is in use.
inline int listen_at(int port, bool this_host_only) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  const int yes = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_port = htons(uint16_t(port));
  at.sin_addr.s_addr = htonl(this_host_only ? INADDR_LOOPBACK : INADDR_ANY);
  if (fd < 0 || ::bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) != 0 || ::listen(fd, 1024) != 0) {
    const std::string why = errno == EADDRINUSE ? "in use" : std::strerror(errno);
    if (fd >= 0) ::close(fd);
    throw UserError("MASTER_PORT " + std::to_string(port) + ": " + why + " on " + host_name() +
                    "; choose another port, the same for all ranks");
  }
  return fd;
}
inline int port_of(int listener) {
  sockaddr_in at = {};
  socklen_t size = sizeof at;
  ::getsockname(listener, reinterpret_cast<sockaddr*>(&at), &size);
  return ntohs(at.sin_port);
}

// A socket to there, or -1 as long as nobody listens. UserError for a name that nobody knows.
inline int connect_to(const std::string& address, int port) {
  addrinfo wanted = {}, *found = nullptr;
  wanted.ai_family = AF_INET;
  wanted.ai_socktype = SOCK_STREAM;
  if (const int error = ::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &wanted, &found))
    throw UserError("MASTER_ADDR " + address + ": " + ::gai_strerror(error));
  int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  if (::connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
    ::close(fd);
    fd = -1;
  }
  ::freeaddrinfo(found);
  return fd;
}

// All bytes, or false: the other side is gone.
inline bool write_all(int fd, const void* data, size_t bytes) {
  for (const char* at = static_cast<const char*>(data); bytes;) {
    const ssize_t n = ::send(fd, at, bytes, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    bytes -= size_t(n);
  }
  return true;
}
inline bool read_all(int fd, void* data, size_t bytes) {
  for (char* at = static_cast<char*>(data); bytes;) {
    const ssize_t n = ::recv(fd, at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    bytes -= size_t(n);
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------

// Every rank makes one and then calls the same functions in the same order as all others. With one rank nothing is
// opened or started, and every function returns at once.
class Ranks {
 public:
  const int rank, size;
  std::atomic<int> checkpoint{0};  // the step of the last one that is whole, for the line that says how a run ended

  // Waits until all ranks are there. UserError, after at most a minute, if they do not come or do not fit together.
  explicit Ranks(const Process& process = {}) : rank(process.rank), size(process.ranks), starter_(process.starter) {
    if (size == 1) return;
    peers_.resize(size);
    try {
      rank == 0 ? admit(process) : join(process);
    } catch (const UserError& e) {
      end(2, e.what());
    }
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks() {
    if (!watchdog_.joinable()) return;
    ending_ = true;
    barrier();  // nobody hangs up before all have come here
    for (Peer& peer : peers_)
      if (peer.alarm >= 0) ::shutdown(peer.alarm, SHUT_RDWR);
    watchdog_.join();
    for (Peer& peer : peers_)
      for (int fd : {peer.data, peer.alarm})
        if (fd >= 0) ::close(fd);
  }

  bool root() const { return rank == 0; }

  // Between rank 0 and another rank.
  void send(int to, const void* data, size_t bytes) {
    if (!write_all(peers_[to].data, data, bytes)) lost(to);
  }
  void receive(int from, void* data, size_t bytes) {
    if (!read_all(peers_[from].data, data, bytes)) lost(from);
  }

  // rows (size, bytes): every rank has filled its own row and receives the others.
  void all_gather(void* rows, size_t bytes) {
    char* at = static_cast<char*>(rows);
    if (rank > 0) {
      send(0, at + rank * bytes, bytes);
      receive(0, at, size * bytes);
    }
    for (int r = 1; rank == 0 && r < size; ++r) receive(r, at + r * bytes, bytes);
    for (int r = 1; rank == 0 && r < size; ++r) send(r, at, size * bytes);
  }
  void barrier() {
    std::vector<char> rows(size);
    all_gather(rows.data(), 1);
  }
  void broadcast(void* data, size_t bytes) {
    if (rank > 0) receive(0, data, bytes);
    for (int r = 1; rank == 0 && r < size; ++r) send(r, data, bytes);
  }
  // On rank 0 the strings or vectors of all, by rank; elsewhere nothing.
  template <class Text>
  std::vector<Text> gather(const Text& mine) {
    std::vector<Text> all(rank == 0 ? size : 0);
    uint64_t count = mine.size();
    if (rank > 0) {
      send(0, &count, sizeof count);
      send(0, mine.data(), count * sizeof mine[0]);
      return all;
    }
    all[0] = mine;
    for (int r = 1; r < size; ++r) {
      receive(r, &count, sizeof count);
      all[r].resize(count);
      receive(r, all[r].data(), count * sizeof mine[0]);
    }
    return all;
  }

  std::string name(int r) const { return "rank " + std::to_string(r) + " on " + peers_[r].host; }

  // Calls work(), the body of a program, which gives the exit code. What goes wrong on any rank is said once, by rank
  // 0, and ends all of them; a single rank leaves it to its caller.
  template <class Work>
  int guard(Work work) {
    if (size == 1) return work();
    int code = 1;
    std::string why;
    try {
      return work();
    } catch (const UserError& e) {
      code = 2, why = e.what();
    } catch (const std::exception& e) {
      why = e.what();
    }
    std::fflush(stdout);
    end(code, why);
  }

 private:
  static constexpr char kMagic[8] = {'p', 'r', 'o', 'p', 'e', '-', 'r', '1'};
  static constexpr int kPatience = 60;  // seconds until all ranks must be there

  struct Peer {
    int data = -1, alarm = -1;
    std::string host;
  };
  struct Hello {  // the first message of every connection
    char magic[8];
    int32_t rank, ranks, alarm;
    uint64_t program;
    char host[64];
  };
  // What travels on an alarm socket: to rank 0 why another rank ends, from rank 0 that all do.
  struct Alarm {
    int32_t code;
    char text[1020];
  };

  std::vector<Peer> peers_;  // on rank 0 all others, elsewhere rank 0
  const int starter_;
  std::thread watchdog_;
  std::atomic<bool> ending_{false};
  std::atomic_flag said_ = ATOMIC_FLAG_INIT;

  // The bytes of the running program, so that all ranks run the same; 0 where the system does not show them.
  static uint64_t program() {
    std::ifstream file("/proc/self/exe", std::ios::binary);
    uint64_t hash = 0;
    std::vector<char> bytes(1 << 20);
    while (file.read(bytes.data(), bytes.size()), file.gcount() > 0)
      for (std::streamsize i = 0; i < file.gcount(); ++i)
        hash = (hash ^ uint8_t(bytes[i])) * 1099511628211ull;  // FNV-1a
    return hash;
  }

  static void prepare(int fd, bool alarm) {
    const int yes = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (!alarm) return;
    // A host that is gone sends no last word: after 3 s of silence ask every 2 s, give up after 7 s.
    ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
#ifdef __linux__
    const int idle = 3, interval = 2, count = 2, milliseconds = 7000;
    ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds, sizeof milliseconds);
#endif
  }

  // Rank 0: takes the connections of all others.
  void admit(const Process& process) {
    const bool local = process.address == "localhost" || process.address.rfind("127.", 0) == 0;
    const int listener = process.listener >= 0 ? process.listener : listen_at(process.port, local);
    const uint64_t ours = program();
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(kPatience);
    peers_[0].host = host_name();
    for (int missing = 2 * (size - 1); missing > 0;) {
      std::vector<pollfd> fds = {{listener, POLLIN, 0}, {starter_, POLLIN, 0}};
      for (const Peer& peer : peers_) fds.push_back({peer.alarm, POLLIN, 0});
      ::poll(fds.data(), fds.size(), 1000);
      if (fds[1].revents) throw UserError("the program that started the ranks has ended");
      for (int r = 1; r < size; ++r)
        if (fds[2 + r].revents) throw UserError(name(r) + " ended before all ranks were there");
      if (std::chrono::steady_clock::now() > until) {
        std::string absent;
        for (int r = 1; r < size; ++r)
          if (peers_[r].data < 0) absent += (absent.empty() ? "" : ", ") + std::to_string(r);
        throw UserError("of " + std::to_string(size) + " ranks (WORLD_SIZE) these did not come to " + process.address +
                        ":" + std::to_string(process.port) + " (MASTER_ADDR, MASTER_PORT) within " +
                        std::to_string(kPatience) + " s: " + absent);
      }
      if (!fds[0].revents) continue;
      const int fd = ::accept(listener, nullptr, nullptr);
      if (fd < 0) continue;
      Hello hello = {};
      timeval patience = {2, 0};  // whoever connects says at once who it is, or is none of us
      ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      if (!read_all(fd, &hello, sizeof hello) || std::memcmp(hello.magic, kMagic, sizeof kMagic)) {
        ::close(fd);
        continue;
      }
      patience = {0, 0};
      ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      prepare(fd, hello.alarm);
      hello.host[sizeof hello.host - 1] = 0;
      const std::string who = "rank " + std::to_string(hello.rank) + " on " + hello.host;
      const bool known = hello.rank > 0 && hello.rank < size;
      std::string wrong;
      if (hello.ranks != size)
        wrong = who + " is one of " + std::to_string(hello.ranks) + " ranks (WORLD_SIZE), rank 0 on " + host_name() +
                " one of " + std::to_string(size);
      else if (!known || (hello.alarm ? peers_[hello.rank].alarm : peers_[hello.rank].data) >= 0)
        wrong = "two processes are " + who + " (RANK)";
      else if (hello.program != ours)
        wrong = who + " runs another program than rank 0 on " + host_name() + ": all need the same file";
      if (!wrong.empty()) {
        peers_.push_back({-1, fd, hello.host});  // so that it is told as well
        throw UserError(wrong);
      }
      Peer& peer = peers_[hello.rank];
      peer.host = hello.host;
      (hello.alarm ? peer.alarm : peer.data) = fd;
      --missing;
    }
    ::close(listener);
    watchdog_ = std::thread([this] { watch(); });
    for (int r = 1; r < size; ++r) send(r, kMagic, sizeof kMagic);  // all are there
  }

  // Every other rank: connects to rank 0, which may not be there yet.
  void join(const Process& process) {
    if (process.listener >= 0) ::close(process.listener);
    Hello hello = {};
    std::memcpy(hello.magic, kMagic, sizeof kMagic);
    hello.rank = rank;
    hello.ranks = size;
    hello.program = program();
    std::strncpy(hello.host, host_name().c_str(), sizeof hello.host - 1);
    peers_[0].host = process.address;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(kPatience);
    for (bool alarm : {true, false}) {  // from the first on, rank 0 can end us
      int fd;
      while ((fd = connect_to(process.address, process.port)) < 0) {
        if (std::chrono::steady_clock::now() > until)
          throw UserError("no rank 0 at " + process.address + ":" + std::to_string(process.port) +
                          " (MASTER_ADDR, MASTER_PORT) within " + std::to_string(kPatience) + " s");
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
      prepare(fd, alarm);
      hello.alarm = alarm;
      (alarm ? peers_[0].alarm : peers_[0].data) = fd;
      write_all(fd, &hello, sizeof hello);  // if that fails, so does what comes next
      if (alarm) watchdog_ = std::thread([this] { watch(); });
    }
    timeval patience = {kPatience + 5, 0};
    ::setsockopt(peers_[0].data, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    char all_there[sizeof kMagic] = "";
    if (!read_all(peers_[0].data, all_there, sizeof all_there) || std::memcmp(all_there, kMagic, sizeof kMagic)) {
      std::this_thread::sleep_for(std::chrono::seconds(1));  // if rank 0 ended, the watchdog knows
      throw UserError("MASTER_PORT " + std::to_string(process.port) + ": another program answers at " + process.address +
                      "; choose another port, the same for all ranks");
    }
    patience = {0, 0};
    ::setsockopt(peers_[0].data, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  }

  // The watchdog: sleeps until something happens on an alarm socket.
  void watch() {
    for (;;) {
      std::vector<pollfd> fds = {{starter_, POLLIN, 0}};
      for (const Peer& peer : peers_) fds.push_back({peer.alarm, POLLIN, 0});
      if (::poll(fds.data(), fds.size(), -1) < 0) continue;
      if (ending_) return;
      if (fds[0].revents) {
        say(rank == 0 ? "the program that started the ranks has ended; stopped" + kept() : "");
        ::_exit(1);
      }
      for (size_t r = 0; r < peers_.size(); ++r) {
        if (!fds[1 + r].revents) continue;
        Alarm alarm;
        const bool told = read_all(peers_[r].alarm, &alarm, sizeof alarm);
        if (ending_) return;
        if (told && rank > 0) ::_exit(alarm.code);  // rank 0 has said why
        if (told) {
          alarm.text[sizeof alarm.text - 1] = 0;
          std::this_thread::sleep_for(std::chrono::seconds(1));  // rank 0 may be about to say the same of itself
          end(alarm.code, name(int(r)) + ": " + alarm.text);
        }
        // Rank 0 says it, or where it is rank 0 the next one.
        say(rank < 2 ? name(int(r)) + " ended; stopped" + kept() : "");
        tell_all(1);
        ::_exit(1);
      }
    }
  }

  std::string kept() const {
    if (!checkpoint) return ". There is no checkpoint yet";
    return ". The last checkpoint is of step " + std::to_string(checkpoint) + "; --resume goes on from there";
  }

  // A rank that the main thread talks to is gone: the watchdog is about to see it, too.
  [[noreturn]] void lost(int other) {
    std::this_thread::sleep_for(std::chrono::seconds(5));
    end(1, "the connection to " + name(other) + " broke; stopped" + kept());
  }

  // One line on stderr; the first is the only one.
  void say(const std::string& line) {
    if (said_.test_and_set()) std::this_thread::sleep_for(std::chrono::seconds(60));  // the other thread is at it
    if (!line.empty()) std::fprintf(stderr, "%serror: %s\n", ::isatty(STDOUT_FILENO) ? "\n" : "", line.c_str());
  }

  // Whether this rank has ended without a word.
  bool gone(const Peer& peer) const {
    char next;
    return peer.alarm >= 0 && ::recv(peer.alarm, &next, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
  }

  // Ends this process and all others. Rank 0 says why; another rank tells rank 0, and says it where there is none.
  [[noreturn]] void end(int code, std::string why) {
    if (rank == 0 && code == 1) {  // an error of CUDA or NCCL may come from a rank that is about to be found gone
      std::this_thread::sleep_for(std::chrono::seconds(3));
      for (int r = 1; r < size; ++r)
        if (gone(peers_[r])) why = name(r) + " ended; stopped" + kept();
    }
    Alarm alarm = {code, ""};
    std::strncpy(alarm.text, why.c_str(), sizeof alarm.text - 1);
    if (rank > 0 && watchdog_.joinable()) {
      write_all(peers_[0].alarm, &alarm, sizeof alarm);
      std::this_thread::sleep_for(std::chrono::seconds(8));  // meanwhile rank 0 ends us
    }
    say(why);
    tell_all(code);
    ::_exit(code);
  }
  void tell_all(int code) const {
    const Alarm alarm = {code, ""};
    for (const Peer& peer : peers_)
      if (rank == 0 && peer.alarm >= 0) write_all(peer.alarm, &alarm, sizeof alarm);
  }
};

// ---------------------------------------------------------------------------------------------------------------------

// `train --ranks N`: starts this program N times on this host with the same arguments, as one rank each, passes SIGINT
// and SIGTERM on and waits. When one fails, the others end by themselves; what is left after ten seconds is killed.
// Returns the exit code: that of the first rank that failed, 1 for a signal.
inline int start_ranks(int ranks, char** argv) {
  int alive[2];
  if (::pipe(alive) != 0) throw std::runtime_error(std::string("pipe: ") + std::strerror(errno));
  ::fcntl(alive[1], F_SETFD, FD_CLOEXEC);  // only we hold this end: when we end, every rank sees it
  const int listener = listen_at(0, true), port = port_of(listener);
  char self[4096] = "";
  if (::readlink("/proc/self/exe", self, sizeof self - 1) < 0) std::strncpy(self, argv[0], sizeof self - 1);

  // Ranks are process groups of their own: Ctrl-C reaches them once, through us.
  posix_spawnattr_t how;
  ::posix_spawnattr_init(&how);
  ::posix_spawnattr_setflags(&how, POSIX_SPAWN_SETPGROUP);
  static volatile std::sig_atomic_t to_pass_on;
  to_pass_on = 0;
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int s) { to_pass_on = s; });

  std::vector<pid_t> pids(ranks, 0);
  int running = 0, result = 0;
  std::string first;  // how the first that failed ended, if nobody else can say it
  for (int r = 0; r < ranks; ++r) {
    std::vector<std::string> variables;
    for (const auto& [name, value] : {std::pair<const char*, std::string>{"RANK", std::to_string(r)},
                                      {"LOCAL_RANK", std::to_string(r)},
                                      {"WORLD_SIZE", std::to_string(ranks)},
                                      {"MASTER_ADDR", "127.0.0.1"},
                                      {"MASTER_PORT", std::to_string(port)},
                                      {"PARTIAL_ROPE_STARTER", std::to_string(alive[0])},
                                      {"PARTIAL_ROPE_LISTENER", std::to_string(listener)}})
      variables.push_back(std::string(name) + "=" + value);
    if (!std::getenv("OMP_NUM_THREADS"))  // the ranks share the cores
      variables.push_back("OMP_NUM_THREADS=" +
                          std::to_string(std::max(1, int(std::thread::hardware_concurrency()) / ranks)));
    std::vector<char*> environment;
    for (std::string& variable : variables) environment.push_back(variable.data());
    for (char** variable = environ; *variable; ++variable) {
      const std::string name(*variable, std::strcspn(*variable, "=") + 1);
      bool ours = name.rfind("TORCHELASTIC_", 0) == 0;
      for (const std::string& own : variables) ours = ours || own.compare(0, name.size(), name) == 0;
      if (!ours) environment.push_back(*variable);
    }
    environment.push_back(nullptr);
    if (const int error = ::posix_spawn(&pids[r], self, nullptr, &how, argv, environment.data())) {
      first = "rank " + std::to_string(r) + " cannot be started: " + std::strerror(error);
      pids[r] = 0;
      result = 1;
      break;
    }
    ++running;
  }
  ::close(listener);
  bool told = false;  // a rank failed with an exit code, so rank 0 has said why
  auto until = std::chrono::steady_clock::now() + std::chrono::seconds(result ? 0 : 1 << 30);
  while (running > 0) {
    int status = 0;
    const pid_t pid = ::waitpid(-1, &status, WNOHANG);
    for (int r = 0; pid > 0 && r < ranks; ++r) {
      if (pids[r] != pid) continue;
      pids[r] = 0;
      --running;
      if (status == 0) continue;
      if (!result) until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      if (!result) result = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
      if (WIFEXITED(status)) told = true;
      if (first.empty() && !WIFEXITED(status))
        first = "rank " + std::to_string(r) + " was ended by signal " + std::to_string(WTERMSIG(status));
    }
    if (pid > 0) continue;
    const int signal = std::chrono::steady_clock::now() > until ? SIGKILL : to_pass_on;
    to_pass_on = 0;
    for (pid_t running_pid : pids)
      if (running_pid && signal) ::kill(running_pid, signal);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  if (result && !told) std::fprintf(stderr, "error: %s\n", first.c_str());
  return result;
}
