#pragma once

#include <functional>

// What the host side of the shim and the tests say to the emulator.

namespace emulator {

using Body = std::function<void()>;  // one kernel thread

}  // namespace emulator

extern "C" {

// schedule: in_order, reversed, warp_priority or priority_changes. resident: how many blocks fit on the device at once,
// also its number of multiprocessors. capability: of the device, 80 or 90. code: what the kernels were compiled for, at
// most that. eager: every launch runs to its end before it returns (dependent launches never overlap then). Returns 0,
// or 1 if an argument is not valid. Nothing may be queued. Every other size or architecture is a device of its own.
int emulator_configure(const char* schedule, unsigned long long seed, int resident, int capability, int code,
                       int eager);

// How often the host has queried the device about kernels, or set an attribute of one.
unsigned emulator_questions();

// Runs everything that was launched. A broken kernel ends the process with a report on standard error.
void emulator_synchronize();

// Memory with redzones right at both ends under AddressSanitizer, aligned and filled as a device allocation may be.
void* emulator_allocate(size_t bytes);
void emulator_free(void* data);
}
