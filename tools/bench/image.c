/*
 * The guest that runs on a vCPU. In QEMU it boots, fills its memory, says so on QEMU's debug port, and touches a page
 * after the other, in the order in which the threads of touch.c do. On our own vCPU (vcpu.c) the very same program begins
 * at the touching, with the memory that gmemd brings. Nothing but this file runs in either.
 *
 * A multiboot loader enters in 32 bits, in supervisor mode and without paging. A KVM that has no hardware below it
 * emulates that, some hundred times slower; hence the way into 64 bits and user mode, with the first 4 GiB mapped one to
 * one in pages of 2 MiB.
 */
#include "image.h"

#include "pattern.h"

enum {
    TABLE_ENTRY = 7, /* present, writable, user */
    TABLE = 512,
};

/* What a loader looks for: magic number, no wishes, checksum. */
__attribute__((section(".multiboot"), used)) static const uint32_t multiboot[] = {
    0x1badb002u, 0, 0u - 0x1badb002u};

#define PAGE_ALIGNED __attribute__((aligned(4096), used))

uint8_t stack[PATTERN_PAGE] PAGE_ALIGNED;
uint64_t directory[4 * TABLE] PAGE_ALIGNED; /* filled in on the way */
uint64_t pointers[TABLE] PAGE_ALIGNED = {
    (uintptr_t)directory + TABLE_ENTRY,
    (uintptr_t)(directory + TABLE) + TABLE_ENTRY,
    (uintptr_t)(directory + 2 * TABLE) + TABLE_ENTRY,
    (uintptr_t)(directory + 3 * TABLE) + TABLE_ENTRY,
};
uint64_t root[TABLE] PAGE_ALIGNED = {(uintptr_t)pointers + TABLE_ENTRY};
/* Flat: code of 64 bits, and code and data for user mode. */
uint64_t segments[] __attribute__((used)) = {0, 0x00af9b000000ffffu, 0x00affb000000ffffu,
                                             0x00cff3000000ffffu};
struct __attribute__((packed)) {
    uint16_t limit;
    uint32_t base;
} segments_at __attribute__((used)) = {sizeof(segments) - 1, 0};

__asm__(".code32\n"
        ".globl _start\n"
        "_start:\n"
        "   mov $directory, %edi\n"
        "   mov $0x87, %eax\n" /* present, writable, user, 2 MiB */
        "   mov $2048, %ecx\n"
        "1: mov %eax, (%edi)\n"
        "   add $0x200000, %eax\n"
        "   add $8, %edi\n"
        "   loop 1b\n"
        "   mov $root, %eax\n"
        "   mov %eax, %cr3\n"
        "   mov $0x20, %eax\n" /* CR4.PAE */
        "   mov %eax, %cr4\n"
        "   mov $0xc0000080, %ecx\n" /* EFER.LME */
        "   rdmsr\n"
        "   or $0x100, %eax\n"
        "   wrmsr\n"
        "   movl $segments, segments_at + 2\n"
        "   lgdt segments_at\n"
        "   mov $stack + 4096, %esp\n"
        "   mov $0x80000033, %eax\n" /* CR0.PG, NE, ET, MP, PE */
        "   mov %eax, %cr0\n"
        "   ljmp $8, $2f\n"
        ".code64\n"
        "2: pushq $0x1b\n" /* ss */
        "   push $stack + 4088\n" /* as after a call */
        "   pushq $0x3002\n" /* flags: IOPL 3, so that user mode may use ports */
        "   pushq $0x13\n" /* cs */
        "   push $guest\n"
        "   iretq\n");

static struct image_told *const told = (struct image_told *)IMAGE_TOLD;

static volatile uint64_t *first_word(uint32_t page)
{
    return (volatile uint64_t *)(IMAGE_MEMORY + page * (uintptr_t)PATTERN_PAGE);
}

static void say(char letter)
{
    __asm__ volatile("outb %0, %1" : : "a"(letter), "Nd"((uint16_t)IMAGE_PORT) : "memory");
}

static uint64_t cycles(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

static void touch_page(uint32_t page)
{
    uint64_t before = cycles(), value = *first_word(page), took = cycles() - before;

    if (value != (uint64_t)page + 1) {
        told->wrong_page = page;
        told->wrong_found = value;
        say(IMAGE_WRONG);
    }
    told->touches++;
    if (took >= WAIT_CYCLES && told->waits < IMAGE_WAITS)
        told->wait[told->waits++] = took;
}

static void think(void)
{
    uint64_t until = cycles() + THINK_CYCLES;

    while (cycles() < until)
        ;
}

/* The linker puts it at IMAGE_ENTRY. */
__attribute__((section(".touching"), noinline, used, noreturn)) static void touch(void)
{
    unsigned half = pattern_half(PAGES);

    told->begin = cycles();
    for (uint32_t place = 0; told->touches < TOUCHES; place = place + 1 < PAGES ? place + 1 : 0) {
        touch_page(RANDOM ? pattern_shuffled(place, PAGES, half) : place);
        if (THINK_CYCLES)
            think();
    }
    told->end = cycles();
    for (;;)
        say(IMAGE_ENDED);
}

__attribute__((used, noreturn)) static void guest(void)
{
    for (uint32_t page = 0; page < PAGES; page++)
        for (uint32_t word = 0; word < PATTERN_PAGE / 8; word++)
            first_word(page)[word] = page + word + 1;
    say(IMAGE_FILLED);
    touch();
}
