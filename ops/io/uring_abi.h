// The part of the kernel's io_uring interface used here, written down from its documented layout (io_uring_setup(2),
// io_uring_enter(2)), so that neither liburing nor recent kernel headers are needed to build. The numbers are ABI:
// they never change, and a kernel that lacks a feature says so at run time.
#pragma once

#include <cstdint>

namespace zinf::io::uring {

// The same on every architecture but alpha.
constexpr long kSysSetup = 425;
constexpr long kSysEnter = 426;
constexpr long kSysRegister = 427;

constexpr uint8_t kOpRead = 22; // since Linux 5.6
constexpr uint8_t kOpWrite = 23;

constexpr uint32_t kSetupClamp = 1u << 4;
constexpr uint32_t kSetupSubmitAll = 1u << 7;     // 5.18
constexpr uint32_t kSetupCoopTaskrun = 1u << 8;   // 5.19
constexpr uint32_t kSetupSingleIssuer = 1u << 12; // 6.0
constexpr uint32_t kSetupDeferTaskrun = 1u << 13; // 6.1

constexpr uint32_t kFeatureSingleMmap = 1u << 0;
constexpr uint32_t kFeatureNoDrop = 1u << 1;

constexpr uint32_t kEnterGetEvents = 1u << 0;

constexpr uint32_t kRegisterProbe = 8;
constexpr uint16_t kOpSupported = 1u << 0;

constexpr uint64_t kOffsetSubmission = 0;
constexpr uint64_t kOffsetEntries = 0x10000000;

struct SubmissionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  uint64_t user_address;
};

struct CompletionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  uint64_t user_address;
};

struct Params {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  uint32_t reserved[3];
  SubmissionOffsets sq;
  CompletionOffsets cq;
};
static_assert(sizeof(Params) == 120, "struct io_uring_params is 120 bytes");

struct Submission {
  uint8_t opcode, flags;
  uint16_t io_priority;
  int32_t fd;
  uint64_t offset;
  uint64_t address;
  uint32_t length, rw_flags;
  uint64_t user_data;
  uint64_t rest[3];
};
static_assert(sizeof(Submission) == 64, "struct io_uring_sqe is 64 bytes");

struct Completion {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(Completion) == 16, "struct io_uring_cqe is 16 bytes");

struct ProbeOp {
  uint8_t op, reserved;
  uint16_t flags;
  uint32_t reserved2;
};

struct Probe {
  uint8_t last_op, num_ops;
  uint16_t reserved;
  uint32_t reserved2[3];
  ProbeOp ops[64];
};
static_assert(sizeof(Probe) == 16 + 64 * 8, "struct io_uring_probe is 16 bytes and its operations");

} // namespace zinf::io::uring
