"""The launchers of csrc/cuda in the emulator: build, device memory, random cases, NumPy oracle."""
