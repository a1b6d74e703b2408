#include "toy.h"

// planted NAME correct|broken SCHEDULE SEED: exits with 0 if all results are right, 1 if not; a report aborts.
int main(int argc, char** argv) {
  if (argc != 5 || emulator_configure(argv[3], std::strtoull(argv[4], nullptr, 10), 8, 90, 0) != 0) {
    for (const auto& [name, run] : toy::toys()) std::puts(name.c_str());
    return argc == 1 ? 0 : 2;
  }
  const int wrong = toy::toys().at(argv[1])(std::string(argv[2]) == "broken");
  if (wrong > 0) std::fprintf(stderr, "%d wrong results\n", wrong);
  return wrong > 0;
}
