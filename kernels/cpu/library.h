// The operators of a build are registered under autoq_<instruction set>, so that several builds live in one process.
#pragma once

#include <torch/library.h>

#ifndef AUTOQ_ISA
#error "compile with -DAUTOQ_ISA=<name>: it names the namespace of the operators"
#endif
#define AUTOQ_TEXT_OF(name) #name
#define AUTOQ_TEXT(name) AUTOQ_TEXT_OF(name)
#define AUTOQ_JOIN_OF(a, b) a##b
#define AUTOQ_JOIN(a, b) AUTOQ_JOIN_OF(a, b)
#define AUTOQ_NAMESPACE AUTOQ_JOIN(autoq_, AUTOQ_ISA)
// One more level, because torch's macros paste the name before it is expanded.
#define AUTOQ_LIBRARY(name, library) TORCH_LIBRARY(name, library)
#define AUTOQ_LIBRARY_FRAGMENT(name, library) TORCH_LIBRARY_FRAGMENT(name, library)
#define AUTOQ_LIBRARY_IMPL(name, key, library) TORCH_LIBRARY_IMPL(name, key, library)
