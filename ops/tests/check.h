// The few macros the C++ tests need: a failed check prints its place and ends the process with status 1.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);                               \
      std::exit(1);                                                                                                    \
    }                                                                                                                  \
  } while (0)

#define CHECK_THROWS(expression, Type)                                                                                 \
  do {                                                                                                                 \
    bool thrown = false;                                                                                               \
    try {                                                                                                              \
      expression;                                                                                                      \
    } catch (const Type &) {                                                                                           \
      thrown = true;                                                                                                   \
    }                                                                                                                  \
    if (!thrown) {                                                                                                     \
      std::fprintf(stderr, "%s:%d: %s did not throw %s\n", __FILE__, __LINE__, #expression, #Type);                    \
      std::exit(1);                                                                                                    \
    }                                                                                                                  \
  } while (0)

#define RUN(test)                                                                                                      \
  do {                                                                                                                 \
    std::printf("%s\n", #test);                                                                                        \
    std::fflush(stdout);                                                                                               \
    test();                                                                                                            \
  } while (0)
