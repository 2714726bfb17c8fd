//! PVH direct boot: 32-bit protected mode and an `hvm_start_info` (Xen `public/arch-x86/hvm/start_info.h`).

use super::bytes::put;
use super::layout::{COMMAND_LINE, COMMAND_LINE_MAX, START_INFO, memory_map};
use super::{Error, Loaded, Request, entry, linux};
use cpu::Registers;
use memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
const MODULES: u64 = START_INFO + 0x100;
const MAP: u64 = START_INFO + 0x200;

/// Places modules, command line and start info; answers the state at `entry`.
pub(super) fn start(
    memory: &GuestMemory,
    request: &Request<'_>,
    kernel: Loaded,
    entry: u32,
) -> Result<Registers, Error> {
    let len = request.command_line.len();
    if len >= COMMAND_LINE_MAX {
        return Err(Error::CommandLine { len, max: COMMAND_LINE_MAX.wrapping_sub(1) });
    }
    linux::write_string(memory, COMMAND_LINE, request.command_line)?;
    let mut info = [0u8; 0x38];
    put(&mut info, 0, &MAGIC.to_le_bytes());
    put(&mut info, 4, &1u32.to_le_bytes());
    if let Some(module) = request.modules.first() {
        let placed = super::place_high(memory, kernel, module.bytes)?;
        let mut entry = [0u8; 0x20];
        put(&mut entry, 0, &placed.start.to_le_bytes());
        put(&mut entry, 8, &placed.end.wrapping_sub(placed.start).to_le_bytes());
        memory.write(MODULES, &entry)?;
        put(&mut info, 0xc, &1u32.to_le_bytes());
        put(&mut info, 0x10, &MODULES.to_le_bytes());
    }
    put(&mut info, 0x18, &COMMAND_LINE.to_le_bytes());
    put(&mut info, 0x20, &request.rsdp.to_le_bytes());
    let map = memory_map(memory, request.reserved);
    let mut bytes = Vec::new();
    for range in &map {
        bytes.extend_from_slice(&range.base.to_le_bytes());
        bytes.extend_from_slice(&range.len.to_le_bytes());
        bytes.extend_from_slice(&u64::from(range.kind as u32).to_le_bytes());
    }
    memory.write(MAP, &bytes)?;
    put(&mut info, 0x28, &MAP.to_le_bytes());
    put(&mut info, 0x30, &u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    memory.write(START_INFO, &info)?;
    let mut registers = entry::protected_mode(memory, entry)?;
    if let Some(rbx) = registers.gpr.get_mut(entry::RBX) {
        *rbx = START_INFO;
    }
    Ok(registers)
}
