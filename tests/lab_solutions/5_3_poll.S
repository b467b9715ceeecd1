# poll - reads the device, and takes no interrupt
# mode: long
# words: "could not take an interrupt"
next:
        out     0x10, al
        in      al, 0x11
        cmp     al, 0xff
        je      done
        out     0xe9, al
        jmp     next
done:
        hlt
