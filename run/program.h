// What every program does around its work: OpenMP's waiting, the number of threads, exit codes, what Ctrl-C does.
#pragma once
#include <omp.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <ctime>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "run/error.h"

// As the user called this program, e.g. build/train; for what it says to call next.
inline std::string program = "build/train";

// The program NAME of the same build.
inline std::string sibling(const std::string& name) {
  const size_t slash = program.rfind('/');
  return (slash == std::string::npos ? "" : program.substr(0, slash + 1)) + name;
}

// Threads that wait for each other shall sleep, not spin: spinning takes the cores from whatever else runs there, and
// training beside one busy process falls to a tenth. But to sleep and to be woken takes longer than most waits here, so
// they spin a little first, tens of microseconds: a tenth faster alone, a tenth slower beside a busy process. libgomp
// reads the variables before main() begins, so the program starts itself once more with them; where it cannot, nothing
// is lost but speed. A user's own setting stands.
inline void wait_passively(char** argv) {
  for (const char* own : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})
    if (std::getenv(own)) return;
  ::setenv("OMP_WAIT_POLICY", "passive", 1);
  ::setenv("GOMP_SPINCOUNT", "1000", 1);
  char path[PATH_MAX];
  const ssize_t n = ::readlink("/proc/self/exe", path, sizeof path - 1);
  if (n <= 0) return;
  path[n] = 0;
  ::execv(path, argv);
}

// --threads: 0 leaves it to OpenMP, which takes all cores.
inline void use_threads(int threads) {
  if (threads < 0) throw UserError("--threads " + std::to_string(threads) + ": must be 0 (all cores) or more");
  if (threads > omp_get_num_procs()) {
    std::fprintf(stderr, "note: --threads %d: there are %d cores here; %d threads\n", threads, omp_get_num_procs(),
                 omp_get_num_procs());
    threads = omp_get_num_procs();
  }
  if (threads) omp_set_num_threads(threads);
}

// The body of every main(): calls work(arguments), which gives the exit code. A user's mistake ends in one line on
// stderr and exit code 2, and so does output that cannot be written; whatever else goes wrong, in one line and exit
// code 1.
template <class Work>
int run_program(char** argv, Work work) {
  wait_passively(argv);
  if (argv[0]) program = argv[0];
  std::vector<std::string> arguments;
  for (char** word = argv; *word && *++word;) arguments.push_back(*word);
  try {
    const int code = work(arguments);
    flush_output();
    return code;
  } catch (const UserError& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 2;
  } catch (const std::filesystem::filesystem_error& e) {
    std::fprintf(stderr, "error: %s: %s\n", e.path1().c_str(), e.code().message().c_str());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Ctrl-C and SIGTERM. The first says what will be done, and the loop that looks at `interrupted` does it after the step
// it is in; the second ends the program where it is. Exit codes 130 and 143, as a shell has them.

inline volatile std::sig_atomic_t interrupted = 0;  // the signal's number
inline const char* interrupt_text = "";             // what will be done

inline double interrupted_at = 0;

inline void on_interrupt(int signal) {
  timespec time;
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  const double now = time.tv_sec + 1e-9 * time.tv_nsec;
  // One Ctrl-C may come twice: from the terminal, and passed on by the program that started this one.
  if (interrupted && now > interrupted_at + 0.3) ::_exit(128 + signal);
  if (interrupted) return;
  interrupted = signal;
  interrupted_at = now;
  if (::write(STDERR_FILENO, interrupt_text, std::strlen(interrupt_text)) < 0) return;
}

inline void watch_interrupts(const char* text) {
  interrupt_text = text;
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, on_interrupt);
}
