#include "toy.h"

// planted NAME correct|broken SCHEDULE SEED: exits with 0 if all results are right, 1 if not; a report aborts.
int main(int argc, char** argv) {
  const auto found = argc == 5 ? toy::toys().find(argv[1]) : toy::toys().end();
  if (found == toy::toys().end()) {
    for (const auto& [name, toy] : toy::toys()) std::puts(name.c_str());
    return argc == 1 ? 0 : 2;
  }
  const toy::Toy& toy = found->second;
  if (emulator_configure(argv[3], std::strtoull(argv[4], nullptr, 10), 8, 90, toy.code, 0) != 0) return 2;
  const int wrong = toy.run(std::string(argv[2]) == "broken");
  if (wrong > 0) std::fprintf(stderr, "%d wrong results\n", wrong);
  return wrong > 0;
}
