/* What this kernel and this process can do, each found by trying it once on a page of its own. */
#ifndef GM_PROBE_H
#define GM_PROBE_H

/* python */
/* What one trial found. */
struct gm_trial {
    int ok;           /* 1 yes, 0 no, -1 it could not be tried */
    int error;        /* errno of the step that failed, or 0 */
    long long value;  /* what it means stands with each function; else 0 */
    const char *step; /* where it ended, for people */
};

enum gm_probe_backing {
    GM_PROBE_ANONYMOUS,
    GM_PROBE_MEMFD,
    GM_PROBE_HUGETLB,       /* 2 MiB pages */
    GM_PROBE_GUEST_MEMFD,   /* MMAP, INIT_SHARED, and WRITE where the kernel has it */
    GM_PROBE_NO_DIRECT_MAP, /* the same, with NO_DIRECT_MAP */
};

enum gm_probe_way { GM_PROBE_DEVICE, GM_PROBE_SYSCALL, GM_PROBE_USER_MODE_ONLY };

/* Register modes, numbered as in the kernel. */
#define GM_PROBE_MISSING 1
#define GM_PROBE_MINOR 4

/* What came of a read from the page by the kernel, which is how KVM reads, too. */
enum gm_probe_seen {
    GM_PROBE_SEEN_NOTHING, /* it neither trapped nor ended in time */
    GM_PROBE_SEEN_MINOR,   /* trapped, as a minor fault */
    GM_PROBE_SEEN_MISSING, /* trapped, as a missing page */
    GM_PROBE_SEEN_CONTENT, /* ended, with the content that we had put there */
    GM_PROBE_SEEN_ZERO,    /* ended, with zeros */
    GM_PROBE_SEEN_OTHER,   /* ended, with something else */
    GM_PROBE_SEEN_REFUSED, /* ended in an error */
};

enum gm_probe_resolve {
    GM_PROBE_CONTINUE,
    GM_PROBE_COPY,
    GM_PROBE_ZEROPAGE,
    GM_PROBE_MOVE,
    GM_PROBE_POISON,
};

enum gm_probe_populate {
    GM_PROBE_BY_WRITE,
    GM_PROBE_BY_RECV,
    GM_PROBE_BY_COPY,
    GM_PROBE_BY_MADVISE, /* MADV_POPULATE_WRITE */
};

/* userfaultfd. All but the first open one by the first way that works. */
struct gm_trial gm_probe_uffd_open(int way);
/* value: the feature bits */
struct gm_trial gm_probe_uffd_features(void);
/* value: the gm_probe_seen of the first touch, before any CONTINUE */
struct gm_trial gm_probe_trap(int backing, int modes, int present);
/* value: a gm_probe_seen */
struct gm_trial gm_probe_resolve(int backing, int how);
struct gm_trial gm_probe_wake(int backing);
struct gm_trial gm_probe_thread_id(int backing);
struct gm_trial gm_probe_event_remove(int backing);

/* Memory files. value, of GM_PROBE_BY_WRITE: the errno of a second write to the same page, or 0 */
struct gm_trial gm_probe_populate(int backing, int how);
struct gm_trial gm_probe_pin(int backing);

/* KVM. in_slot: the slot is given the guest_memfd itself, and not only its mapping. */
/* value: the API version */
struct gm_trial gm_probe_kvm(void);
struct gm_trial gm_probe_kvm_vm(void);
struct gm_trial gm_probe_guest_memfd(unsigned long long flags);
struct gm_trial gm_probe_slot(int backing, int in_slot);
struct gm_trial gm_probe_kvm_userfault(void);
struct gm_trial gm_probe_prefault(void);

/* The CPU. value: nanoseconds a reading of the clock takes */
struct gm_trial gm_probe_clock(void);
struct gm_trial gm_probe_crc32c(void);
/* end python */

#endif
