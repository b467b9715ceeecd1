/*
 * hello - prints a line from C, in ring 0
 *
 * Shows: a C program without a library, the debug console, and a port read back.
 * Output: "Hello from C in ring 0\n"
 */
#include "kvmpy.h"

KVMPY_RING(0);

int main(void)
{
    uint16_t selector;

    __asm__("movw %%cs, %0" : "=r"(selector));
    print("Hello from C in ring ");
    print_number(selector & 3); /* the two low bits of CS: the current privilege level */
    putch('\n');
    return 0;
}
