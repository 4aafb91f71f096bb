// device/ranks.h and device/comm.h: who a process is, and what several ranks, here threads, tell each other. What
// becomes of real processes, also of those that die, is in tests/ranks.sh.
#include "device/comm.h"

#include <doctest/doctest.h>

#include <functional>
#include <map>

#include "tests/cuda.h"

namespace {

// process_from_environment() with these variables and no others of its kind.
Process process_with(const std::map<std::string, std::string>& variables) {
  for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                           "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                           "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"})
    ::unsetenv(name);
  for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
  struct Clear {
    const std::map<std::string, std::string>& names;
    ~Clear() {
      for (const auto& name : names) ::unsetenv(name.first.c_str());
    }
  } clear{variables};
  return process_from_environment();
}

// work(ranks) on `size` ranks, each a thread.
void on_ranks(int size, const std::function<void(Ranks&)>& work) {
  const int listener = listen_at(0, true), port = port_of(listener);
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r)
    threads.emplace_back([=, &work] {
      Process process;
      process.rank = r, process.ranks = size, process.port = port, process.listener = r == 0 ? listener : -1;
      Ranks ranks(process);
      work(ranks);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

TEST_CASE("comm: who a process is") {
  const Process alone = process_with({});
  CHECK(alone.ranks == 1);
  const Process torch = process_with({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "node7"},
                                  {"MASTER_PORT", "1234"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  CHECK(torch.rank == 5);
  CHECK(torch.ranks == 8);
  CHECK(torch.local == 1);
  CHECK(torch.address == "node7");
  CHECK(torch.port == 1235);  // torchrun listens at 1234
  const std::map<std::string, std::string> slurm = {{"SLURM_PROCID", "3"}, {"SLURM_STEP_NUM_TASKS", "4"},
                                                    {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "1234567"}};
  const Process srun = process_with(slurm);
  CHECK(srun.rank == 3);
  CHECK(srun.ranks == 4);
  CHECK(srun.local == 1);
  CHECK(srun.port == 24567);
  // mpirun inside of a Slurm job: its daemons were started by srun.
  std::map<std::string, std::string> both = slurm;
  both.insert({{"OMPI_COMM_WORLD_RANK", "9"}, {"OMPI_COMM_WORLD_SIZE", "16"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "2"}});
  CHECK(process_with(both).rank == 9);
  CHECK(process_with(both).ranks == 16);
  CHECK(process_with(both).local == 2);
  // The script of a batch job is no rank: only srun numbers its tasks.
  CHECK(process_with({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}).ranks == 1);
  auto error = [](const std::map<std::string, std::string>& v) { return error_of([&] { process_with(v); }); };
  CHECK(contains(error({{"RANK", "4"}, {"WORLD_SIZE", "4"}}), "RANK=4: must be below WORLD_SIZE=4"));
  CHECK(contains(error({{"RANK", "one"}, {"WORLD_SIZE", "4"}}), "RANK=one"));
  CHECK(contains(error({{"MASTER_PORT", "70000"}}), "MASTER_PORT=70000"));
}

TEST_CASE("comm: a port that is in use is refused") {
  const int listener = listen_at(0, true);
  CHECK(contains(error_of([&] { listen_at(port_of(listener), true); }), "in use"));
  ::close(listener);
}

TEST_CASE("comm: small gathers, on one rank and on several") {
  for (int size : {1, 2, 5}) {
    std::atomic<int> right{0};
    on_ranks(size, [&](Ranks& ranks) {
      std::vector<double> rows(2 * size, -1);
      rows[2 * ranks.rank] = 10 * ranks.rank, rows[2 * ranks.rank + 1] = 0.5;
      ranks.all_gather(rows.data(), 2 * sizeof(double));
      bool good = true;
      for (int r = 0; r < size; ++r) good = good && rows[2 * r] == 10 * r && rows[2 * r + 1] == 0.5;
      const std::vector<std::string> texts = ranks.gather(std::string(ranks.rank, 'x'));
      good = good && texts.size() == size_t(ranks.root() ? size : 0);
      for (size_t r = 0; r < texts.size(); ++r) good = good && texts[r] == std::string(r, 'x');
      int number = ranks.root() ? 42 : 0;
      ranks.broadcast(&number, sizeof number);
      right += good && number == 42;
    });
    CHECK(right == size);
  }
}

TEST_CASE("comm: lanes are added in the order of the ranks, to the bit") {
  const size_t shard = 1000;
  for (int size : {1, 2, 4}) {
    std::vector<std::vector<float>> lanes;  // (round * ranks + rank, ranks * shard)
    for (int lane = 0; lane < 2 * size; ++lane) lanes.push_back(random_values<float>(size * shard, 300 + lane));
    std::vector<float> expected = lanes[0];
    for (int lane = 1; lane < 2 * size; ++lane)
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += lanes[lane][i];
    std::vector<float> sum(size * shard), once = lanes[0];
    for (int lane = 1; lane < size; ++lane)
      for (size_t i = 0; i < once.size(); ++i) once[i] += lanes[lane][i];
    std::atomic<int> in_place{0};
    on_ranks(size, [&](Ranks& ranks) {
      Cpu be;
      Comm<Cpu> comm(be, ranks);
      float* mine = &sum[ranks.rank * shard];
      for (int round = 0; round < 2; ++round)
        comm.add_lanes(mine, lanes[round * size + ranks.rank].data(), shard, round == 0);
      std::vector<float> own = lanes[ranks.rank];  // the sum takes the process of the own row
      comm.add_lanes(&own[ranks.rank * shard], own.data(), shard, true);
      comm.all_gather(own.data(), shard * sizeof(float));
      in_place += same_bits(own, once);
    });
    CHECK(same_bits(sum, expected));
    CHECK(in_place == size);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA against the CPU

#ifdef __CUDACC__

TEST_CASE("cuda: lanes are added in the order of the ranks, to the bit") {
  NEEDS_GPU;
  for (size_t n : {size_t(64), size_t(1003), size_t(1 << 20)})
    for (int ranks : {1, 4})
      for (bool first : {true, false}) {
        const int rank = ranks - 1;
        const Values own = numbers<float>(n, 320), received = numbers<float>(n * ranks, 321);
        Values sum = numbers<float>(n, 322);
        Tensor<float> device_own(own), device_received(received), got(sum);
        add_rows_in_order(cpu, sum.data(), own.data(), received.data(), rank, ranks, n, first);
        add_rows_in_order(*gpu(), got(), device_own(), device_received(), rank, ranks, n, first);
        CHECK(same_bits(got.bits(), sum));
        if (!first) continue;
        add_rows_in_order(*gpu(), device_own(), device_own(), device_received(), rank, ranks, n, first);
        CHECK(same_bits(device_own.bits(), sum));  // in the place of the own lane
      }
}

#endif  // __CUDACC__
