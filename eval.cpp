// eval: what a trained model knows, says and does. A table of commands; each stands beside what it computes.

#include <cstdio>

#include "eval/huggingface.h"  // defines: command_export, command_import
#include "eval/logits.h"       // defines: command_logits, command_gradients
#include "eval/loss.h"         // defines: command_loss
#include "eval/memory.h"       // defines: command_memory
#include "eval/positions.h"    // defines: command_positions, command_length
#include "eval/questions.h"    // defines: command_choices, command_lambada
#include "eval/sample.h"       // defines: command_sample
#include "eval/trace_print.h"  // defines: command_trace
#include "run/program.h"        // defines: run_program

namespace {

using Args = std::vector<std::string>;

struct Command {
  std::string name, about;
  int (*work)(const Args& flags);  // gives the exit code
};

template <void work(const Args&)>
int and_0(const Args& flags) {
  return work(flags), 0;
}

const std::vector<Command> commands = {
    {"loss", "nats per token and bits per byte on a shard", and_0<command_loss>},
    {"sample", "text from the model", and_0<command_sample>},
    {"trace", "one token through partial RoPE, byte by byte", command_trace},
    {"choices", "multiple choice by log-likelihood", and_0<command_choices>},
    {"lambada", "the last word of a passage", and_0<command_lambada>},
    {"positions", "loss by position in the window", and_0<command_positions>},
    {"length", "the same at 1, 2, 4 and 8 times the training context", and_0<command_length>},
    {"memory", "every tensor's bytes for a configuration", and_0<command_memory>},
    {"export", "a directory that Hugging Face's library loads", and_0<command_export>},
    {"import", "a run from such a directory", and_0<command_import>},
    {"logits", "token ids in, a .npy file of logits out", and_0<command_logits>},
    {"gradients", "token ids in, a safetensors file of gradients out", and_0<command_gradients>},
};

int run_command(const Args& args) {
  std::vector<std::string> names;
  std::string all;
  for (const Command& command : commands) {
    names.push_back(command.name);
    all += (all.empty() ? "" : ", ") + command.name;
  }
  if (args.empty()) throw UserError("no command; there are: " + all + " (eval --help)");
  const std::string& name = args[0];
  if (name == "--help" || name == "-h" || name == "help") {
    std::printf("What a trained model knows, says and does.\nUsage: eval COMMAND [flags]\n\n");
    for (const Command& command : commands) std::printf("  %-10s %s\n", command.name.c_str(), command.about.c_str());
    std::printf("\neval COMMAND --help lists the flags of a command.\n");
    return 0;
  }
  if (name == "--version") return std::printf("%s\n", version_text().c_str()), 0;
  for (const Command& command : commands)
    if (name == command.name) return command.work({args.begin() + 1, args.end()});
  const std::string guess = closest(name, names);
  throw UserError(name + ": no such command; " + (guess.empty() ? "there are: " + all : "did you mean " + guess + "?"));
}

}  // namespace

int main(int, char** argv) {
  return run_program(argv, run_command);
}
