"""Prints the flags with which C++ is compiled and linked against torch, for the Makefile here."""

from __future__ import annotations

import sysconfig

import torch
from torch.utils.cpp_extension import include_paths, library_paths

abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
includes = [*include_paths(), sysconfig.get_path("include")]
libraries = [f"-L{path} -Wl,-rpath,{path}" for path in library_paths()]
print("TORCH_FLAGS := -std=c++20 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_C", end=" ")
print("-DAT_PER_OPERATOR_HEADERS", end=" ")
print(f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *(f"-isystem {path}" for path in includes))
print("TORCH_LINK :=", *libraries, "-lc10 -ltorch -ltorch_cpu -ltorch_python")
