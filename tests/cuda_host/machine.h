// A GPU's threads on the host: see machine.cpp. hw.cuh gives kernels the functions that they expect.
#pragma once

extern int machine_thread, machine_block;  // of the thread that runs
extern unsigned char* machine_shared;

void machine_barrier();

// An operation that all lanes of a warp do together: the last of them to arrive does it, given every lane's operand.
// Lanes that arrive with different numbers are an error.
void machine_together(int operation, void* operand, void (*all)(void** operands));

void machine_copy16(void* to, const void* from, bool valid);
void machine_copies_end();
void machine_copies_wait(int pending);

// Runs `kernel` for every thread of every block. Returns what went wrong, or null.
const char* machine_run(void (*kernel)(const void* args), const void* args, int blocks, int threads, int shared_bytes,
                        unsigned seed);
