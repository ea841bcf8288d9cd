// What the caller sees: a program is made once, run, and asked for its statistics.
#include <cstdio>
#include <cstring>

#include "machine.h"

using namespace ptx;

extern "C" {

// The opcodes' names in the order of their numbers, each followed by a space.
const char* ptx_ops() {
    return
#define PTX_OP(NAME) #NAME " "
        PTX_OPS(PTX_OP)
#undef PTX_OP
            ;
}

// `instructions`: ten numbers each, as `Instruction` has them; `constants`: three, as `Constant`; `special`: an offset
// for each `Special`.
void* ptx_new(const int32_t* instructions, int instruction_count, const int32_t* operands, int operand_count,
              const int64_t* constants, int constant_count, int words, int predicates, int granule,
              const int32_t* special, int keeps_registers) {
    auto* machine = new Machine;
    Program& program = machine->program;
    program.code.resize(instruction_count);
    memcpy(program.code.data(), instructions, instruction_count * sizeof(Instruction));
    program.operands.assign(operands, operands + operand_count);
    program.constants.resize(constant_count);
    memcpy(program.constants.data(), constants, constant_count * sizeof(Constant));
    memcpy(program.special, special, sizeof program.special);
    program.words = words;
    program.predicates = predicates;
    program.granule = static_cast<uint32_t>(granule);
    program.keeps_registers = keeps_registers;
    machine->statistics.begin(program.code.size());
    return machine;
}

// Bytes of local memory of each thread; none unless this is called.
void ptx_local(void* machine, int bytes) { static_cast<Machine*>(machine)->program.local_bytes = bytes; }

void ptx_free(void* machine) { delete static_cast<Machine*>(machine); }

// `buffers`: fifteen numbers each, as `Buffer` has them; those of one storage have the same begin and end; `options`:
// as `Options`. 0 if all went well. Else `error` says what did not: "@instruction|where: what"; an instruction is its
// number.
int ptx_run(void* handle, const int32_t* grid, int threads, int shared_bytes, const uint8_t* parameters,
            int parameter_bytes, const Buffer* buffers, int buffer_count, const int64_t* options, char* error,
            int error_bytes) {
    Machine& machine = *static_cast<Machine*>(handle);
    memcpy(machine.grid, grid, sizeof machine.grid);
    memcpy(&machine.options, options, sizeof machine.options);
    machine.threads = threads;
    machine.shared_bytes = static_cast<uint32_t>(shared_bytes);
    machine.parameters = parameters;
    machine.parameter_bytes = static_cast<uint32_t>(parameter_bytes);
    machine.global.begin(buffers, buffer_count, machine.options.checks);
    machine.random = Random(static_cast<uint64_t>(machine.options.seed));
    machine.statistics.on = machine.options.statistics;
    machine.warps.assign(threads / kLanes, {});
    try {
        machine.run();
    } catch (const Fault& fault) {
        snprintf(error, error_bytes, "@%d|CTA (%u,%u,%u) warp %d: %s",
                 machine.instruction ? static_cast<int>(machine.pc(*machine.instruction)) : -1, machine.cta[0],
                 machine.cta[1], machine.cta[2], machine.warp ? machine.warp->id : -1, fault.text.c_str());
        return 1;
    }
    return 0;
}

// `totals`: instructions of warps executed, and CTAs.
void ptx_stats(void* handle, uint64_t* counts, uint64_t* moved, uint64_t* needed, uint64_t* totals) {
    const Statistics& statistics = static_cast<Machine*>(handle)->statistics;
    const size_t bytes = statistics.counts.size() * sizeof(uint64_t);
    memcpy(counts, statistics.counts.data(), bytes);
    memcpy(moved, statistics.moved.data(), bytes);
    memcpy(needed, statistics.needed.data(), bytes);
    totals[0] = statistics.executed, totals[1] = statistics.ctas;
}
}
