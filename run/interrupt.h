#pragma once
// Ctrl-C and SIGTERM: a loop that looks at `interrupted` ends after the step it is in.

#include <csignal>

inline volatile std::sig_atomic_t interrupted = 0;

inline void watch_interrupts() {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { interrupted = 1; });
}
