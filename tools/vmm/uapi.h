/*
 * What the headers of a build host may lack: KVM's guest_memfd (Linux 6.8, its flags 6.18) and
 * what is proposed on top of it. Whether the running kernel has any of it is found out by trying.
 */
#ifndef GMEMD_VMM_UAPI_H
#define GMEMD_VMM_UAPI_H

#include <linux/kvm.h>
#include <linux/userfaultfd.h>

#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
    __u64 size;
    __u64 flags;
    __u64 reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif

#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif

#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif

#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#endif

#ifndef GUEST_MEMFD_FLAG_INIT_SHARED
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#endif

/* Proposed: pwrite() populates the file. */
#ifndef GUEST_MEMFD_FLAG_WRITE
#define GUEST_MEMFD_FLAG_WRITE (1ULL << 3)
#endif

#endif
