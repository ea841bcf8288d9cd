// The bytecode: its opcodes and how an instruction is encoded. Each opcode NAME is executed by `execute_NAME`, which
// stands with its family and says there what `sub` and the operands are. New opcodes go to the end.
#pragma once

#include <cstdint>

// clang-format off
#define PTX_OPS(X) \
    X(NOP) X(MOV32) X(MOV64) X(MOVP) X(PACK16) X(UNPACK16) X(PACK32) X(UNPACK32) \
    X(ADD32) X(SUB32) X(MULLO32) X(MULHI_S32) X(MULHI_U32) X(MULWIDE_S32) X(MULWIDE_U32) X(MULWIDE_S16) \
    X(MULWIDE_U16) X(MADLO32) X(MADLO64) X(MADWIDE_S16) X(MADWIDE_U16) X(MADWIDE_S32) X(MADWIDE_U32) \
    X(DIV_S32) X(DIV_U32) X(REM_S32) X(REM_U32) X(DIV_S64) X(DIV_U64) X(REM_S64) X(REM_U64) \
    X(MIN_S32) X(MAX_S32) X(MIN_U32) X(MAX_U32) X(MIN_S64) X(MAX_S64) X(MIN_U64) X(MAX_U64) X(MINRELU_S32) \
    X(MAXRELU_S32) \
    X(ABS32) X(NEG32) X(NEG64) X(AND32) X(OR32) X(XOR32) X(NOT32) X(NOT16) X(AND64) X(OR64) X(XOR64) X(NOT64) \
    X(ANDP) X(ORP) X(XORP) X(NOTP) \
    X(SHL16) X(SHL32) X(SHR_U32) X(SHR_S32) X(SHL64) X(SHR_U64) X(SHR_S64) \
    X(BFE_U32) X(BFE_S32) X(BFE_U64) X(BFE_S64) X(BFI32) X(PRMT) X(LOP3) X(SHF_L) X(SHF_R) X(POPC32) X(CLZ32) X(ADD16) X(SUB16) X(MULLO16) \
    X(ADD64) X(SUB64) X(MULLO64) X(MULHI_U64) \
    X(ADDF) X(SUBF) X(MULF) X(FMAF) X(MINF) X(MAXF) X(NEGF) X(ABSF) X(DIVF) X(EX2) X(LG2) X(RCP) X(SQRT) X(RSQRT) \
    X(TANH) \
    X(HALF) X(SETP_S32) X(SETP_U32) X(SETP_S64) X(SETP_U64) X(SETP_F32) X(SETP_U16) X(SETP_S16) X(SELP32) X(SELP64) \
    X(CVT_F32_BF16) X(CVT_BF16_F32) X(CVT_BF16X2_F32) X(CVT_F32_F16) X(CVT_F16_F32) X(CVT_F16X2_F32) X(CVT_F32_S32) \
    X(CVT_F32_U32) X(CVT_S32_F32_RZ) X(CVT_S64_S32) X(CVT_U64_U32) X(CVT_U32_U64) X(CVT_U16_U32) X(CVT_S32_S16) \
    X(SEXT64) X(ZEXT64) X(CVT_S32_S8) \
    X(LD) X(ST) X(BRA) X(BRX) X(RET) X(TRAP) \
    X(BAR_SYNC) X(BAR_ARRIVE) X(BAR_WARP) X(SHFL) X(REDUX) X(ELECT) \
    X(LDMATRIX) X(STMATRIX) X(MMA) X(MMA_TF32) \
    X(CPASYNC) X(CPASYNC_COMMIT) X(CPASYNC_WAIT) \
    X(WGMMA) X(WGMMA_FENCE) X(WGMMA_COMMIT) X(WGMMA_WAIT) \
    X(FENCE_PROXY) X(FENCE) \
    X(MBAR_INIT) X(MBAR_INVAL) X(MBAR_ARRIVE) X(MBAR_EXPECT) X(MBAR_WAIT) \
    X(TMA_LD) X(TMA_ST) X(BULK_COMMIT) X(BULK_WAIT) X(SETMAXNREG) \
    X(ATOM) X(ADDF2) X(SUBF2) X(MULF2) X(FMAF2) X(ADDMIX) X(FMAMIX) \
    X(T5_ALLOC) X(T5_DEALLOC) X(T5_LD) X(T5_ST) X(T5_WAIT_LD) X(T5_WAIT_ST) X(T5_MMA) X(T5_COMMIT) \
    X(VOTE) X(ACTIVEMASK) X(T5_FENCE_BEFORE) X(T5_FENCE_AFTER) \
    X(ADDD) X(SUBD) X(MULD) X(FMAD) X(DIVD) X(RCPD) X(MIND) X(MAXD) X(NEGD) X(ABSD) X(SETP_F64) \
    X(COPYSIGNF) X(COPYSIGND) X(RINTF) X(CVT_F32_F64) X(CVT_F64_F32) X(CVT_F64_S32)
// clang-format on

namespace ptx {

enum Op : int32_t {
#define PTX_OP(NAME) OP_##NAME,
    PTX_OPS(PTX_OP)
#undef PTX_OP
        kOps
};

struct Instruction {
    int32_t op, sub;
    int32_t predicate;     // 0: none; k + 1: where predicate k holds; -(k + 1): where it does not
    int32_t operands;      // how many
    int32_t first;         // of them, in the program's list of operands
    int32_t target;        // of a branch
    int32_t line;          // of the PTX text
    int32_t exempt;        // from the check of registers in flight: it has its own
    int32_t registers;     // bit k: operand k is a register
    int32_t destinations;  // bit k: operand k is written
};

}  // namespace ptx
