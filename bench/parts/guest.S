/*
 * A guest that keeps writing to its memory at a steady pace and is otherwise asleep.
 *
 * 100 times a second it changes one word in each of TICK_PAGES pages, going round in SET_PAGES pages from SET on; in
 * between it halts, so that it takes next to no processor time away from what is measured. TICK_PAGES 0 makes a guest
 * that runs, and does nothing. It says R on its serial port when it is ready.
 *
 * A multiboot kernel: 32-bit protected mode without paging, loaded at 1 MiB by QEMU's -kernel. The timer's 100 Hz need
 * an interrupt table of one gate, the interrupt controllers moved away from the processor's exceptions, and a
 * descriptor table of our own, since what the loader leaves of its own is undefined.
 */
#define SET         0x1000000
#define TIMER       0x20
#define DIVISOR     11932               /* 1193182 Hz / 100 */
#if TICK_PAGES
#define TIMER_MASK  0xfe
#else
#define TIMER_MASK  0xff                /* nothing ever wakes it */
#endif

        .text
        .align  4
        .long   0x1badb002, 0, -0x1badb002

        .globl  _start
_start: cli
        movl    $stack_top, %esp
        lgdt    gdt_pointer
        ljmp    $8, $1f
1:      movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss

        movl    $tick, %eax             /* the gate: a 32-bit interrupt gate to tick, in segment 8 */
        movw    %ax, idt + TIMER * 8
        shrl    $16, %eax
        movw    %ax, idt + TIMER * 8 + 6
        movl    $0x8e000008, %eax
        movw    %ax, idt + TIMER * 8 + 2
        shrl    $16, %eax
        movw    %ax, idt + TIMER * 8 + 4
        lidt    idt_pointer

        movb    $0x11, %al              /* both interrupt controllers: vectors from TIMER on, all but the timer off */
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $TIMER, %al
        outb    %al, $0x21
        movb    $TIMER + 8, %al
        outb    %al, $0xa1
        movb    $4, %al
        outb    %al, $0x21
        movb    $2, %al
        outb    %al, $0xa1
        movb    $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $TIMER_MASK, %al
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1

        movb    $0x34, %al              /* the timer: channel 0, rate generator */
        outb    %al, $0x43
        movb    $(DIVISOR & 0xff), %al
        outb    %al, $0x40
        movb    $(DIVISOR >> 8), %al
        outb    %al, $0x40

        movw    $0x3f8, %dx
        movb    $'R', %al
        outb    %al, %dx

        movl    $SET, %edi              /* the page that is next */
        sti
2:      hlt
        jmp     2b

tick:   movl    $TICK_PAGES, %ecx
        jecxz   3f
1:      addl    $0x9e3779b9, 64(%edi)
        addl    $4096, %edi
        cmpl    $(SET + SET_PAGES * 4096), %edi
        jb      2f
        movl    $SET, %edi
2:      loop    1b
3:      movb    $0x20, %al
        outb    %al, $0x20
        iret

        .align  8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt
idt_pointer:
        .word   (TIMER + 1) * 8 - 1
        .long   idt

        .bss
        .align  16
idt:    .skip   (TIMER + 1) * 8
        .align  16
        .skip   1024
stack_top:
