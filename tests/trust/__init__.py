"""Tries to break the promises of SECURITY.md; report.py has the form of what each target of the Makefile tells.

make asan, make tsan    sanitizers       planted_faults.cpp, tsan_openmp.cpp, tsan.supp
make fuzz               fuzz_ops         fuzz_cases, fuzz_tensors, fuzz_judge, fuzz_watch
make fuzz-files         fuzz_files
make faults             faults           fault_scenarios, fault_injection.c
make statistics         statistics       goodness_of_fit
make soak               soak
make emulator           emulator         tests/test_simt.py
make portability        portability      environments, cuda_stubs, aarch64, simd_checks.cpp
"""
